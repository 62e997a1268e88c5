"""The merged file: exact arithmetic, everything else untouched, an honest report, and refusals before
anything is written.
"""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from rwkv_miss.__main__ import main
from rwkv_miss.adapter import METHODS
from rwkv_miss.adapter_file import ADAPTER_FORMAT
from rwkv_miss.errors import UserError
from rwkv_miss.files.checkpoint import read_checkpoint, read_metadata, write_checkpoint
from rwkv_miss.files.identity import fingerprint
from rwkv_miss.merging.merge import MERGED_FORMAT, MergeReport, merge_file
from rwkv_miss.merging.rounding import Layer, Rounding
from src.model import RWKV

from .conftest import ROOT, make_arch, random_tensors, unchanged


def facts_of(method, options, linears, base):
    facts = dict(format=ADAPTER_FORMAT, method=method, options=options, linears=linears)
    return facts | {"base_fingerprint": fingerprint(base), "versions": {"torch": torch.__version__}}


LINEARS = [
    f"blocks.{layer}.{name}" for layer in (0, 1) for name in ("att.key", "att.output", "ffn.key", "ffn.value")
]


@pytest.fixture(scope="module")
def bases():
    """(version, dtype) -> tensors of a random checkpoint."""
    fp32 = {version: random_tensors(make_arch(version)) for version in (6, 7)}
    return lambda version, dtype: {name: t.to(dtype) for name, t in fp32[version].items()}


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@pytest.fixture
def case(tmp_path, bases):
    """case(...) -> the folder with base.pth and adapter.pth, whose adapter is the one described."""

    def make(
        version=7,
        dtype=torch.bfloat16,
        method="miss",
        std=1e-2,
        rank=16,
        layout="stride",
        base=None,
        whole=(),
        **metadata,
    ):
        tensors = base or bases(version, dtype)
        torch.manual_seed(1)
        options = {"rank": rank} | ({"layout": layout} if method == "miss" else {"alpha": 3.0 * rank})
        changes = {}
        for name in LINEARS:
            out, into = tensors[f"{name}.weight"].shape
            if method == "miss":
                changes[f"{name}.miss"] = std * torch.randn(rank, out)
            else:
                changes[f"{name}.lora_A"] = torch.randn(rank, into)
                changes[f"{name}.lora_B"] = std * torch.randn(out, rank)
        write_checkpoint(tmp_path / "base.pth", tensors.items())
        write_checkpoint(
            tmp_path / "adapter.pth",
            {**changes, **dict(whole)}.items(),
            dict(
                facts_of(method, options, LINEARS, tensors),
                format_version=1,
                layout=layout,
                targets=["key"],
                arch=make_arch(version).to_dict(),
                base="base.pth",
            )
            | metadata,
        )
        return tmp_path

    return make


def other_base(path, **sizes):
    """A checkpoint of other sizes, all zeros."""
    with torch.device("meta"):
        model = RWKV(make_arch(7, **sizes))
    write_checkpoint(
        path, ((name, torch.zeros(t.shape, dtype=torch.bfloat16)) for name, t in model.state_dict().items())
    )


def merge(folder, dtype="base", base="base.pth", adapter="adapter.pth", out="merged.pth", **options):
    return merge_file(folder / base, folder / adapter, folder / out, dtype, **options)


