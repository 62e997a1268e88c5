"""Checkpoint files: what Arch.detect says, what reading refuses, and what a written file promises to every
other reader.
"""

import argparse
import builtins
import collections
import errno
import gc
import io
import os
import pickle
import signal
import stat
import struct
import subprocess
import sys
import weakref
import zipfile

import pytest
import torch

from rwkv_miss.errors import UserError
from rwkv_miss.files import checkpoint as files
from rwkv_miss.files.checkpoint import Arch, check_finite, read_checkpoint, read_metadata, write_checkpoint
from rwkv_miss.files.output import require_writable, write_folder, write_json, write_text
from rwkv_miss.files.safetensors_io import write_safetensors
from src.model import RWKV

from .conftest import ROOT, make_arch, random_tensors

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


def assorted():
    """Every dtype of a checkpoint, and shapes that are easy to get wrong; names out of order on purpose."""
    x = torch.randn(5, 7)
    return {
        "z.last": x,
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 5),
        "transposed": x.t(),
        "strided": x[1:4, ::2],
        "vector": torch.randn(1, 1, 48),
        "int64": torch.arange(9),
        "bool": x > 0,
        "odd": torch.arange(3, dtype=torch.uint8),
        **{str(dtype): x.to(dtype) for dtype in FLOATS},
        "a.first": torch.randn(300, 301),
    }


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def same(got, want):
    assert list(got) == list(want)
    for name in want:
        assert got[name].dtype == want[name].dtype and got[name].shape == want[name].shape, name
        assert torch.equal(bits(got[name]), bits(want[name])), name


def alone(path):
    """Nothing but the file itself is in its folder."""
    return [entry.name for entry in path.parent.iterdir()] == [path.name]


# Arch


def shapes(arch):
    """The names and shapes of a checkpoint, without its values."""
    with torch.device("meta"):
        return dict(RWKV(arch).state_dict())


@pytest.mark.parametrize(
    "sizes", [{}, {"n_layer": 1}, {"n_layer": 11, "head_size": 8}, {"n_embd": 64, "vocab_size": 5}]
)
@pytest.mark.parametrize("version", [6, 7])
def test_detect_reads_every_size_from_the_tensors(version, sizes):
    arch = make_arch(version, **sizes)
    tensors = shapes(arch)
    assert Arch.detect(tensors) == arch
    assert Arch.from_dict(arch.to_dict()) == arch
    # as converters do
    assert (
        Arch.detect({name: t.squeeze() if t.shape[:2] == (1, 1) else t for name, t in tensors.items()})
        == arch
    )


def test_detect_knows_files_without_the_value_residual_of_block_0():
    def detect(n_layer, *prefixes):
        return Arch.detect(
            {n: t for n, t in shapes(make_arch(7, n_layer=n_layer)).items() if not n.startswith(prefixes)}
        )

    first = tuple(f"blocks.0.att.v{i}" for i in range(3))
    rank = detect(2).ranks["v"]
    assert rank > 0 and detect(2).layer0_value_residual
    assert not detect(2, *first).layer0_value_residual and detect(2, *first).ranks["v"] == rank
    assert detect(1, *first).ranks["v"] == 0


def test_the_rank_of_block_1_counts():
    tensors = shapes(make_arch(7))
    tensors["blocks.0.att.v1"] = torch.zeros(48, 3)
    assert Arch.detect(tensors).ranks["v"] == make_arch(7).ranks["v"]


def test_describe():
    arch = Arch(7, 65536, 2048, 24, 32, 64, 2048, 8192, {})
    assert arch.describe() == "RWKV-7, 24 layers, width 2048, 32 heads of 64, ffn 8192, vocabulary 65536"


