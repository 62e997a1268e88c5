"""Several adapters with weights in one file: the float64 sum, the metadata that readers need, and refusals
before anything is written.
"""

import dataclasses
import json
import re

import pytest
import torch

import rwkv_miss
from rwkv_miss import merge_file, read_checkpoint, read_metadata, write_checkpoint
from rwkv_miss.__main__ import main
from rwkv_miss.convert import Hints
from rwkv_miss.errors import UserError
from rwkv_miss.files.identity import fingerprint
from rwkv_miss.merging.members import read_members

from .conftest import close, make_arch, random_tensors
from .test_convert import saved


@pytest.mark.product
@pytest.mark.parametrize(
    "methods, weights",
    [
        (("miss", "miss"), (0.7, 0.3)),
        (("miss", "lora"), (1, 1)),
        (("dora", "miss"), (1, -0.5)),
        (("miss", "bat", "dora"), (0.5, 2, -1)),
        (("pissa", "lora"), (1, 0.25)),
        (("miss",), (0.7,)),
        (("dora",), (-1,)),
    ],
)
@pytest.mark.parametrize("version, dtype", [(7, torch.bfloat16), (7, torch.float32), (6, torch.float16)])
def test_the_sum_of_weighted_changes_of_the_base(merging, version, dtype, methods, weights):
    merging(version, dtype)
    names = [f"{i}.pth" for i in range(len(methods))]
    # the second one has fewer linears: those of the first alone take their own factor
    for i, (name, method) in enumerate(zip(names, methods)):
        merging.adapter(name, method, seed=i, targets=["key", "value"] if i else None)
    report = merging.merge(names, weights)
    merged = read_checkpoint(merging.folder / "merged.pth")
    assert list(merged) == list(merging.tensors)
    changed = {layer.name for layer in report.rounding.layers}
    for key, base in merging.tensors.items():
        name = key.removesuffix(".weight")
        concerned = [
            (file, w)
            for file, w in zip(names, weights)
            if name in read_metadata(merging.folder / file)["linears"]
        ]
        assert (name in changed) == bool(concerned), key
        if not concerned:
            assert torch.equal(merged[key], base), key
            continue
        exact = base.double() + sum(w * merging.delta(file, name) for file, w in concerned)
        half_a_step = torch.finfo(dtype).eps / 2 * exact.abs().clamp(min=torch.finfo(dtype).smallest_normal)
        assert ((merged[key].double() - exact).abs() <= half_a_step + 1e-6).all(), key
    assert len(changed) == report.linears == len(read_metadata(merging.folder / names[0])["linears"])


def test_a_weight_of_one_is_the_adapter_itself(merging):
    """To the byte, also in a list, and for tensors that only one of the list changes."""
    merging()
    merging.adapter("a.pth", "lora", targets=["key"], parts="ln")
    merging.adapter("b.pth", "miss", seed=2, targets=["value"], parts="time")
    for name in "ab":
        merging.merge([f"{name}.pth"], [1.0], out=f"{name}-merged.pth")
        merge_file(merging.folder / "base.pth", merging.folder / f"{name}.pth", merging.folder / "plain.pth")
        assert (merging.folder / "plain.pth").read_bytes() == (
            merging.folder / f"{name}-merged.pth"
        ).read_bytes()
    merging.merge(["a.pth", "b.pth"])
    alone = {name: read_checkpoint(merging.folder / f"{name}-merged.pth") for name in "ab"}
    for key, tensor in read_checkpoint(merging.folder / "merged.pth").items():
        of = next((name for name in "ab" if not torch.equal(alone[name][key], merging.tensors[key])), "a")
        assert torch.equal(tensor, alone[of][key]), key