def delta(folder, name):
    """The formulas of the papers, written out again: (out, in), float64."""
    changes, facts = read_checkpoint(folder / "adapter.pth"), read_metadata(folder / "adapter.pth")
    width = read_checkpoint(folder / "base.pth")[f"{name}.weight"].shape[1]
    rank = facts["options"]["rank"]
    if facts["method"] == "lora":
        return (
            facts["options"]["alpha"]
            / rank
            * (changes[f"{name}.lora_B"].double() @ changes[f"{name}.lora_A"].double())
        )
    shard = [i // -(-width // rank) if facts["layout"] == "contiguous" else i % rank for i in range(width)]
    return changes[f"{name}.miss"].double().t()[:, shard]


def refused(folder, words, **options):
    """The merge is a UserError with these words, and the folder is as before."""
    with unchanged(folder), pytest.raises(UserError, match=words):
        merge(folder, **options)


def late(items):
    """Yield each item when the next one has been made."""
    before = next(items)
    for item in items:
        yield before
        before = item
    yield before


# the arithmetic


@pytest.mark.product
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "version, method, rank, layout",
    [
        (6, "miss", 16, "stride"),
        (7, "miss", 16, "stride"),
        (7, "miss", 13, "stride"),
        (7, "miss", 13, "contiguous"),
        (6, "lora", 4, None),
        (7, "lora", 4, None),
    ],
)
def test_merged_linears_are_base_plus_delta_and_the_rest_is_the_base(
    case, version, method, rank, layout, dtype
):
    folder = case(version, dtype, method, rank=rank, layout=layout)
    report = merge(folder)
    base, merged = (
        torch.load(folder / name, weights_only=True, mmap=True) for name in ("base.pth", "merged.pth")
    )
    assert type(merged) is dict and list(merged) == list(base)
    touched = {f"{name}.weight": name for name in LINEARS}
    for key, tensor in merged.items():
        assert tensor.dtype == base[key].dtype and tensor.shape == base[key].shape, key
        if key not in touched:
            assert torch.equal(bits(tensor), bits(base[key])), key
        else:
            exact = base[key].double() + delta(folder, touched[key])
            half_a_step = torch.finfo(dtype).eps / 2 * exact.abs().clamp(min=1e-4)
            assert ((tensor.double() - exact).abs() <= half_a_step + 1e-7).all(), key
            assert not torch.equal(tensor, base[key])
    assert report.linears == len(LINEARS) and report.replaced == 0
    assert report.bytes == (folder / "merged.pth").stat().st_size
    assert sorted(path.name for path in folder.iterdir()) == ["adapter.pth", "base.pth", "merged.pth"]


def test_a_bf16_merge_is_rounded_once(case):
    """Adding in fp32 and rounding once is the nearest bf16 value, bit for bit."""
    folder = case(dtype=torch.bfloat16)
    merge(folder)
    base, merged = read_checkpoint(folder / "base.pth"), read_checkpoint(folder / "merged.pth")
    for name in LINEARS:
        assert torch.equal(
            merged[f"{name}.weight"],
            (base[f"{name}.weight"].float() + delta(folder, name).float()).bfloat16(),
        )


@pytest.mark.parametrize("dtype", ["base", "bf16", "fp32"])
@pytest.mark.parametrize("source", [torch.bfloat16, torch.float32])
def test_a_method_may_add_into_the_weight_it_is_given(case, monkeypatch, source, dtype):
    """The file equals that of a method that makes a new tensor; the base file is never written."""
    folder = case(dtype=source)
    before = (folder / "base.pth").read_bytes()
    merge(folder, dtype)
    plain = METHODS["miss"].merged_weight
    monkeypatch.setattr(
        METHODS["miss"], "merged_weight", lambda weight, *rest: weight.copy_(plain(weight, *rest))
    )
    # each written when the second thread has made the next, which is the worst it may do
    monkeypatch.setattr("rwkv_miss.merging.merge._ahead", late)
    merge(folder, dtype, out="inplace.pth")
    assert (folder / "inplace.pth").read_bytes() == (folder / "merged.pth").read_bytes()
    assert (folder / "base.pth").read_bytes() == before


