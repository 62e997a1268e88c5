"""rwkv-miss diff: the MiSS adapter that comes nearest to the difference of two checkpoints, against least
squares in float64.
"""

import json

import pytest
import torch

import rwkv_miss
from rwkv_miss import UserError, load_adapter, merge_file, read_checkpoint, read_metadata, write_checkpoint
from rwkv_miss.__main__ import main
from rwkv_miss.files.identity import fingerprint
from rwkv_miss.merging.diff import diff_files
from src.model import RWKV

from .conftest import make_arch, random_tensors, unchanged

LINEARS = {6: 16, 7: 12}  # linears of two layers


@pytest.fixture
def pair(merging):
    """pair(version, dtypes, change=function of B's tensors) -> folder with a.pth and b.pth, in which all
    matrices of the layers differ by noise.
    """

    def make(version=7, a=torch.float32, b=torch.float32, change=None, noise=1e-2, **metadata):
        first = random_tensors(make_arch(version, n_embd=40, head_size=8))
        torch.manual_seed(3)
        second = {
            key: (
                t + noise * torch.randn(t.shape)
                if t.dim() == 2 and key.startswith("blocks") and key.endswith(".weight")
                else t.clone()
            )
            for key, t in first.items()
        }
        if change:
            change(second)
        write_checkpoint(
            merging.folder / "a.pth", ((key, t.to(a)) for key, t in first.items()), metadata or None
        )
        write_checkpoint(
            merging.folder / "b.pth",
            ((key, t.to(b) if t.is_floating_point() else t) for key, t in second.items()),
        )
        return merging.folder

    return make


def diff(folder, rank=7, a="a.pth", b="b.pth", out="d.pth", **options):
    return diff_files(folder / a, folder / b, folder / out, rank, **options)


def refused(folder, words, *args, **options):
    with unchanged(folder), pytest.raises(UserError, match=words):
        diff(folder, *args, **options)