def test_whole_tensors_and_initial_states(merging):
    merging()
    merging.adapter("a.pth", targets=["key"], parts="ln,state")
    merging.adapter("b.pth", "state", seed=2)
    merging.adapter("c.pth", "lora", seed=3, targets=["value"], parts="ln,head")
    report = merging.merge(["a.pth", "b.pth", "c.pth"], [0.5, 2, -1])
    merged = read_checkpoint(merging.folder / "merged.pth")
    a, b, c = (read_checkpoint(merging.folder / f"{name}.pth") for name in "abc")
    states = [f"blocks.{i}.att.time_state" for i in range(2)]
    assert list(merged) == [*merging.tensors, *states] and report.states == 2
    assert report.parts == ["head", "ln", "state"]
    for key in ("ln_out.weight", "blocks.1.ln2.bias"):
        base = merging.tensors[key].double()
        torch.testing.assert_close(
            merged[key].double(), base + 0.5 * (a[key] - base) - (c[key] - base), rtol=0, atol=1e-6
        )
    head = merging.tensors["head.weight"].double()
    torch.testing.assert_close(merged["head.weight"].double(), 2 * head - c["head.weight"], rtol=0, atol=1e-6)
    for key in states:
        torch.testing.assert_close(
            merged[key].double(), 0.5 * a[key].double() + 2 * b[key].double(), rtol=0, atol=1e-6
        )
    # a base with a state of its own: changes are those from it
    (merging.folder / "merged.pth").rename(merging.folder / "base.pth")
    merging.tensors = read_checkpoint(merging.folder / "base.pth")
    merging.adapter("d.pth", "state", seed=4)
    merging.adapter("e.pth", "state", seed=5)
    merging.merge(["d.pth", "e.pth"], [0.5, 0.25])
    d, e, base = (
        read_checkpoint(merging.folder / "d.pth"),
        read_checkpoint(merging.folder / "e.pth"),
        merging.tensors,
    )
    for key in states:
        exact = (
            base[key].double() + 0.5 * (d[key].double() - base[key]) + 0.25 * (e[key].double() - base[key])
        )
        torch.testing.assert_close(
            read_checkpoint(merging.folder / "merged.pth")[key].double(), exact, rtol=0, atol=1e-6
        )


def test_a_linear_of_one_adapter_is_a_whole_tensor_of_another(merging):
    merging()
    merging.adapter("a.pth", targets=["head"])
    merging.adapter("b.pth", seed=2, targets=["key"], parts="head")
    merging.merge(["a.pth", "b.pth"], [2, 0.5])
    base, b = (
        merging.tensors["head.weight"].double(),
        read_checkpoint(merging.folder / "b.pth")["head.weight"],
    )
    exact = base + 2 * merging.delta("a.pth", "head") + 0.5 * (b - base)
    torch.testing.assert_close(
        read_checkpoint(merging.folder / "merged.pth")["head.weight"].double(), exact, rtol=0, atol=1e-6
    )


def test_what_the_merged_file_says(merging, capsys):
    merging(tokenizer="bytes", format="rwkv-miss trained")
    merging.adapter("a.pth", tokenizer="utf16", step=3)
    merging.adapter("b.pth", "lora", seed=2, template="think")
    merging.merge(["a.pth", "b.pth"], [0.7, -0.3])
    facts = read_metadata(merging.folder / "merged.pth")
    assert [
        (entry["adapter"], entry.get("weight", 1), entry["method"], entry["step"])
        for entry in facts["adapters"]
    ] == [("a.pth", 0.7, "miss", 3), ("b.pth", -0.3, "lora", None)]
    assert [entry["adapter_fingerprint"] for entry in facts["adapters"]] == [
        fingerprint(read_checkpoint(merging.folder / f"{n}.pth")) for n in "ab"
    ]
    assert facts["base_fingerprint"] == fingerprint(merging.tensors) and "method" not in facts
    assert (facts["tokenizer"], facts["eod"], facts["template"]) == ("utf16", None, "think"), (
        "an adapter's word goes before the base's"
    )
    main(["inspect", str(merging.folder / "merged.pth")])
    assert "adapters     a.pth times 0.7, b.pth times -0.3" in capsys.readouterr().out
    merging.merge(["b.pth"], [0.5])
    facts = read_metadata(merging.folder / "merged.pth")
    assert facts["weight"] == 0.5 and facts["tokenizer"] == "bytes", "what no adapter says is the base's"