@pytest.mark.parametrize(
    "dtype, wanted", [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
@pytest.mark.parametrize("source", [torch.bfloat16, torch.float32])
def test_a_dtype_converts_the_whole_file(case, bases, dtype, wanted, source):
    base = {**bases(7, source), "steps": torch.arange(3)}
    folder = case(base=base, whole={f"blocks.{i}.att.time_state": torch.randn(3, 16, 16) for i in range(2)})
    report = merge(folder, dtype)
    merged = read_checkpoint(folder / "merged.pth")
    assert {merged.pop(f"blocks.{i}.att.time_state").dtype for i in range(2)} == {wanted}
    assert torch.equal(merged.pop("steps"), base.pop("steps"))
    assert {t.dtype for t in merged.values()} == {wanted}
    assert report.dtype == str(wanted).removeprefix("torch.")
    assert torch.equal(merged["emb.weight"], base["emb.weight"].to(wanted))
    exact = base["blocks.1.att.key.weight"].float() + delta(folder, "blocks.1.att.key").float()
    assert torch.equal(merged["blocks.1.att.key.weight"], exact.to(wanted))


def test_whole_tensors_replace_or_are_appended(case, bases):
    base = bases(7, torch.bfloat16)
    vector = torch.randn(48)  # squeezed, as some models hold it
    states = {f"blocks.{i}.att.time_state": torch.randn(3, 16, 16) for i in range(2)}
    folder = case(base=base, whole={"blocks.1.att.w0": vector, **states})
    report = merge(folder)
    merged = read_checkpoint(folder / "merged.pth")
    assert list(merged) == [*base, *states]
    assert torch.equal(merged["blocks.1.att.w0"], vector.bfloat16().view(1, 1, 48))
    assert all(torch.equal(merged[name], state) for name, state in states.items())
    assert report.replaced == 3 and "8 linears and 3 whole tensors" in report.lines()[0]
    assert "initial state" in report.lines()[-1]


def test_a_merge_of_other_adapters_is_a_base_like_any_other(case, tmp_path):
    first = case()
    merge(first, out="once.pth")
    once = read_checkpoint(first / "once.pth")
    case(base=dict(once), std=2e-2)
    merge(tmp_path, base="once.pth", out="twice.pth")
    assert read_metadata(tmp_path / "twice.pth")["base_fingerprint"] == fingerprint(once)


# the report


@pytest.mark.parametrize(
    "source, dtype",
    [
        (torch.bfloat16, "base"),
        (torch.bfloat16, "fp16"),
        (torch.bfloat16, "fp32"),
        (torch.float32, "bf16"),
        (torch.float32, "fp16"),
    ],
)
def test_the_loss_is_the_error_of_the_update(case, source, dtype):
    folder = case(dtype=source, std=3e-4)
    report = merge(folder, dtype)
    base, merged = read_checkpoint(folder / "base.pth"), read_checkpoint(folder / "merged.pth")
    update = error = 0.0
    lost, counts = {}, {}
    for name in LINEARS:
        weight, got = base[f"{name}.weight"], merged[f"{name}.weight"]
        change = delta(folder, name)
        missing = (got.double() - weight.to(got.dtype).double()) - change
        update, error = update + change.square().sum(), error + missing.square().sum()
        lost[name] = float(missing.norm() / change.norm())
        # numbers that change at all in fp32, in which the sum is made
        changing = weight.float() != weight.float() + change.float()
        counts[name] = int(changing.sum()), int((changing & (got == weight.to(got.dtype))).sum())
    assert report.rounding.lost == pytest.approx(float((error / update) ** 0.5), rel=1e-3, abs=1e-4)
    assert [layer.name for layer in report.rounding.layers] == LINEARS
    for layer in report.rounding.layers:
        assert layer.lost == pytest.approx(lost[layer.name], rel=1e-3, abs=1e-4), layer.name
        assert (layer.changing, layer.unchanged) == counts[layer.name], layer.name
    if dtype != "fp32":
        assert [layer.name for layer in report.rounding.worst()] == sorted(lost, key=lost.get, reverse=True)


def test_the_report_is_one_line_and_a_warning_above_5_percent(case):
    line, *table = merge(case(std=1e-2)).lines(3)
    assert re.search(
        r"merged 8 linears into .*merged.pth \(bfloat16\) in [\d.]+ s; rounding lost [\d.]+ % of the update"
        r" and left [\d.]+ % "
        r"of its entries unchanged$",
        line,
    )
    assert len(table) == 4 and re.search("worst of 8 .*lost of update  entries unchanged", table[0])
    assert all(re.search(r"^  blocks\.\d\.\w+\.\w+ +[\d.]+ % +[\d.]+ %$", row) for row in table[1:])
    report = merge(case(std=1e-4))
    assert report.rounding.lost > 0.05 and len(report.lines(None)) == 1 + 1 + 8 + 1
    assert "--dtype fp16" in report.lines()[-1] and "--dtype fp32" in report.lines()[-1]
    report = merge(case(dtype=torch.float16, std=1e-6))
    assert "--dtype fp32" in report.lines()[-1] and "--dtype fp16" not in report.lines()[-1]
    assert len(merge(case(dtype=torch.float32)).lines()) == 1, "where nothing is lost there is no table"


def test_an_untrained_adapter_loses_nothing_and_says_so(case):
    folder = case(std=0.0)
    report = merge(folder)
    assert report.rounding.lost == 0.0 and {layer.unchanged for layer in report.rounding.layers} == {0}
    assert "the update is zero" in report.lines()[1]
    base, merged = read_checkpoint(folder / "base.pth"), read_checkpoint(folder / "merged.pth")
    assert all(torch.equal(bits(base[name]), bits(merged[name])) for name in base)


@pytest.mark.parametrize(
    "std, change, wanted",
    [
        (1e-2, {}, "bfloat16"),  # the base's own
        (1e-3, {}, "float16"),  # bf16 would lose a fifth of the update
        (1e-5, {}, "float32"),  # and so would fp16
        (1e-3, {"head.weight": 1e5}, "float32"),  # fp16 can't hold the rest of the file
        (1e-3, {"blocks.1.ffn.key.weight": 1e5}, "float32"),  # nor this linear
    ],
)
def test_auto(case, bases, std, change, wanted):
    base = bases(7, torch.bfloat16)
    for name, value in change.items():
        base[name][0, 0] = value
    report = merge(case(base=base, std=std), "auto")
    assert report.dtype == wanted and report.rounding.lost <= 0.05


def test_auto_keeps_an_fp32_base(case):
    assert merge(case(dtype=torch.float32, std=1e-4), "auto").dtype == "float32"


def test_the_merged_file_says_what_it_is(case):
    folder = case(tokenizer="world", step=7)
    merge(folder)
    facts = read_metadata(folder / "merged.pth")
    assert facts["format"] == MERGED_FORMAT and facts["method"] == "miss" and facts["options"]["rank"] == 16
    assert facts["base_fingerprint"] == fingerprint(read_checkpoint(folder / "base.pth"))
    assert facts["adapter_fingerprint"] == fingerprint(read_checkpoint(folder / "adapter.pth"))
    assert facts["base"] == "base.pth" and facts["tokenizer"] == "world" and facts["step"] == 7


# refusals


def test_a_file_that_is_no_adapter(case):
    folder = case()
    refused(folder, "base.pth is not an adapter file", adapter="base.pth", base="base.pth")
    refused(folder, "adapter.pth is an adapter file, expected a model", base="adapter.pth")


def test_another_base(case):
    folder = case()
    tensors = read_checkpoint(folder / "base.pth")
    changed = tensors["head.weight"].clone()
    changed[0, 0] += 1
    write_checkpoint(folder / "other.pth", {**tensors, "head.weight": changed}.items())
    refused(
        folder,
        r"trained on another base \(base.pth\), not on .*other.pth; merge into that one, or --force",
        base="other.pth",
    )
    merge(folder, base="other.pth", force=True)
    assert torch.equal(read_checkpoint(folder / "merged.pth")["head.weight"], changed)


def test_another_size_of_base_is_described(case):
    folder = case()
    other_base(folder / "deep.pth", n_layer=3)
    refused(
        folder,
        "that one is RWKV-7, 2 layers, width 48, .* this one RWKV-7, 3 layers, width 48",
        base="deep.pth",
    )
    merge(folder, base="deep.pth", force=True)


def test_shapes_are_never_forced(case):
    folder = case()
    for sizes, words in [
        ({"n_embd": 64}, "another base.*width 64.*merge into that one$"),
        ({"n_layer": 1}, "blocks.1.att.key, which the base"),
    ]:
        other_base(folder / "other.pth", **sizes)
        refused(folder, words, base="other.pth", force=True)


def test_tensors_that_do_not_fit(case):
    broken = {"blocks.0.att.key.miss": torch.zeros(16, 47)}
    refused(
        case(whole=broken),
        r"does not fit blocks.0.att.key, \(48, 48\): miss is \(16, 47\)",
        force=True,
    )
    refused(
        case(whole={"ln_out.weight": torch.zeros(47)}),
        r"does not fit ln_out.weight, \(48,\): it has \(47,\)",
    )
    refused(
        case(whole={"emb.weight": torch.zeros(48, 67)}),
        r"does not fit emb.weight, \(67, 48\): it has \(48, 67\)",
    )
    refused(case(whole={"blocks.0.att.key.more": torch.zeros(3)}), "method miss needs")
    refused(case(linears=[*LINEARS, "blocks.0.att.w1"]), "blocks.0.att.w1, which the base does not have")
    refused(case(linears=[*LINEARS, "ln_out"]), r"ln_out.weight of the base is \(48,\)")


def test_an_adapter_that_diverged(case):
    refused(
        case(whole={"blocks.1.att.key.miss": torch.full((16, 48), float("nan"))}),
        "blocks.1.att.key.miss holds NaN",
    )


def test_the_inputs_are_never_overwritten(case):
    folder = case()
    os.link(folder / "base.pth", folder / "hard.pth")
    (folder / "soft.pth").symlink_to(folder / "adapter.pth")
    for out in ("base.pth", "adapter.pth", "hard.pth", "soft.pth", "../" + folder.name + "/base.pth"):
        refused(folder, "is an input", out=out, force=True)


def test_a_second_merge_of_the_same_adapter(case):
    folder = case()
    merge(folder)
    again = {"base": "merged.pth", "out": "again.pth"}
    refused(folder, "merged.pth is already a merge of .*/adapter.pth into base.pth", **again)
    merge(folder, **again, force=True)
    twice = read_checkpoint(folder / "again.pth")["blocks.0.att.key.weight"].double()
    exact = read_checkpoint(folder / "base.pth")["blocks.0.att.key.weight"].double()
    exact += 2 * delta(folder, "blocks.0.att.key")
    assert (twice - exact).norm() < 0.01 * exact.norm()


def test_no_room_no_folder_and_no_such_dtype(case, monkeypatch):
    folder = case()
    refused(folder, "absent: No such file", out="absent/merged.pth")
    refused(folder, "dtype 'fp8' is unknown; choose one of: base, auto, bf16, fp16, fp32", dtype="fp8")
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 100})())
    refused(folder, r"merged.pth needs [\d,]{6,} bytes, 100 are free")