@pytest.mark.parametrize(
    "version, change, key",
    [
        (6, {"blocks.0.att.time_mix_k": (1, 1, 48)}, "time_mix_k belongs to RWKV-4 or RWKV-5"),
        (6, {"blocks.0.att.gate.weight": None}, "att.gate.weight"),
        (6, {"blocks.0.att.time_faaaa": None}, "time_faaaa"),
        (6, {"blocks.0.att.time_decay_w1": (48,)}, "time_decay_w1"),
        (7, {"blocks.1.ffn.s_emb.weight": (67, 32)}, "blocks.1.ffn.s_emb.weight"),
        (7, {"emb.weight": None}, "emb.weight"),
        (7, {"blocks.0.ffn.key.weight": None}, "blocks.0.ffn.key.weight"),
        (7, {"blocks.0.att.r_k": (48,)}, "blocks.0.att.r_k"),
        (7, {"blocks.0.att.r_k": (2, 16)}, "2 heads of 16"),
    ],
)
def test_detect_names_the_key_that_decides(version, change, key):
    tensors = shapes(make_arch(version))
    for name, shape in change.items():
        if shape is None:
            del tensors[name]
        else:
            tensors[name] = torch.empty(shape)
    with pytest.raises(UserError, match=key.replace(".", r"\.")):
        Arch.detect(tensors)


@pytest.mark.parametrize(
    "names, words",
    [
        (
            ["emb.weight", "blocks.0.att.time_mix_k", "blocks.0.att.time_decay"],
            "blocks.0.att.time_mix_k belongs to RWKV-4 or RWKV-5",
        ),
        (["blocks.0.att.time_mix_g", "blocks.0.att.gate.weight"], "time_mix_g"),
        (["model.layers.0.self_attn.q_proj.weight"], "model.layers.0.self_attn.q_proj.weight"),
        ([], "None"),
    ],
)
def test_detect_refuses_other_models(names, words):
    with pytest.raises(UserError, match=words):
        Arch.detect({name: torch.zeros(4, 4) for name in names})


def test_real_files(data_dir, tmp_path):
    found = {path.stem: path for folder in ("real", "golden") for path in (data_dir / folder).glob("*.pth")}
    assert (
        Arch.detect(read_checkpoint(found["rwkv6-3m-utf16"])).describe()
        == "RWKV-6, 12 layers, width 128, 16 heads of 8, ffn 448, vocabulary 256"
    )
    assert (
        Arch.detect(read_checkpoint(found["rwkv7-reverse"])).describe()
        == "RWKV-7, 4 layers, width 32, 2 heads of 16, ffn 128, vocabulary 12"
    )
    for path in found.values():
        tensors = read_checkpoint(path)
        assert read_metadata(path) is None
        check_finite(tensors)
        write_checkpoint(tmp_path / path.name, tensors.items())
        same(torch.load(tmp_path / path.name, weights_only=True), torch.load(path, weights_only=True))


# promises of a written file


@pytest.mark.parametrize("limit", [None, 500])
def test_a_written_file_is_what_torch_would_have_written(tmp_path, monkeypatch, limit):
    if limit:  # records, offsets and the archive itself take their zip64 forms, as they do from 2 GB on
        monkeypatch.setattr(zipfile, "ZIP64_LIMIT", limit)
    path, tensors, facts = (
        tmp_path / "x.pth",
        assorted(),
        {"format": "test", "text": "Ünïcode", "list": [1, None, 2.5]},
    )
    write_checkpoint(path, iter(tensors.items()), facts)
    for options in ({"mmap": True}, {}, {"mmap": True, "map_location": "cpu"}):
        loaded = torch.load(path, weights_only=True, **options)
        assert type(loaded) is dict
        same(loaded, tensors)
    assert {name: t.shape for name, t in torch.load(path, map_location="meta").items()} == {
        name: t.shape for name, t in tensors.items()
    }
    same(read_checkpoint(path), tensors)
    assert read_metadata(path) == facts
    assert alone(path)


@pytest.mark.parametrize("limit", [None, 500])
def test_records_are_stored_aligned_and_have_real_checksums(tmp_path, monkeypatch, limit):
    if limit:
        monkeypatch.setattr(zipfile, "ZIP64_LIMIT", limit)
    path, tensors = tmp_path / "x.pth", assorted()
    write_checkpoint(path, tensors.items())
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        records = {info.filename: info for info in archive.infolist()}
        assert {"archive/data.pkl", "archive/byteorder", "archive/version"} <= records.keys()
        for number, tensor in enumerate(tensors.values()):
            info = records[f"archive/data/{number}"]
            assert info.compress_type == zipfile.ZIP_STORED and info.file_size == tensor.nbytes
            name, extra = struct.unpack("<26x2H", content[info.header_offset : info.header_offset + 30])
            assert (info.header_offset + 30 + name + extra) % 64 == 0, info.filename
        assert archive.read("archive/byteorder").decode() == sys.byteorder
        flipped = bytearray(content)
        flipped[records["archive/data/0"].header_offset + 150] ^= 1
    with zipfile.ZipFile(io.BytesIO(flipped)) as archive:
        assert archive.testzip() == "archive/data/0"