def test_an_end_of_document_stays_with_its_tokenizer(merging):
    merging(tokenizer="vocab.txt", eod="#", format="rwkv-miss trained")
    for recorded, wanted in (
        ({}, ("vocab.txt", "#")),
        ({"tokenizer": "bytes"}, ("bytes", None)),
        ({"tokenizer": "vocab.txt"}, ("vocab.txt", "#")),
    ):
        merging.adapter("a.pth", **recorded)
        merging.merge(["a.pth"])
        facts = read_metadata(merging.folder / "merged.pth")
        assert (facts["tokenizer"], facts["eod"]) == wanted


def test_contradictions_name_both(merging):
    merging()
    merging.adapter("a.pth", tokenizer="utf16")
    merging.adapter("b.pth", seed=2)
    merging.adapter("c.pth", seed=3, tokenizer="bytes")
    merging.refused(
        "different tokenizers: .*a.pth with 'utf16', .*c.pth with 'bytes'", ["a.pth", "b.pth", "c.pth"]
    )
    merging.adapter("a.pth", template="rwkv:hermes")
    merging.adapter("c.pth", seed=3, template="think:hermes")
    merging.refused(
        "different templates: .*a.pth with 'rwkv:hermes', .*c.pth with 'think:hermes'", ["a.pth", "c.pth"]
    )


def test_a_file_is_not_searched_for_every_linear(tmp_path):
    class Counted(dict):
        passes = 0

        def items(self):
            Counted.passes += 1
            return super().items()

    model = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(20))
    base = model.state_dict()
    rwkv_miss.inject(model, "lora", targets="all-linear", rank=2)
    rwkv_miss.save_adapter(model, tmp_path / "a.pth")
    (member,) = read_members(tmp_path / "a.pth")
    member = dataclasses.replace(member, tensors=Counted(member.tensors))
    member.check(base)
    for key in member.by_weight:
        member.merge_into(key, base[key].clone())
    assert len(member.by_weight) == 20 and Counted.passes <= 2


def test_refusals(merging):
    merging()
    merging.adapter("a.pth")
    merging.adapter("b.pth", seed=2)
    merging.refused("2 weights are given for 1 adapters", ["a.pth"], [1, 2])
    merging.refused("1 weights are given for 2 adapters", ["a.pth", "b.pth"], [1])
    merging.refused("weight nan is no number", ["a.pth", "b.pth"], [1, float("nan")])
    merging.refused("weight inf is no number", ["a.pth"], [float("inf")])
    merging.refused(
        "a.pth and .*a.pth are the same adapter; give it once, with the sum of the weights",
        ["a.pth", "b.pth", "a.pth"],
    )
    merging.refused("b.pth is an input", ["a.pth", "b.pth"], out="b.pth")
    broken = {**read_checkpoint(merging.folder / "b.pth"), "blocks.0.att.key.miss": torch.zeros(7, 39)}
    write_checkpoint(merging.folder / "b.pth", broken.items(), read_metadata(merging.folder / "b.pth"))
    merging.refused("b.pth does not fit blocks.0.att.key", ["a.pth", "b.pth"])
    merging.tensors["head.weight"][0, 0] += 1
    write_checkpoint(merging.folder / "base.pth", merging.tensors.items())
    merging.adapter("c.pth", seed=3)
    merging.refused(r"b.pth was trained on another base", ["c.pth", "b.pth"])


def test_a_member_is_not_merged_a_second_time(merging):
    merging()
    merging.adapter("a.pth")
    merging.adapter("b.pth", seed=2)
    merging.merge(["a.pth", "b.pth"], [0.5, 0.5])
    (merging.folder / "base.pth").rename(merging.folder / "first.pth")
    (merging.folder / "merged.pth").rename(merging.folder / "base.pth")
    merging.refused(
        "base.pth is already a merge of .*b.pth into base.pth; --force merges it a second time", ["b.pth"]
    )
    merging.adapter("c.pth", seed=3)
    merging.refused("is already a merge of .*a.pth", ["c.pth", "a.pth"])
    merging.merge(["c.pth"])