@pytest.mark.parametrize("key", ["head.weight", "blocks.1.ffn.key.weight"])
def test_values_beyond_fp16_are_named_and_the_previous_file_stays(case, bases, key):
    base = {name: tensor.clone() for name, tensor in bases(7, torch.float32).items()}
    base[key][1, 2] = 7e4
    folder = case(base=base)
    (folder / "merged.pth").write_bytes(b"previous")
    refused(
        folder,
        f"{key} has values beyond fp16's largest, 65504; merge in bf16 or fp32 \\(--dtype of the command\\)",
        dtype="fp16",
    )
    base[key][1, 2] = float("inf")  # the file's own infinity is no overflow
    merge(case(base=base), "fp16")


@pytest.mark.parametrize("value", ["inf", "-inf", "nan"])
def test_a_broken_value_of_the_base_is_named_and_not_counted(case, bases, value):
    base = {name: tensor.clone() for name, tensor in bases(7, torch.float32).items()}
    folder = case(base=base)
    sound = merge(folder, "bf16").rounding
    base["blocks.1.ffn.key.weight"][1, 2] = float(value)
    report = merge(case(base=base), "bf16")
    assert "nan" not in report.lines()[0]
    assert report.rounding.lost == pytest.approx(sound.lost, rel=1e-2)
    [warning] = report.warnings()
    assert warning.startswith("in blocks.1.ffn.key the base has infinite or NaN values (1), which stay")
    assert "download or convert the base again" in warning


