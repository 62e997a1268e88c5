"""rwkv-miss unmerge: whether a file is a merge into a base, found bit by bit."""

import functools
import json

import pytest
import torch

from rwkv_miss import UserError, merge_file, read_checkpoint, read_metadata, write_checkpoint
from rwkv_miss.__main__ import main
from rwkv_miss.adapter import METHODS
from rwkv_miss.files.identity import fingerprint
from rwkv_miss.merging.rounding import percent
from rwkv_miss.merging.unmerge import check_merge

from .conftest import make_arch, random_tensors


def check(merging, adapters=(), weights=None, merged="merged.pth", base="base.pth"):
    return check_merge(
        merging.folder / base, merging.folder / merged, [merging.folder / name for name in adapters], weights
    )


def rewrite(merging, change, name="merged.pth", record=True):
    """The file with change(tensors) applied to it."""
    path = merging.folder / name
    tensors = {key: tensor.clone() for key, tensor in read_checkpoint(path).items()}
    change(tensors)
    write_checkpoint(path, tensors.items(), read_metadata(path) if record else None)


def flip(tensors, key, bit=0, at=5):
    """Change one bit of one entry."""
    whole = tensors[key].view(-1).view({2: torch.int16, 4: torch.int32}[tensors[key].element_size()])
    whole[at] ^= 1 << bit