def test_no_metadata_no_record(tmp_path):
    write_checkpoint(tmp_path / "x.pth", [("a", torch.ones(2))])
    assert read_metadata(tmp_path / "x.pth") is None
    assert files.METADATA not in str(zipfile.ZipFile(tmp_path / "x.pth").namelist())


def test_the_same_tensors_make_the_same_bytes_under_any_name(tmp_path):
    for name in ("one.pth", "another.pth"):
        write_checkpoint(tmp_path / name, [("a", torch.arange(9))], {"b": 1})
    assert (tmp_path / "one.pth").read_bytes() == (tmp_path / "another.pth").read_bytes()


def test_one_tensor_at_a_time(tmp_path):
    alive, most = weakref.WeakSet(), 0

    def items():
        nonlocal most
        for number in range(6):
            gc.collect()
            most = max(most, len(alive))
            tensor = torch.full((1000,), float(number))
            alive.add(tensor)
            yield f"t{number}", tensor
            del tensor

    write_checkpoint(tmp_path / "x.pth", items())
    assert most <= 1


def test_parameters_are_written_as_plain_tensors(tmp_path):
    write_checkpoint(tmp_path / "x.pth", [("a", torch.nn.Parameter(torch.ones(3)))])
    loaded = torch.load(tmp_path / "x.pth", weights_only=True)["a"]
    assert type(loaded) is torch.Tensor and not loaded.requires_grad


def test_a_name_given_twice_is_a_bug(tmp_path):
    with pytest.raises(ValueError, match="a comes twice"):
        write_checkpoint(tmp_path / "x.pth", [("a", torch.ones(1)), ("a", torch.ones(1))])
    assert not list(tmp_path.iterdir())


def test_tensors_mapped_from_the_previous_file_stay_what_they_are(tmp_path):
    """The new file is another file: a running chat keeps the weights it has loaded."""
    write_checkpoint(tmp_path / "x.pth", [("a", torch.zeros(5000))])
    old = read_checkpoint(tmp_path / "x.pth")["a"]
    write_checkpoint(tmp_path / "x.pth", [("a", torch.ones(5000))])
    assert (old == 0).all() and (read_checkpoint(tmp_path / "x.pth")["a"] == 1).all()


@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_checkpoint(path, [("a", torch.ones(1))]),
        lambda path: write_safetensors(path, {"a": torch.ones(1)}, {}),
        lambda path: write_text(path, "a"),
        lambda path: write_folder(path, {"a": lambda path: write_json(path, {})}),
    ],
)
def test_permissions_are_those_of_any_new_file(tmp_path, write):
    before = os.umask(0o027)
    try:
        write(tmp_path / "x")
    finally:
        os.umask(before)
    modes = {
        stat.S_IMODE(path.stat().st_mode)
        for path in ((tmp_path / "x").iterdir() if (tmp_path / "x").is_dir() else [tmp_path / "x"])
    }
    assert modes == {0o640}


def test_what_is_half_written_at_a_sigterm_is_removed(tmp_path, monkeypatch):
    def killed(path):
        write_text(path + "-whole", "a")
        os.kill(os.getpid(), signal.SIGTERM)

    for write in (
        lambda: write_folder(tmp_path / "x", {"a": killed}),
        lambda: write_checkpoint(tmp_path / "x.pth", (killed(str(tmp_path / "b")) for _ in range(1))),
    ):
        with pytest.raises(SystemExit, match="143"):
            write()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    monkeypatch.setattr(os, "replace", lambda *names: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit, match="143"):
        write_text(tmp_path / "without-its-name", "a")
    assert [path.name for path in tmp_path.iterdir()] == ["b-whole"]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "x.pth").symlink_to(tmp_path / "disk" / "real.pth")
    write_checkpoint(tmp_path / "x.pth", [("a", torch.ones(1))])
    assert (tmp_path / "x.pth").is_symlink() and alone(tmp_path / "disk" / "real.pth")


# failures leave what was there


def failing():
    yield "a", torch.ones(1000)
    raise KeyError("from the caller")