# the command line


def command(capsys, *args):
    """Exit code and what was printed on each stream."""
    try:
        main([str(arg) for arg in args])
        code = 0
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def test_merge_command(case, capsys):
    folder = case()
    inputs = "merge", "--base", folder / "base.pth", "--adapter", folder / "adapter.pth"
    code, out, err = command(capsys, *inputs, "--out", folder / "merged.pth", "--dtype", "fp32")
    assert code == 0 and err == "" and out.startswith("merged 8 linears into ") and "(float32)" in out
    assert out.count("\n") == 1
    code, out, err = command(capsys, *inputs, "--out", folder / "base.pth")
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1
    again = ["--base", folder / "merged.pth", "--out", folder / "again.pth", "--force"]
    code, out, err = command(capsys, "merge", *inputs[3:], *again)
    assert code == 0 and (folder / "again.pth").exists()


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["--hel"],
        ["murge"],
        ["merge"],
        ["merge", "--bas", "x", "--adapter", "y", "--out", "z"],
        ["inspect"],
        ["inspect", "--js", "x"],
        ["merge", "--base", "x", "--adapter", "y", "--out", "z", "--dtype", "int4"],
        ["inspect", "x", "--what"],
    ],
)
def test_mistyped_commands(args, capsys):
    code, out, err = command(capsys, *args)
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1