@pytest.mark.parametrize(
    "source, dtype, methods, weights",
    [
        *((source, "base", "miss", None) for source in (torch.bfloat16, torch.float16, torch.float32)),
        (torch.float32, "bf16", "miss", None),
        (torch.bfloat16, "fp32", "miss", None),
        (torch.bfloat16, "base", "lora", None),
        (torch.bfloat16, "base", "miss miss", [0.5, -2]),
        (torch.bfloat16, "base", "dora miss", [0.5, 0.5]),
        *((torch.float32, "base", method, None) for method in ("bat", "pissa", "vera")),
        (torch.float32, "base", "dora", [-1]),
    ],
)
def test_a_merge_is_one(merging, source, dtype, methods, weights):
    version, methods = 6 if source == torch.float16 else 7, methods.split()
    merging(version, source)
    names = [f"{i}.pth" for i in range(len(methods))]
    for i, (name, method) in enumerate(zip(names, methods)):
        merging.adapter(name, method, seed=i, targets=["key", "value"])
    report = merging.merge(names, weights, dtype)
    found = check(merging, names)  # the weights are those in the file
    assert found.ok and found.problems == [], found.problems
    linears = [layer.name for layer in report.rounding.layers]
    assert [changed.name for changed in found.changed] == [f"{name}.weight" for name in linears]
    assert found.same == found.tensors - len(linears) and sum(changed.apart for changed in found.changed) == 0
    # the account that the check makes is the merge's, where fp32, in which a merge counts, is exact enough
    assert [layer.name for layer in found.rounding.layers] == linears
    for layer, other in zip(found.rounding.layers, report.rounding.layers, strict=True):
        assert layer.update == pytest.approx(other.update, rel=1e-4)
        assert layer.lost == pytest.approx(other.lost, rel=1e-3, abs=1e-4)
        assert abs(layer.unchanged_share - other.unchanged_share) < 0.01
    found = check(merging)
    assert found.ok and [changed.name for changed in found.changed] == [f"{name}.weight" for name in linears]
    for changed in found.changed:
        kept, base = (
            read_checkpoint(merging.folder / f"{name}.pth")[changed.name] for name in ("merged", "base")
        )
        base = base.to(kept.dtype)
        assert changed.differing == int((kept != base).sum()) > 0
        assert changed.distance == pytest.approx(
            float((kept.double() - base.double()).norm() / base.double().norm()), rel=1e-3
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_bit_is_seen(merging, dtype):
    merging(dtype=dtype)
    merging.adapter("a.pth", targets=["key"])
    for key in ("blocks.1.att.key.weight", "blocks.1.att.value.weight", "ln_out.bias"):
        merging.merge(["a.pth"])
        rewrite(merging, functools.partial(flip, key=key))
        found = check(merging, ["a.pth"])
        assert len(found.problems) == 1 and key in found.problems[0] and "1 " in found.problems[0]
        assert check(merging).ok, "without the adapter it is a merge of something"


def test_one_bit_is_seen_next_to_matrix_products(merging):
    """Sums of a product may differ between machines by less than the rounding, but not by a step."""
    merging(dtype=torch.bfloat16)
    merging.adapter("a.pth", "lora")
    for bit in (0, 9):
        merging.merge(["a.pth"])
        rewrite(merging, functools.partial(flip, key="blocks.0.ffn.key.weight", bit=bit))
        assert (
            "blocks.0.ffn.key.weight is not what the merge writes in 1 of 6,400 entries, by up to"
            in check(merging, ["a.pth"]).problems[0]
        )


def test_sums_in_another_order_are_no_mistake(merging):
    """An fp32 merge of LoRA by float64 differs in last bits, which are counted and allowed; MiSS has no sums,
    and none are allowed there.
    """
    for method, allowed in (("lora", True), ("miss", False)):
        merging()
        merging.adapter("a.pth", method)
        merging.merge(["a.pth"])

        def in_float64(tensors):
            for key in tensors:
                if key.removesuffix(".weight") in read_metadata(merging.folder / "a.pth")["linears"]:
                    tensors[key] = (
                        merging.tensors[key].double() + merging.delta("a.pth", key.removesuffix(".weight"))
                    ).float()

        rewrite(merging, in_float64)
        if method == "miss":
            rewrite(merging, functools.partial(flip, key="blocks.0.att.key.weight"))
        found = check(merging, ["a.pth"])
        assert found.ok == allowed and sum(changed.apart for changed in found.changed) > 0
        if allowed:
            assert "entries are rounded the other way" in found.lines()[1]


def test_a_merge_with_wrong_arithmetic_is_seen(merging, monkeypatch):
    """The file is what the merge writes, but not what the method means."""
    merging()
    merging.adapter("a.pth")
    right = METHODS["miss"].add_delta_to
    monkeypatch.setattr(
        METHODS["miss"],
        "add_delta_to",
        lambda layer, weight: [right(layer, weight), weight[:, 0].mul_(1.001)],
    )
    merging.merge(["a.pth"])
    found = check(merging, ["a.pth"])
    assert len(found.problems) == 12
    assert all("the merge's sum is not the base + delta()" in problem for problem in found.problems)
    assert sum(changed.apart for changed in found.changed) == 0


def test_entries_that_were_not_to_change_do_not_count(merging):
    merging(dtype=torch.bfloat16)
    a = merging.adapter("a.pth", targets=["att.key"], std=1e-3)
    tensors = read_checkpoint(a)
    for D in tensors.values():
        D[:, :10] = 0
    write_checkpoint(a, tensors.items(), read_metadata(a))
    report = merging.merge(["a.pth"])
    assert [layer.name for layer in report.rounding.layers] == ["blocks.0.att.key", "blocks.1.att.key"]
    for mine, other in zip(check(merging, ["a.pth"]).rounding.layers, report.rounding.layers, strict=True):
        assert mine.changing == other.changing == 30 * 40 and mine.unchanged == other.unchanged > 0


def test_subtraction_does_not_undo(merging):
    merging(dtype=torch.bfloat16)
    merging.adapter("a.pth", std=1e-2)
    merging.merge(["a.pth"])
    found = check(merging, ["a.pth"])
    merged, wrong, entries = read_checkpoint(merging.folder / "merged.pth"), 0, 0
    for name in read_metadata(merging.folder / "a.pth")["linears"]:
        base = merging.tensors[f"{name}.weight"]
        wrong += int(
            (
                (merged[f"{name}.weight"].float() - merging.delta("a.pth", name).float()).bfloat16() != base
            ).sum()
        )
        entries += base.numel()
    assert found.not_undone == pytest.approx(wrong / entries) and found.not_undone > 0.01
    assert found.lines()[-1].startswith("  subtracting the adapters instead would")
    assert f"not give back {percent(found.not_undone)} of the entries" in found.lines()[-1]


def test_whole_tensors_and_states(merging):
    merging(dtype=torch.bfloat16)
    merging.adapter("a.pth", targets=["key"], parts="ln,state")
    merging.adapter("b.pth", "lora", seed=2, targets=["value"], parts="head,ln")
    merging.merge(["a.pth", "b.pth"], [1, 0.5])
    found = check(merging, ["a.pth", "b.pth"])
    assert found.ok and "head.weight" in {changed.name for changed in found.changed} and check(merging).ok
    for key, words in (
        ("head.weight", "head.weight is not what the merge writes in 1 of"),
        ("blocks.0.att.time_state", "is not the adapters'"),
    ):
        merging.merge(["a.pth", "b.pth"], [1, 0.5])
        rewrite(merging, functools.partial(flip, key=key))
        assert [words in problem for problem in check(merging, ["a.pth", "b.pth"]).problems] == [True]
    merging.merge(["a.pth", "b.pth"], [1, 0.5])
    rewrite(merging, lambda tensors: tensors.pop("blocks.1.att.time_state"))
    assert check(merging, ["a.pth", "b.pth"]).problems == [
        "blocks.1.att.time_state of the adapter is missing"
    ]


def test_weights_and_adapters_must_be_the_merges(merging):
    merging()
    for i, name in enumerate("abc"):
        merging.adapter(f"{name}.pth", seed=i, targets=["key"])
    merging.merge(["a.pth", "b.pth"], [0.7, -0.3])
    assert check(merging, ["b.pth", "a.pth"]).ok, "in any order, each with its own weight"
    problems = check(merging, ["a.pth", "b.pth"], [-0.3, 0.7]).problems
    assert "the weight of" in problems[0] and "is 0.7, not -0.3" in problems[0]
    assert "not what the merge writes" in problems[2]
    assert any(
        "no merge of" in problem and "c.pth" in problem
        for problem in check(merging, ["a.pth", "c.pth"]).problems
    )
    assert any("a merge of 2 adapters, not of 1" in problem for problem in check(merging, ["a.pth"]).problems)
    rewrite(merging, lambda tensors: None, record=False)  # as another project's tools write it
    assert check(merging, ["a.pth", "b.pth"], [0.7, -0.3]).ok and not check(merging, ["a.pth", "b.pth"]).ok


@pytest.mark.parametrize("weight", ["NaN", "1e400", '"2"', "[]", "true", "1" + 400 * "0"])
def test_a_record_that_makes_no_sense(merging, weight):
    merging()
    merging.adapter("a.pth", targets=["key"])
    merging.merge(["a.pth"], [0.5])
    record = read_metadata(merging.folder / "merged.pth")
    tensors = read_checkpoint(merging.folder / "merged.pth")
    entry = {"adapter_fingerprint": record["adapter_fingerprint"], "weight": json.loads(weight)}
    for sabotage in (entry, {"adapters": [7, entry]}):
        write_checkpoint(merging.folder / "odd.pth", tensors.items(), {**record, **sabotage})
        with pytest.raises(UserError, match="which is no number to multiply with; give --weights"):
            check(merging, ["a.pth"], merged="odd.pth")
        problems = check(merging, ["a.pth"], [0.5], merged="odd.pth").problems
        assert len(problems) == 1 and "by its own record the weight of" in problems[0]


def test_what_is_no_merge(merging):
    merging()
    merging.adapter("a.pth", targets=["key"])
    merging.merge(["a.pth"])
    write_checkpoint(
        merging.folder / "other.pth", random_tensors(make_arch(7, n_embd=40, head_size=8), seed=9).items()
    )
    assert check(merging, merged="other.pth").problems == [
        "no tensor is the base's; a merge changes some and leaves the others"
    ]
    assert "a merge into another base, base.pth" in check(merging, base="other.pth").problems[0]
    for change, problem in [
        (lambda t: t.pop("ln_out.weight"), "ln_out.weight of the base is missing"),
        (lambda t: t.update(extra=torch.zeros(2)), "extra is in neither the base nor an adapter"),
        (lambda t: t.update({"ln_out.bias": torch.zeros(3)}), "ln_out.bias is (3,), (40,) in the base"),
        (
            lambda t: t.update({"ln_out.bias": torch.zeros(40, dtype=torch.int32)}),
            "ln_out.bias is torch.int32, torch.float32 in the base",
        ),
        (
            lambda t: t.update({"head.weight": t["head.weight"].bfloat16()}),
            "some tensors are torch.bfloat16 and others keep the base's dtype",
        ),
    ]:
        merging.merge(["a.pth"])
        rewrite(merging, change)
        for adapters in ([], ["a.pth"]):
            assert any(problem in found for found in check(merging, adapters).problems), (
                problem,
                check(merging, adapters).problems,
            )
    with pytest.raises(UserError, match="is an adapter file"):
        check(merging, merged="a.pth")


def test_the_base_itself(merging):
    merging()
    merging.adapter("a.pth", std=0)
    merging.merge(["a.pth"])
    for adapters in ([], ["a.pth"]):
        found = check(merging, adapters)
        assert found.ok and not found.changed
        assert found.lines()[-1] == "no tensor differs, so there is nothing to undo"


def test_the_command(merging, capsys):
    merging(dtype=torch.bfloat16)
    a = merging.adapter("a.pth")
    base, merged = merging.folder / "base.pth", merging.folder / "merged.pth"
    merge_file(base, a, merged)
    before = {path.name: path.read_bytes() for path in merging.folder.iterdir()}
    flags = ["unmerge", str(merged), "--base", str(base)]
    main(flags)
    text = capsys.readouterr().out
    assert "base.pth, bit for bit; 12 differ" in text and "largest of 12" in text
    main([*flags, "--adapter", str(a)])
    text = capsys.readouterr().out
    assert f"these are what merging {a} gives, bit for bit" in text and "worst of 12" in text
    main([*flags, "--adapter", str(a), "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["ok"] and len(facts["changed"]) == len(facts["layers"]) == 12
    assert facts["adapters"][0]["adapter_fingerprint"] == fingerprint(read_checkpoint(a))
    with pytest.raises(SystemExit) as stop:
        main([*flags, "--adapter", str(a), "--weights", "-2", "--json"])
    assert stop.value.code == 1 and len(json.loads(capsys.readouterr().out)["problems"]) == 13
    with pytest.raises(SystemExit) as stop:
        main([*flags, "--adapter", str(a), "--weights", "-2"])
    text = capsys.readouterr().out
    assert stop.value.code == 1 and text.count("wrong: ") == 6 and "and 8 more" in text
    assert "is undone" not in text
    with pytest.raises(SystemExit) as stop:
        main(["unmerge", str(merged), "--base", str(merging.folder / "absent.pth")])
    assert stop.value.code == 2
    assert {path.name: path.read_bytes() for path in merging.folder.iterdir()} == before
