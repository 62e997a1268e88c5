"""python -m scripts.verify_merge: the file bit for bit, and base + live adapters against it on a probe."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F

from rwkv_miss import UserError, merge_file, read_checkpoint, read_metadata, write_checkpoint
from rwkv_miss.convert import convert
from rwkv_miss.merging.members import read_members
from scripts.blended_adapters import BlendedLinear, blend
from scripts.verify_merge import main
from src.evaluation.kl_divergence import distance, logits_of
from src.model import RWKV

from .conftest import make_arch, random_tensors


@pytest.fixture
def verify(merging, capsys):
    """verify(adapters, flags...) -> (exit code, JSON), for merged.pth in merging.folder; bytes are tokens."""

    def run(adapters, *flags, merged="merged.pth"):
        named = [flag for name in adapters for flag in ("--adapter", str(merging.folder / name))]
        code = 0
        try:
            files = ["--base", str(merging.folder / "base.pth"), "--merged", str(merging.folder / merged)]
            main([*files, *named, "--json", "--tokens", "40", *flags])
        except SystemExit as stop:
            code = stop.code
        out = capsys.readouterr().out
        return code, json.loads(out) if out else None

    return run


def make(merging, version=7, dtype=torch.float32):
    """A base with a vocabulary of bytes."""
    merging.tensors = random_tensors(make_arch(version, n_embd=40, head_size=8, vocab_size=256), dtype)
    write_checkpoint(
        merging.folder / "base.pth",
        merging.tensors.items(),
        {"format": "rwkv-miss trained", "tokenizer": "bytes"},
    )


@pytest.mark.parametrize(
    "version, dtype, methods, weights, parts",
    [
        (7, torch.bfloat16, ["miss"], None, ""),
        (6, torch.float16, ["dora"], None, "ln,time"),
        (7, torch.float32, ["pissa", "miss"], [0.5, -0.5], "state"),
        (6, torch.float32, ["lora", "bat", "state"], [1, 0.5, 2], "head"),
        (7, torch.float32, ["miss"], [0.7], "emb"),
    ],
)
def test_a_merge_is_what_was_trained(merging, verify, version, dtype, methods, weights, parts):
    make(merging, version, dtype)
    names = [f"{method}.pth" for method in methods]
    for i, method in enumerate(methods):
        merging.adapter(f"{method}.pth", method, seed=i, parts="" if i else parts)
    merging.merge(names, weights)
    code, facts = verify(names)
    assert code == 0 and facts["ok"] and facts["problems"] == [] and facts["tokens"] == 40
    assert facts["files"]["ok"]
    effect, exact, merged, *short = facts["probe"]
    assert effect["max_logit_difference"] > 1e-2 and effect["mean_kl"] > 1e-5
    assert exact["max_logit_difference"] < 1e-5 * exact["max_logit"] and exact["top1_agreement"] == 1
    # fp32's rounding is nothing, that of 16 bits is far below what the adapters do, and not nothing
    assert merged["max_logit_difference"] < (1e-5 if dtype == torch.float32 else 0.1) * merged["max_logit"]
    assert [row["precision"] for row in short] == (
        [] if dtype == torch.float32 else [{torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype], "both"]
    )
    if short:
        assert merged["max_logit_difference"] > 10 * exact["max_logit_difference"]
        assert 0 < short[0]["mean_kl"] < effect["mean_kl"]


def test_a_distance_of_logits():
    torch.manual_seed(0)
    a, b = torch.randn(37, 5), torch.randn(37, 5)
    found = distance([a[:20], a[20:]], [b[:20], b[20:]])
    kl = F.kl_div(
        b.double().log_softmax(-1), a.double().log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    assert found.max_logit_difference == float((a - b).double().abs().max())
    assert found.max_logit == float(a.abs().max())
    assert found.mean_kl == pytest.approx(float(kl.mean())) and found.max_kl == pytest.approx(float(kl.max()))
    assert found.top1_agreement == pytest.approx(float((a.argmax(-1) == b.argmax(-1)).double().mean()))


@pytest.mark.parametrize("weights", [[1], [0.5], [1, 1], [-1, 0.3]])
def test_a_blended_model_is_the_merged_one(merging, weights):
    make(merging)
    methods = ["dora", "miss"][: len(weights)]
    files = [
        (str(merging.adapter(f"{method}.pth", method, seed=i, parts="ln,head,state")), weights[i])
        for i, method in enumerate(methods)
    ]
    merge_file(
        merging.folder / "base.pth",
        [path for path, _ in files],
        merging.folder / "merged.pth",
        weights=weights,
    )
    model = RWKV.load(merging.folder / "base.pth")
    before = {name: tensor.clone() for name, tensor in read_checkpoint(merging.folder / "base.pth").items()}
    blended = blend(model, read_members([path for path, _ in files], [weight for _, weight in files]))
    texts = [list(range(20)), list(range(50, 59))]
    assert len(blended) == 12 and all(isinstance(layer, BlendedLinear) for layer in blended.values())
    live, merged = logits_of(model, texts), logits_of(RWKV.load(merging.folder / "merged.pth"), texts)
    base = logits_of(RWKV.load(merging.folder / "base.pth"), texts)
    assert (
        distance(merged, live).max_logit_difference
        < 1e-5 * distance(merged, live).max_logit
        < distance(merged, base).max_logit_difference
    )
    after = read_checkpoint(merging.folder / "base.pth")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items()), (
        "it is mapped, never written"
    )


@pytest.mark.parametrize("weight", [2, 1])
def test_a_linear_of_one_adapter_is_a_whole_tensor_of_another(merging, weight):
    make(merging)
    merging.adapter("a.pth", targets=["head"])
    merging.adapter("b.pth", seed=2, targets=["key"], parts="head", std=0.1)
    files = [(str(merging.folder / "a.pth"), weight), (str(merging.folder / "b.pth"), 0.5)]
    merge_file(
        merging.folder / "base.pth",
        [path for path, _ in files],
        merging.folder / "merged.pth",
        weights=[weight for _, weight in files],
    )
    model = RWKV.load(merging.folder / "base.pth")
    blend(model, read_members([path for path, _ in files], [weight for _, weight in files]))
    found = distance(
        *(logits_of(one, [list(range(20))]) for one in (RWKV.load(merging.folder / "merged.pth"), model))
    )
    assert found.max_logit_difference < 1e-5 * found.max_logit


def test_in_the_files_dtype_both_are_computed_in_it(merging, verify):
    """In bf16 the merged file of a zero adapter gives the live model's bits, which are not fp32's."""
    make(merging, dtype=torch.bfloat16)
    merging.adapter("a.pth", std=0)
    merging.merge(["a.pth"])
    code, facts = verify(["a.pth"])
    assert code == 0 and [row["max_logit_difference"] for row in facts["probe"][:4]] == [0] * 4
    assert facts["probe"][4]["max_logit_difference"] > 1e-3


def test_a_wrong_file_ends_with_1(merging, verify):
    make(merging, dtype=torch.bfloat16)
    merging.adapter("a.pth")
    merging.adapter("b.pth", seed=2)
    merging.merge(["a.pth"])
    code, facts = verify(["a.pth"], "--weights", "0.9")
    assert code == 1 and not facts["ok"] and len(facts["probe"]) == 5
    assert any("not what the merge writes" in text for text in facts["problems"])
    code, facts = verify(["b.pth"])
    assert code == 1 and facts["probe"][2]["mean_kl"] > 0.1 * facts["probe"][0]["mean_kl"], (
        "another adapter is as far away as the base"
    )
    tensors = read_checkpoint(merging.folder / "merged.pth")
    wrong = tensors["head.weight"].clone()
    wrong[3, 7] *= 1.01
    write_checkpoint(
        merging.folder / "merged.pth",
        {**tensors, "head.weight": wrong}.items(),
        read_metadata(merging.folder / "merged.pth"),
    )
    code, facts = verify(["a.pth"])
    assert code == 1
    assert facts["problems"] == ["head.weight differs from the base in 1 entries, and no adapter changes it"]
    write_checkpoint(merging.folder / "merged.pth", {**tensors, "head.weight": wrong[:, :20]}.items())
    code, facts = verify(["a.pth"])
    assert code == 1 and facts["probe"] == []
    assert "head.weight is (256, 20), (256, 40) in the base" in facts["problems"][0]


def test_a_sum_that_is_not_the_live_model_ends_with_1(merging, verify, monkeypatch):
    """The file has the right bits of a wrong sum."""
    make(merging)
    merging.adapter("a.pth")
    merging.merge(["a.pth"])
    right = BlendedLinear.merged
    monkeypatch.setattr(
        BlendedLinear, "merged", lambda layer: right(layer) + 1e-3 * (right(layer) - layer.linear.weight)
    )
    code, facts = verify(["a.pth"])
    assert code == 1 and facts["files"]["ok"] and len(facts["problems"]) == 1
    assert "the merged model differs from the base with its adapters unmerged" in facts["problems"][0]


def test_the_probes_text(merging, verify, tmp_path, capsys):
    make(merging)
    merging.adapter("adapter.pth")
    merging.merge(["adapter.pth"])
    (tmp_path / "text").write_text("abc" * 9)
    assert verify(["adapter.pth"], "--text", str(tmp_path / "text"))[1]["tokens"] == 27
    assert verify(["adapter.pth"], "--tokens", "9")[1]["tokens"] == 8, "two of each of four kinds"
    for flags, words in (
        (["--tokens", "0"], "must be at least 1"),
        (["--text", "absent"], "--text absent cannot be read"),
        (["--tokenizer", "absent"], "absent"),
    ):
        named = [
            text
            for flag in ("base", "adapter", "merged")
            for text in (f"--{flag}", str(merging.folder / f"{flag}.pth"))
        ]
        with pytest.raises(SystemExit) as stop:
            main([*named, *flags])
        assert stop.value.code == 2 and words in capsys.readouterr().err
    (tmp_path / "text").write_text("")
    assert verify(["adapter.pth"], "--text", str(tmp_path / "text"))[0] == 2


def test_for_people(merging, capsys):
    make(merging, dtype=torch.bfloat16)
    a = merging.adapter("a.pth")
    merging.merge(["a.pth"])
    main(
        f"""
            --base {merging.folder}/base.pth --adapter {a} --merged {merging.folder}/merged.pth --tokens 40
        """.split()
    )
    text = capsys.readouterr().out
    assert f"these are what merging {a} gives, bit for bit" in text and "worst of 12" in text
    assert "max |dlogit|   mean KL" in text
    assert text.count("live -> merged file") == 2
    assert "the merged file is right: it is what was trained" in text
    assert "of what the adapters do, by mean KL" in text
    base = str(merging.folder / "base.pth")
    with pytest.raises(SystemExit, match="1"):
        main(["--base", base, "--adapter", str(a), "--merged", base])
    *_, last = capsys.readouterr().out.splitlines()
    assert last == "the merged file is not right: see the lines that begin with wrong"


def test_files_that_do_not_fit(merging):
    make(merging)
    merging.adapter("a.pth", targets=["key"], parts="head")
    (member,) = read_members(merging.folder / "a.pth")
    model = RWKV.load(merging.folder / "base.pth")
    for name in ("emb", "blocks.7.att.key"):
        with pytest.raises(UserError, match=f"adapts {name}, which is no linear of this model"):
            blend(model, [dataclasses.replace(member, metadata={**member.metadata, "linears": [name]})])
    with pytest.raises(UserError, match="holds classifier.weight, which this model does not have"):
        more = {**member.tensors, "classifier.weight": torch.zeros(2, 40)}
        blend(model, [dataclasses.replace(member, tensors=more)])
    assert not any(isinstance(module, BlendedLinear) for module in model.modules())


def test_adapters_of_other_projects(merging, verify, capsys):
    make(merging)
    merging.adapter("a.pth", tokenizer="bytes")
    convert(merging.folder / "a.pth", merging.folder / "peft", "peft")
    merge_file(merging.folder / "base.pth", merging.folder / "peft", merging.folder / "merged.pth")
    code, facts = verify(["peft"])
    assert code == 0 and facts["files"]["adapters"][0]["adapter"].endswith("peft")
    assert facts["probe"][0]["mean_kl"] > 0