@pytest.mark.parametrize("existed", [False, True])
def test_a_failure_leaves_the_previous_file_and_nothing_else(tmp_path, existed):
    path = tmp_path / "x.pth"
    if existed:
        path.write_bytes(b"previous")
    with pytest.raises(KeyError, match="from the caller"):
        write_checkpoint(path, failing())
    assert [entry.read_bytes() for entry in tmp_path.iterdir()] == [b"previous"] * existed


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("when", ["write", "fsync"])
def test_a_full_disk(tmp_path, monkeypatch, code, when):
    path = tmp_path / "x.pth"
    path.write_bytes(b"previous")

    def full(*_):
        raise OSError(code, os.strerror(code))

    if when == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    else:
        monkeypatch.setattr(zipfile._ZipWriteFile, "write", full)
    with pytest.raises(UserError, match=r"x\.pth was not written: .*; [\d,]+ bytes were, [\d,]+ are free"):
        write_checkpoint(path, [("a", torch.ones(10000))])
    assert path.read_bytes() == b"previous" and alone(path)


def test_a_disk_that_fills_up_for_real(tmp_path):
    """The system itself refuses the write, at the limit and inside a buffer."""
    script = """
import pathlib, resource, sys, torch
from rwkv_miss import UserError, write_checkpoint
for limit in (100, 8000, 50_000, 80_500, 81_000):
    path = pathlib.Path(sys.argv[1], f"{limit}.pth")
    path.write_bytes(b"old")
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        write_checkpoint(path, (("t%d" % i, torch.ones(10_000)) for i in range(2)), {"note": "x" * 300})
    except UserError as error:
        print(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
"""
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0 and not run.stderr, run.stderr
    assert len(run.stdout.splitlines()) == 5 and run.stdout.count("File too large") == 5, run.stdout
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted(
        f"{n}.pth" for n in (100, 8000, 50_000, 80_500, 81_000)
    )
    assert all(entry.read_bytes() == b"old" for entry in tmp_path.iterdir())


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    for path, words in [
        (tmp_path, "a folder"),
        ("/dev/null", "no regular file"),
        (tmp_path / "absent" / "x.pth", "absent: No such file"),
        (tmp_path / "file" / "x.pth", "Not a directory"),
    ]:
        with pytest.raises(UserError, match=words):
            require_writable(path)
        with pytest.raises(UserError, match=words):
            write_checkpoint(path, iter([]))
    with pytest.raises(UserError, match=r"needs 1,000,000,000,000,000,000 bytes, [\d,]+ are free"):
        require_writable(tmp_path / "x.pth", 10**18)
    require_writable(tmp_path / "x.pth")
    assert not (tmp_path / "x.pth").exists()


def test_a_folder_without_permission(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="Permission denied"):
        require_writable(tmp_path / "x.pth")


# reading