def test_inspect(case, capsys):
    folder = case()
    merge(folder)
    facts = {}
    for name in ("base", "adapter", "merged"):
        code, out, err = command(capsys, "inspect", folder / f"{name}.pth", "--json")
        assert code == 0 and err == ""
        facts[name] = json.loads(out)
        code, text, err = command(capsys, "inspect", folder / f"{name}.pth")
        assert code == 0 and facts[name]["fingerprint"] in text
    base, adapter, merged = facts.values()
    tensors = read_checkpoint(folder / "base.pth")
    assert base["arch"] == make_arch(7).to_dict() and base["dtypes"] == {"bfloat16": len(tensors)}
    assert base["parameters"] == sum(t.numel() for t in tensors.values())
    assert base["bytes"] == (folder / "base.pth").stat().st_size
    assert adapter["kind"] == "adapter" and adapter["metadata"]["method"] == "miss"
    assert adapter["parameters"] == sum(t.numel() for t in read_checkpoint(folder / "adapter.pth").values())
    assert (
        adapter["metadata"]["base_fingerprint"]
        == base["fingerprint"]
        == merged["metadata"]["base_fingerprint"]
    )
    assert merged["metadata"]["adapter_fingerprint"] == adapter["fingerprint"]


def test_as_a_program(case):
    """No traceback, exit code 2, and none of the trainer's imports."""
    folder = case()
    script = (
        "import sys; from rwkv_miss.__main__ import main; main(); print({'src', 'lightning', 'deepspeed'} &"
        " sys.modules.keys())"
    )
    words = f"merge --base {folder}/base.pth --adapter {folder}/adapter.pth --out {folder}/merged.pth".split()
    options = dict(cwd=ROOT, capture_output=True, text=True)
    run = subprocess.run([sys.executable, "-c", script, *words], **options)
    assert run.returncode == 0 and run.stderr == "" and run.stdout.endswith("\nset()\n"), run.stderr
    run = subprocess.run([sys.executable, "-m", "rwkv_miss", "inspect", folder / "absent.pth"], **options)
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr == f"error: {folder / 'absent.pth'} does not exist\n"


def test_a_real_checkpoint(data_dir, tmp_path):
    """A trained bf16 file: every untouched tensor keeps its bytes."""
    path = data_dir / "real" / "rwkv6-3m-utf16.pth"
    base = read_checkpoint(path)
    linears = [
        name.removesuffix(".weight")
        for name in base
        if re.search(r"att\.(receptance|gate)\.weight|ffn\.value\.weight", name)
    ]
    changes = {f"{name}.miss": 1e-3 * torch.randn(8, base[f"{name}.weight"].shape[0]) for name in linears}
    write_checkpoint(tmp_path / "adapter.pth", changes.items(), facts_of("miss", {"rank": 8}, linears, base))
    report = merge_file(path, tmp_path / "adapter.pth", tmp_path / "merged.pth")
    merged = torch.load(tmp_path / "merged.pth", weights_only=True)
    assert list(merged) == list(base) and report.linears == len(linears) == 36
    for name in base:
        changed = name.removesuffix(".weight") in linears
        assert torch.equal(bits(merged[name]), bits(base[name])) != changed, name


@pytest.mark.parametrize(
    "update, error, text",
    [(1.0, 0.9801, "99 %"), (1.0, 1.0, "100 %"), (1.0, 0.0144, "12 %"), (1.0, 0.000016, "0.4 %")],
)
def test_what_rounding_took_is_said_without_exponents(update, error, text):
    rounding = Rounding([Layer("head", update, error, 9, 0)])
    line, _, row = MergeReport("merged.pth", 1, 0, 0, "bf16", rounding, 0.1, 9).lines()[:3]
    assert line.endswith(f"rounding lost {text} of the update and left 0 % of its entries unchanged")
    assert row.split()[:3] == ["head", *text.split()]
