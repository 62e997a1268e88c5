"""Several adapters with weights in one file: the float64 sum, the metadata that readers need, and refusals before anything is written."""

import json
import re

import pytest
import torch

import rwkv_miss
from rwkv_miss import UserError, merge_file, read_checkpoint, read_metadata, write_checkpoint
from rwkv_miss.__main__ import main
from rwkv_miss.checkpoint import fingerprint
from src.model import RWKV

from .conftest import make_arch, random_tensors

# widths that the ranks below do not divide
SIZES = {"n_embd": 40, "head_size": 8}
OPTIONS = {"miss": {"rank": 7}, "lora": {"rank": 3, "alpha": 5.0}, "dora": {"rank": 3}, "bat": {"rank": 8}, "pissa": {"rank": 3}}


@pytest.fixture
def files(tmp_path):
    """files(version, dtype) -> the folder with base.pth; files.adapter(name, method, ...) -> the adapter's path, its numbers random."""

    class Files:
        folder = tmp_path

        def __call__(self, version=7, dtype=torch.float32, **metadata):
            self.tensors = random_tensors(make_arch(version, **SIZES), dtype)
            write_checkpoint(tmp_path / "base.pth", self.tensors.items(), metadata or None)
            return tmp_path

        def adapter(self, name, method="miss", seed=1, std=1e-2, targets=None, parts="", **metadata):
            model = RWKV.load(tmp_path / "base.pth", torch.float32)
            rwkv_miss.inject(model, method, targets, parts, **OPTIONS.get(method, {}))
            torch.manual_seed(seed)
            for p in model.parameters():
                if p.requires_grad:
                    p.data += std * torch.randn_like(p)
            rwkv_miss.save_adapter(model, tmp_path / name, **metadata)
            return tmp_path / name

        def delta(self, name, linear):
            """The papers' formulas in float64, (out, in)."""
            t = {key.removeprefix(f"{linear}."): value.double() for key, value in read_checkpoint(tmp_path / name).items()}
            options, method = (read_metadata(tmp_path / name)[key] for key in ("options", "method"))
            weight = self.tensors[f"{linear}.weight"].double()
            if method == "miss":
                return t["miss"].t()[:, [i % options["rank"] for i in range(weight.shape[1])]]
            if method == "bat":
                rank, result = options["rank"], torch.empty_like(weight)
                for a in range(weight.shape[0] // rank):
                    for b in range(weight.shape[1] // rank):
                        place = slice(a * rank, a * rank + rank), slice(b * rank, b * rank + rank)
                        result[place] = weight[place] @ t["bat"][a] + t["bat"][a]
                return result
            if method == "pissa":
                return t["lora_B"] @ t["lora_A"] - t["initial_B"] @ t["initial_A"]
            low_rank = options["alpha"] / options["rank"] * (t["lora_B"] @ t["lora_A"])
            if method == "lora":
                return low_rank
            V = weight + low_rank
            return t["magnitude"].unsqueeze(1) * V / V.norm(dim=1, keepdim=True) - weight

        def merge(self, adapters, weights=None, dtype="base", out="merged.pth", **options):
            return merge_file(tmp_path / "base.pth", [tmp_path / name for name in adapters], tmp_path / out, dtype, weights=weights, **options)

        def refused(self, words, *args, **options):
            before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
            with pytest.raises(UserError, match=words):
                self.merge(*args, **options)
            assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    return Files()


@pytest.mark.parametrize("methods, weights", [
    (("miss", "miss"), (0.7, 0.3)), (("miss", "lora"), (1, 1)), (("dora", "miss"), (1, -0.5)), (("miss", "bat", "dora"), (0.5, 2, -1)),
    (("pissa", "lora"), (1, 0.25)), (("miss",), (0.7,)), (("dora",), (-1,)),
])
@pytest.mark.parametrize("version, dtype", [(7, torch.float32), (7, torch.bfloat16), (6, torch.float16)])
def test_the_sum_of_weighted_changes_of_the_base(files, version, dtype, methods, weights):
    files(version, dtype)
    names = [f"{i}.pth" for i in range(len(methods))]
    # the second one has fewer linears: those of the first alone take their own factor
    for i, (name, method) in enumerate(zip(names, methods)):
        files.adapter(name, method, seed=i, targets=["key", "value"] if i else None)
    report = files.merge(names, weights)
    merged = read_checkpoint(files.folder / "merged.pth")
    assert list(merged) == list(files.tensors)
    changed = {layer.name for layer in report.rounding.layers}
    for key, base in files.tensors.items():
        name = key.removesuffix(".weight")
        concerned = [(file, w) for file, w in zip(names, weights) if name in read_metadata(files.folder / file)["linears"]]
        assert (name in changed) == bool(concerned), key
        if not concerned:
            assert torch.equal(merged[key], base), key
            continue
        exact = base.double() + sum(w * files.delta(file, name) for file, w in concerned)
        half_a_step = torch.finfo(dtype).eps / 2 * exact.abs().clamp(min=torch.finfo(dtype).smallest_normal)
        assert ((merged[key].double() - exact).abs() <= half_a_step + 1e-6).all(), key
    assert len(changed) == report.linears == len(read_metadata(files.folder / names[0])["linears"])


def test_a_weight_of_one_is_the_adapter_itself(files):
    """To the byte, also in a list, and for tensors that only one of the list changes."""
    files()
    files.adapter("a.pth", "lora", targets=["key"], parts="ln")
    files.adapter("b.pth", "miss", seed=2, targets=["value"], parts="time")
    for name in "ab":
        files.merge([f"{name}.pth"], [1.0], out=f"{name}-merged.pth")
        merge_file(files.folder / "base.pth", files.folder / f"{name}.pth", files.folder / "plain.pth")
        assert (files.folder / "plain.pth").read_bytes() == (files.folder / f"{name}-merged.pth").read_bytes()
    files.merge(["a.pth", "b.pth"])
    alone = {name: read_checkpoint(files.folder / f"{name}-merged.pth") for name in "ab"}
    for key, tensor in read_checkpoint(files.folder / "merged.pth").items():
        of = next((name for name in "ab" if not torch.equal(alone[name][key], files.tensors[key])), "a")
        assert torch.equal(tensor, alone[of][key]), key


def test_whole_tensors_and_initial_states(files):
    files()
    files.adapter("a.pth", targets=["key"], parts="ln,state")
    files.adapter("b.pth", "state", seed=2)
    files.adapter("c.pth", "lora", seed=3, targets=["value"], parts="ln,head")
    report = files.merge(["a.pth", "b.pth", "c.pth"], [0.5, 2, -1])
    merged = read_checkpoint(files.folder / "merged.pth")
    a, b, c = (read_checkpoint(files.folder / f"{name}.pth") for name in "abc")
    states = [f"blocks.{i}.att.time_state" for i in range(2)]
    assert list(merged) == [*files.tensors, *states] and report.states == 2 and report.parts == ["head", "ln", "state"]
    for key in ("ln_out.weight", "blocks.1.ln2.bias"):
        base = files.tensors[key].double()
        torch.testing.assert_close(merged[key].double(), base + 0.5 * (a[key] - base) - (c[key] - base), rtol=0, atol=1e-6)
    head = files.tensors["head.weight"].double()
    torch.testing.assert_close(merged["head.weight"].double(), 2 * head - c["head.weight"], rtol=0, atol=1e-6)
    for key in states:
        torch.testing.assert_close(merged[key].double(), 0.5 * a[key].double() + 2 * b[key].double(), rtol=0, atol=1e-6)
    # a base with a state of its own: changes are those from it
    (files.folder / "merged.pth").rename(files.folder / "base.pth")
    files.tensors = read_checkpoint(files.folder / "base.pth")
    files.adapter("d.pth", "state", seed=4)
    files.adapter("e.pth", "state", seed=5)
    files.merge(["d.pth", "e.pth"], [0.5, 0.25])
    d, e, base = read_checkpoint(files.folder / "d.pth"), read_checkpoint(files.folder / "e.pth"), files.tensors
    for key in states:
        exact = base[key].double() + 0.5 * (d[key].double() - base[key]) + 0.25 * (e[key].double() - base[key])
        torch.testing.assert_close(read_checkpoint(files.folder / "merged.pth")[key].double(), exact, rtol=0, atol=1e-6)


def test_a_linear_of_one_adapter_is_a_whole_tensor_of_another(files):
    files()
    files.adapter("a.pth", targets=["head"])
    files.adapter("b.pth", seed=2, targets=["key"], parts="head")
    files.merge(["a.pth", "b.pth"], [2, 0.5])
    base, b = files.tensors["head.weight"].double(), read_checkpoint(files.folder / "b.pth")["head.weight"]
    exact = base + 2 * files.delta("a.pth", "head") + 0.5 * (b - base)
    torch.testing.assert_close(read_checkpoint(files.folder / "merged.pth")["head.weight"].double(), exact, rtol=0, atol=1e-6)


def test_what_the_merged_file_says(files, capsys):
    files(tokenizer="bytes", format="rwkv-miss trained")
    files.adapter("a.pth", tokenizer="utf16", step=3)
    files.adapter("b.pth", "lora", seed=2, template="think")
    files.merge(["a.pth", "b.pth"], [0.7, -0.3])
    facts = read_metadata(files.folder / "merged.pth")
    assert [(entry["adapter"], entry.get("weight", 1), entry["method"], entry["step"]) for entry in facts["adapters"]] == [
        ("a.pth", 0.7, "miss", 3), ("b.pth", -0.3, "lora", None)]
    assert [entry["adapter_fingerprint"] for entry in facts["adapters"]] == [fingerprint(read_checkpoint(files.folder / f"{n}.pth")) for n in "ab"]
    assert facts["base_fingerprint"] == fingerprint(files.tensors) and "method" not in facts
    assert (facts["tokenizer"], facts["eod"], facts["template"]) == ("utf16", None, "think"), "an adapter's word goes before the base's"
    main(["inspect", str(files.folder / "merged.pth")])
    assert "adapters     a.pth times 0.7, b.pth times -0.3" in capsys.readouterr().out
    files.merge(["b.pth"], [0.5])
    facts = read_metadata(files.folder / "merged.pth")
    assert facts["weight"] == 0.5 and facts["tokenizer"] == "bytes", "what no adapter says is the base's"


def test_contradictions_name_both(files):
    files()
    files.adapter("a.pth", tokenizer="utf16")
    files.adapter("b.pth", seed=2)
    files.adapter("c.pth", seed=3, tokenizer="bytes")
    files.refused("different tokenizers: .*a.pth with 'utf16', .*c.pth with 'bytes'", ["a.pth", "b.pth", "c.pth"])
    files.adapter("a.pth", template="rwkv")
    files.adapter("c.pth", seed=3, template="think")
    files.refused("different templates: .*a.pth with 'rwkv', .*c.pth with 'think'", ["a.pth", "c.pth"])


def test_refusals(files):
    files()
    files.adapter("a.pth")
    files.adapter("b.pth", seed=2)
    files.refused("2 weights are given for 1 adapters", ["a.pth"], [1, 2])
    files.refused("1 weights are given for 2 adapters", ["a.pth", "b.pth"], [1])
    files.refused("weight nan is no number", ["a.pth", "b.pth"], [1, float("nan")])
    files.refused("weight inf is no number", ["a.pth"], [float("inf")])
    files.refused("a.pth and .*a.pth are the same adapter; give it once, with the sum of the weights", ["a.pth", "b.pth", "a.pth"])
    files.refused("b.pth is an input of the merge", ["a.pth", "b.pth"], out="b.pth")
    broken = {**read_checkpoint(files.folder / "b.pth"), "blocks.0.att.key.miss": torch.zeros(7, 39)}
    write_checkpoint(files.folder / "b.pth", broken.items(), read_metadata(files.folder / "b.pth"))
    files.refused("b.pth: the adapter does not fit blocks.0.att.key", ["a.pth", "b.pth"])
    files.tensors["head.weight"][0, 0] += 1
    write_checkpoint(files.folder / "base.pth", files.tensors.items())
    files.adapter("c.pth", seed=3)
    files.refused(r"b.pth was trained on another base", ["c.pth", "b.pth"])


def test_a_member_is_not_merged_a_second_time(files):
    files()
    files.adapter("a.pth")
    files.adapter("b.pth", seed=2)
    files.merge(["a.pth", "b.pth"], [0.5, 0.5])
    (files.folder / "base.pth").rename(files.folder / "first.pth")
    (files.folder / "merged.pth").rename(files.folder / "base.pth")
    files.refused("base.pth is already a merge of .*b.pth into base.pth; --force merges it a second time", ["b.pth"])
    files.adapter("c.pth", seed=3)
    files.refused("is already a merge of .*a.pth", ["c.pth", "a.pth"])
    files.merge(["c.pth"])


def test_the_command(files, capsys):
    files(dtype=torch.bfloat16)
    a, b = files.adapter("a.pth"), files.adapter("b.pth", seed=2)
    flags = ["merge", "--base", str(files.folder / "base.pth"), "--adapter", str(a), "--adapter", str(b), "--out", str(files.folder / "m.pth")]
    main([*flags, "--weights", "-0.5,2"])
    text = capsys.readouterr().out
    assert text.startswith("merged 12 linears of 2 adapters, times -0.5, 2, into ") and text.count("\n") == 1 + 1 + 5
    main([*flags, "--weights", "-0.5,2", "--layers"])
    assert capsys.readouterr().out.count("\n") == 1 + 1 + 12
    main([*flags, "--weights", "-0.5,2", "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert [entry["weight"] for entry in facts["adapters"]] == [-0.5, 2] and len(facts["layers"]) == 12 and facts["dtype"] == "bfloat16"
    assert facts["layers"][0]["lost"] >= facts["layers"][1]["lost"] > 0 and 0 < facts["layers"][0]["unchanged"] < 1
    assert facts["fingerprint"] == fingerprint(read_checkpoint(files.folder / "m.pth"))
    assert facts["base_fingerprint"] == fingerprint(files.tensors)
    for wrong, words in (("0.5", "1 weights are given for 2"), ("0.5,x", "expected numbers with commas"), ("nan,1", "is no number")):
        with pytest.raises(SystemExit):
            main([*flags[:-1], str(files.folder / "n.pth"), "--weights", wrong])
        assert words in capsys.readouterr().err and not (files.folder / "n.pth").exists()


@pytest.mark.parametrize("std, words", [
    (1e-2, r"auto: bfloat16 loses [\d.]+ % of the update, at most 5 % is allowed"),
    (1e-3, r"auto: bfloat16 loses \d+ % of the update; float16 loses [\d.]+ % of the update, at most 5 % is allowed"),
    (1e-5, r"auto: bfloat16 loses \d+ % of the update, float16 loses \d+ % of the update; at most 5 % is allowed, so the file is in float32"),
])
def test_auto_says_why(files, std, words):
    files(dtype=torch.bfloat16)
    files.adapter("a.pth", std=std)
    lines = files.merge(["a.pth"], dtype="auto").lines()
    assert any(re.search(words, line) for line in lines), lines