def test_paths_that_are_no_files(tmp_path):
    (tmp_path / "empty.pth").touch()
    for path, words in [
        (tmp_path / "absent.pth", "absent.pth does not exist"),
        (tmp_path, "Is a directory"),
        (tmp_path / "empty.pth", "is empty"),
    ]:
        for read in (read_checkpoint, read_metadata):
            with pytest.raises(UserError, match=words):
                read(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_files(tmp_path, zipped):
    whole = tmp_path / "whole.pth"
    torch.save({"a": torch.ones(20000), "b": torch.ones(3)}, whole, _use_new_zipfile_serialization=zipped)
    content, cut = whole.read_bytes(), tmp_path / "cut.pth"
    for size in (1, 3, 4, 30, 200, 700, 5000, len(content) // 2, len(content) - 22, len(content) - 1):
        cut.write_bytes(content[:size])
        with pytest.raises(UserError, match="cut.pth is truncated or not a torch checkpoint"):
            read_checkpoint(cut)
    write_checkpoint(whole, [("a", torch.ones(100))], {"x": 1})
    cut.write_bytes(whole.read_bytes()[:-30])
    with pytest.raises(UserError, match="cut.pth is truncated"):
        read_metadata(cut)


def test_files_that_are_something_else(tmp_path):
    path = tmp_path / "x.pth"
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("folder/notes.txt", "hello")
    for content in (
        b"\0" * 500,
        bytes(range(256)) * 4,
        b"PK\3\4" + bytes(500),
        archive.getvalue(),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match="truncated or not a torch checkpoint"):
            read_checkpoint(path)


class Runs:
    """Pickles as a call of a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "save",
    [
        torch.save,
        lambda value, path: torch.save(value, path, _use_new_zipfile_serialization=False),
        lambda value, path: torch.save(value, path, pickle_protocol=4),
        lambda value, path: path.write_bytes(pickle.dumps(value)),
        lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2)),
    ],
    ids=["zip", "legacy", "protocol 4", "bare pickle", "bare pickle 2"],
)
@pytest.mark.parametrize("function", [os.mkdir, builtins.exec, builtins.eval])
def test_code_in_a_file_is_refused_and_does_not_run(tmp_path, recwarn, save, function):
    target = str(tmp_path / "ran")
    argument = target if function is os.mkdir else f"__import__('os').mkdir({target!r})"
    save({"emb.weight": torch.ones(3), "a": Runs(function, argument)}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="evil.pth is refused: its pickle asks for .* could run code"):
        read_checkpoint(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()
    assert not recwarn.list
    if save is torch.save:  # the trap itself works
        torch.load(tmp_path / "evil.pth", weights_only=False)
        assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_plain_tensors_in_a_protocol_that_torch_does_not_read_are_told_so(tmp_path, zipped):
    form = {"pickle_protocol": 4, "_use_new_zipfile_serialization": zipped}
    torch.save({"emb.weight": torch.ones(3)}, tmp_path / "x.pth", **form)
    with pytest.raises(UserError, match="protocol 4, which torch reads only .*, without pickle_protocol"):
        read_checkpoint(tmp_path / "x.pth")
    with pytest.raises(pickle.UnpicklingError):  # where torch reads it, this may, too
        torch.load(tmp_path / "x.pth", weights_only=True)


def test_what_was_asked_for_is_named(tmp_path):
    torch.save({"args": argparse.Namespace(lr=1)}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"argparse\.Namespace"):
        read_checkpoint(tmp_path / "x.pth")


@pytest.mark.parametrize(
    "value, words",
    [
        ([torch.ones(1)], "holds a list, expected a flat dict"),
        (torch.ones(1), "holds a Tensor"),
        ({"state_dict": {"a": torch.ones(1)}}, "holds a dict under 'state_dict'"),
        ({"a": torch.ones(1), "epoch": 3}, "holds a int under 'epoch'"),
        ({1: torch.ones(1)}, "holds a Tensor under 1"),
    ],
)
def test_content_that_is_no_flat_dict_of_tensors(tmp_path, value, words):
    torch.save(value, tmp_path / "x.pth")
    with pytest.raises(UserError, match=words):
        read_checkpoint(tmp_path / "x.pth")


@pytest.mark.parametrize("zipped", [True, False])
def test_other_peoples_files(tmp_path, zipped):
    tensors = collections.OrderedDict(b=torch.nn.Parameter(torch.randn(3)), a=torch.arange(4))
    torch.save(tensors, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    loaded = read_checkpoint(tmp_path / "x.pth")
    assert type(loaded) is dict and not loaded["b"].requires_grad
    same(loaded, {name: t.detach() for name, t in tensors.items()})
    assert read_metadata(tmp_path / "x.pth") is None


# check_finite


@pytest.mark.parametrize(
    "dtype, value",
    [
        (dtype, float(value))
        for dtype in FLOATS
        for value in ("nan", "inf", "-inf")
        if dtype is not torch.float8_e4m3fn or value == "nan"  # float8_e4m3fn has no infinity
    ],
)
def test_check_finite_names_the_tensor(dtype, value):
    bad = torch.zeros(files.PIECE + 5)  # in the last element of the second block
    bad[-1] = value
    good = {"good": torch.full((3, 3), 400.0).to(dtype), "int": torch.arange(3), "empty": torch.zeros(0)}
    check_finite(good)
    with pytest.raises(UserError, match="blocks.1.bad holds NaN or infinite"):
        check_finite({**good, "blocks.1.bad": bad.to(dtype), "later": bad})


@pytest.mark.parametrize("block", [7, 999_999_999])
def test_a_number_of_a_block_beyond_all_others_builds_no_such_model(block):
    tensors = random_tensors(make_arch(7)) | {f"blocks.{block}.att.key.weight": torch.zeros(1)}
    with pytest.raises(UserError, match=f"with block {block}, but block 2 is missing"):
        Arch.detect(tensors)