def test_the_command(merging, capsys):
    merging(dtype=torch.bfloat16)
    a, b = merging.adapter("a.pth"), merging.adapter("b.pth", seed=2)
    flags = f"""
        merge --base {merging.folder}/base.pth --adapter {a} --adapter {b} --out {merging.folder}/m.pth
    """.split()
    main([*flags, "--weights", "-0.5,2"])
    text = capsys.readouterr().out
    assert text.startswith("merged 12 linears of 2 adapters, times -0.5, 2, into ")
    assert text.count("\n") == 1 + 1 + 5
    main([*flags, "--weights", "-0.5,2", "--layers"])
    assert capsys.readouterr().out.count("\n") == 1 + 1 + 12
    main([*flags, "--weights", "-0.5,2", "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert [entry["weight"] for entry in facts["adapters"]] == [-0.5, 2] and len(facts["layers"]) == 12
    assert facts["dtype"] == "bfloat16"
    assert facts["layers"][0]["lost"] >= facts["layers"][1]["lost"] > 0
    assert 0 < facts["layers"][0]["unchanged"] < 1
    assert facts["fingerprint"] == fingerprint(read_checkpoint(merging.folder / "m.pth"))
    assert facts["base_fingerprint"] == fingerprint(merging.tensors)
    for wrong, words in (
        ("0.5", "1 weights are given for 2"),
        ("0.5,x", "expected numbers with commas"),
        ("nan,1", "is no number"),
    ):
        with pytest.raises(SystemExit):
            main([*flags[:-1], str(merging.folder / "n.pth"), "--weights", wrong])
        assert words in capsys.readouterr().err and not (merging.folder / "n.pth").exists()


LOSES = r"bfloat16 loses \d+ % of the update"


@pytest.mark.parametrize(
    "std, words",
    [
        (1e-2, r"auto: bfloat16 loses [\d.]+ % of the update, at most 5 % is allowed"),
        (1e-3, rf"auto: {LOSES}; float16 loses [\d.]+ % of the update, at most 5 % is allowed"),
        (
            1e-5,
            rf"auto: {LOSES}, float16 loses \d+ % of the update; at most 5 % is allowed, so the file is in"
            " float32",
        ),
    ],
)
def test_auto_says_why(merging, std, words):
    merging(dtype=torch.bfloat16)
    merging.adapter("a.pth", std=std)
    lines = merging.merge(["a.pth"], dtype="auto").lines()
    assert any(re.search(words, line) for line in lines), lines


def test_a_hint_is_for_the_adapters_that_have_a_use_for_it(tmp_path):
    base = random_tensors(make_arch(7))
    write_checkpoint(tmp_path / "base.pth", base.items())
    saved(tmp_path / "ours.pth", rank=8)
    out, width = base["blocks.0.att.key.weight"].shape
    factors = {
        "blocks.0.att.key.lora_A": torch.randn(4, width),
        "blocks.0.att.key.lora_B": torch.randn(out, 4),
    }
    torch.save(factors, tmp_path / "theirs.pth")
    both = [tmp_path / "ours.pth", tmp_path / "theirs.pth"]
    merge_file(tmp_path / "base.pth", both, tmp_path / "m.pth", hints=Hints(alpha=8.0))
    merge_file(tmp_path / "base.pth", tmp_path / "ours.pth", tmp_path / "alone.pth")
    got, alone = (
        read_checkpoint(tmp_path / name)["blocks.0.att.key.weight"] for name in ("m.pth", "alone.pth")
    )
    close(
        "theirs",
        got - alone,
        2 * factors["blocks.0.att.key.lora_B"] @ factors["blocks.0.att.key.lora_A"],
        1e-5,
    )
    with pytest.raises(
        UserError, match="ours.pth is native, which leaves nothing open that --init could say; drop the flag"
    ):
        merge_file(
            tmp_path / "base.pth", tmp_path / "ours.pth", tmp_path / "n.pth", hints=Hints(init="x.pth")
        )