# 40 and 160 columns: 7 and 11 divide neither, and of 11 contiguous shards of 40 columns, which are of 4, the
# last is empty
@pytest.mark.parametrize(
    "version, a, b, rank, layout",
    [
        (7, torch.float32, torch.float32, 7, "stride"),
        (6, torch.bfloat16, torch.bfloat16, 8, "stride"),
        (7, torch.float16, torch.float16, 11, "contiguous"),
        (6, torch.float32, torch.bfloat16, 7, "contiguous"),
        (7, torch.bfloat16, torch.float32, 1, "stride"),
        (7, torch.float32, torch.float32, 40, "stride"),
    ],
)
def test_it_is_the_least_squares_solution(pair, monkeypatch, version, a, b, rank, layout):
    # 7 rows of 40 columns at once, or one of 160
    monkeypatch.setattr("rwkv_miss.merging.diff.ENTRIES_AT_ONCE", 7 * 40)
    folder = pair(version, a, b)
    report = diff(folder, rank, layout=layout)
    first, second, found = (read_checkpoint(folder / f"{name}.pth") for name in "abd")
    assert len(found) == len(report.linears) == LINEARS[version]
    all_of_it = rest_of_it = 0.0
    for layer in report.linears:
        x, y = (
            first[f"{layer.name}.weight"].to(second["emb.weight"].dtype).double(),
            second[f"{layer.name}.weight"].double(),
        )
        width = x.shape[1]
        shard = [i // -(-width // rank) if layout == "contiguous" else i % rank for i in range(width)]
        P = torch.nn.functional.one_hot(torch.tensor(shard), rank).t().double()
        # the least squares solution, of least norm where a shard is empty
        D = torch.linalg.pinv(P.t()) @ (y - x).t()
        assert (found[f"{layer.name}.miss"].double() - D).abs().max() < 1e-7
        rest, change = (y - x - D.t() @ P).square().sum(), (y - x).square().sum()
        assert layer.explained == pytest.approx(float(1 - rest / change), abs=1e-6)
        assert layer.random == len(set(shard)) / width
        assert layer.norm == pytest.approx(float(change**0.5))
        assert layer.base_norm == pytest.approx(float(x.norm()))
        all_of_it, rest_of_it = all_of_it + float(change), rest_of_it + float(rest)
    assert report.share("explained") == pytest.approx(1 - rest_of_it / all_of_it, abs=1e-6)


def test_noise_is_explained_as_a_random_matrix_is(pair):
    report = diff(pair(), 8)
    assert report.share("random") == pytest.approx(
        sum(8 / w * d.norm**2 for d, w in zip(report.linears, [40] * 5 + [160] + [40] * 5 + [160]))
        / sum(d.norm**2 for d in report.linears)
    )
    # 12 matrices of 40 rows and more; the share of one row has a relative deviation of sqrt(2 / 40)
    assert report.share("explained") == pytest.approx(report.share("random"), rel=0.05)


@pytest.mark.parametrize("layout", ["stride", "contiguous"])
@pytest.mark.parametrize("version", [6, 7])
def test_a_merge_of_miss_is_recovered(merging, version, layout):
    merging(version, tokenizer="bytes", format="rwkv-miss trained")
    model = RWKV.load(merging.folder / "base.pth")
    rwkv_miss.inject(model, "miss", rank=7, layout=layout)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 1e-2 * torch.randn_like(p)
    rwkv_miss.save_adapter(model, merging.folder / "a.pth", template="think")
    merging.merge(["a.pth"])
    report = diff(merging.folder, 7, "base.pth", "merged.pth", layout=layout)
    assert report.share("explained") > 1 - 1e-9 and not report.others
    trained, found = read_checkpoint(merging.folder / "a.pth"), read_checkpoint(merging.folder / "d.pth")
    assert list(found) == list(trained)
    assert max(float((found[key] - trained[key]).abs().max()) for key in trained) < 1e-6
    wanted, facts = read_metadata(merging.folder / "a.pth"), read_metadata(merging.folder / "d.pth")
    for name in "method options layout linears arch base base_fingerprint trainable format_version".split():
        assert facts[name] == wanted[name], name
    assert facts["tokenizer"] == "bytes" and facts["template"] == "think"
    assert facts["difference_to"]["file"] == "merged.pth"
    merge_file(merging.folder / "base.pth", merging.folder / "d.pth", merging.folder / "again.pth")
    for key, tensor in read_checkpoint(merging.folder / "again.pth").items():
        torch.testing.assert_close(
            tensor, read_checkpoint(merging.folder / "merged.pth")[key], rtol=0, atol=1e-6
        )
    assert read_metadata(merging.folder / "again.pth")["tokenizer"] == "bytes"


def changed_elsewhere(tensors):
    tensors["ln_out.bias"] = tensors["ln_out.bias"] + 1
    tensors["blocks.1.att.x_r"] = tensors["blocks.1.att.x_r"] * 1.5
    tensors["blocks.1.att.g1"] = tensors["blocks.1.att.g1"] + 0.1
    tensors |= {f"blocks.{i}.att.time_state": torch.randn(5, 8, 8) for i in range(2)}


def test_other_tensors_are_left_out_loudly_or_taken_along(pair):
    folder = pair(change=changed_elsewhere)
    names = {
        "ln_out.bias",
        "blocks.1.att.x_r",
        "blocks.1.att.g1",
        "blocks.0.att.time_state",
        "blocks.1.att.time_state",
    }
    report = diff(folder, targets=["att.key"])
    others = {d.name: d for d in report.others}
    assert names < set(others) and len(others) == len(names) + 10, "the other linears are others"
    assert others["ln_out.bias"].norm == pytest.approx(40**0.5)
    assert report.lines()[-7].startswith("warning: 15 other tensors differ and ARE LEFT OUT")
    assert set(read_checkpoint(folder / "d.pth")) == {"blocks.0.att.key.miss", "blocks.1.att.key.miss"}
    report = diff(folder, 40, whole=True)
    assert {d.name for d in report.others} == names and report.parts == ["ln", "time", "state"]
    assert report.lines()[-7].startswith(
        "note: 5 other tensors differ and are in the file as a whole (ln, time, state)"
    )
    kept, second = read_checkpoint(folder / "d.pth"), read_checkpoint(folder / "b.pth")
    assert "blocks.0.ln1.weight" in kept and all(torch.equal(kept[key], second[key]) for key in report.whole)
    assert read_metadata(folder / "d.pth")["train_parts"] == ["ln", "time", "state"]
    merge_file(folder / "a.pth", folder / "d.pth", folder / "m.pth")
    merged = read_checkpoint(folder / "m.pth")
    assert all(torch.equal(merged[key], second[key]) for key in names)
    model = RWKV.load(folder / "a.pth")
    load_adapter(model, folder / "d.pth")
    ids = torch.arange(20).view(1, 20)
    with torch.no_grad():
        torch.testing.assert_close(model(ids)[0], RWKV.load(folder / "m.pth")(ids)[0], rtol=1e-4, atol=1e-4)


def test_only_linears_that_differ_are_adapted(pair):
    folder = pair(noise=0.0, change=lambda t: t["blocks.1.ffn.value.weight"].add_(1e-3))
    report = diff(folder)
    assert (
        [d.name for d in report.linears]
        == read_metadata(folder / "d.pth")["linears"]
        == ["blocks.1.ffn.value"]
    )
    assert report.share("explained") == pytest.approx(1, abs=1e-6)


def test_refusals(pair):
    folder = pair()
    refused(
        folder,
        "target 'keys' matches no linear; there are: head, key, output, receptance, value",
        targets=["keys"],
    )
    refused(
        folder, r"rank 41 does not fit blocks.0.att.receptance: it must be from 1 to the input width, 40", 41
    )
    refused(folder, "rank 0 must be at least 1", 0)
    refused(folder, "layout 'rows' is unknown", layout="rows")
    refused(folder, "a.pth has the same .* as .*a.pth", b="a.pth")
    refused(
        folder,
        "b.pth has the same head as .*a.pth, and MiSS is for linears; 12 other tensors differ",
        targets=["head"],
    )
    refused(folder, "b.pth is an input", out="b.pth")
    diff(folder)
    refused(folder, "d.pth is an adapter file, expected a model", b="d.pth", out="e.pth")
    (folder / "d.pth").unlink()
    for change, words in [
        (
            lambda t: t.pop("ln_out.bias"),
            "b.pth has no ln_out.bias; the two checkpoints must be of the same model",
        ),
        (lambda t: t.update(x=torch.zeros(2)), "a.pth has no x; the two"),
        (
            lambda t: t.update({"head.weight": torch.zeros(3, 40)}),
            r"head.weight is \(67, 40\) in .*a.pth and \(3, 40\) in .*b.pth",
        ),
        (
            lambda t: t["blocks.1.ffn.key.weight"].view(-1)[7:8].fill_(float("nan")),
            "blocks.1.ffn.key holds NaN",
        ),
        (lambda t: t["ln_out.bias"][:1].fill_(float("inf")), "ln_out.bias holds NaN or infinite"),
        (
            lambda t: t.update({"ln_out.bias": torch.ones(40, dtype=torch.int32)}),
            "ln_out.bias differs and is torch.int32",
        ),
    ]:
        pair(change=change)
        refused(folder, words, whole=True)


def test_the_command(pair, capsys):
    folder = pair(a=torch.bfloat16, b=torch.bfloat16, change=changed_elsewhere)
    flags = f"diff {folder}/a.pth {folder}/b.pth --rank 8 --out {folder}/d.pth".split()
    main(flags)
    text = capsys.readouterr().out
    assert "MiSS of rank 8 has " in text and "least of 12" in text
    assert "warning: 5 other tensors differ and ARE LEFT OUT" in text
    main([*flags, "--json", "--targets", "key,att.value", "--layout", "contiguous", "--whole"])
    facts = json.loads(capsys.readouterr().out)
    assert len(facts["layers"]) == 6 and facts["parts"] == ["ln", "time", "state"]
    assert 0 < facts["explained"] < 1
    metadata = read_metadata(folder / "d.pth")
    assert metadata["options"]["layout"] == "contiguous"
    assert metadata["base_fingerprint"] == fingerprint(read_checkpoint(folder / "a.pth"))
    with pytest.raises(SystemExit):
        main([*flags[:4], "x", *flags[5:]])
    assert "--rank" in capsys.readouterr().err
