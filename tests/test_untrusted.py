"""Files that somebody made with care: bombs, lies about sizes, odd tensors, wrong kinds in metadata. Each
ends in one clear message.
"""

import io
import json
import os
import pickle
import struct
import zipfile

import pytest
import torch

import rwkv_miss
from benchmarks import fuzz, fuzz_files
from rwkv_miss import UserError
from rwkv_miss.adapter_file import ADAPTER_FORMAT, read_adapter
from rwkv_miss.convert.source import open_source
from rwkv_miss.errors import printable
from rwkv_miss.files.checkpoint import Arch, read_checkpoint, read_metadata, write_checkpoint
from rwkv_miss.files.safetensors_io import write_safetensors
from rwkv_miss.files.untrusted import LARGEST_INDEX, LARGEST_JSON, check_sums
from src.data.templates import load_template
from src.data.tokenizer import load_tokenizer
from src.model import RWKV

from .conftest import make_arch, random_tensors

SOUND = {"a": torch.arange(12.0).view(3, 4)}


def rezipped(path, change=lambda name, content: content, method=zipfile.ZIP_STORED):
    """Write the archive anew with other contents of its records, or compressed."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in records.items():
            archive.writestr(name, change(name, content))
    return path


def saved(tmp_path, tensors=SOUND, **options):
    torch.save(tensors, tmp_path / "x.pth", **options)
    return tmp_path / "x.pth"


@pytest.mark.parametrize("read", [read_checkpoint, read_metadata])
def test_compressed_records(tmp_path, read):
    # torch maps them as if they were not, and gives other numbers without a word
    with pytest.raises(UserError, match=r"data\.pkl is compressed.*torch\.save"):
        read(rezipped(saved(tmp_path), method=zipfile.ZIP_DEFLATED))


def test_a_bomb_of_metadata_is_refused_before_it_is_unpacked(tmp_path):
    path = tmp_path / "x.pth"
    write_checkpoint(path, SOUND.items(), {"step": 1})
    bomb = b'{"a": "' + b"0" * (64 * LARGEST_INDEX) + b'"}'
    rezipped(path, lambda name, content: bomb if name.endswith(".json") else content, zipfile.ZIP_DEFLATED)
    assert os.path.getsize(path) < 2**21
    with pytest.raises(UserError, match="is compressed"):
        read_metadata(path)


def test_an_index_beyond_all_reason(tmp_path):
    def large(name, content):
        return content + b"N" * LARGEST_INDEX if name.endswith(".pkl") else content

    with pytest.raises(UserError, match=r"data\.pkl has .* far beyond what an index"):
        read_checkpoint(rezipped(saved(tmp_path), large))


def test_an_index_in_capitals_is_an_index(tmp_path):
    path = saved(tmp_path)
    with zipfile.ZipFile(path, "a") as archive:
        # torch would find it, were the other one not there
        archive.writestr("x/DATA.PKL", b"N" * (LARGEST_INDEX + 1))
    with pytest.raises(UserError, match=r"DATA\.PKL has"):
        read_checkpoint(path)


def test_records_that_lie_over_each_other(tmp_path):
    path = saved(tmp_path, {"a": torch.zeros(1000)})
    content = path.read_bytes()
    end = content.rfind(b"PK\5\6")
    records, size, start = struct.unpack("<HLL", content[end + 10 : end + 20])
    index, more = content[start : start + size], 2
    again = b"PK\1\2" + next(entry for entry in index.split(b"PK\1\2") if b"data/0" in entry)
    again *= more
    path.write_bytes(
        content[:start]
        + index
        + again
        + struct.pack(
            "<4s4HLLH", b"PK\5\6", 0, 0, records + more, records + more, size + len(again), start, 0
        )
    )
    for read in (read_checkpoint, read_metadata, check_sums):
        with pytest.raises(UserError, match="records have more bytes together than the file"):
            read(path)


def calling(module, name, *arguments):
    """A pickle of {"a": module.name(*arguments)}, in torch's protocol; pickle itself looks the function up
    before it writes the name.
    """
    parts = b"".join(pickle.dumps(argument, 2)[2:-1] for argument in arguments)
    return b"\x80\2}X\1\0\0\0a" + f"c{module}\n{name}\n".encode() + b"(" + parts + b"tRs."


def twice(depth):
    """A pickle of {((("x", "x"), ("x", "x")), ...): None}, whose hash takes 2**depth steps."""
    return b"\x80\2}" + b"X\1\0\0\0x" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(depth)) + b"Ns."


def with_pickle(tmp_path, content, zipped):
    saved(tmp_path, _use_new_zipfile_serialization=zipped)
    if zipped:
        return rezipped(tmp_path / "x.pth", lambda name, old: content if name.endswith(".pkl") else old)
    facts = 0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    (tmp_path / "x.pth").write_bytes(b"".join(pickle.dumps(fact, 2) for fact in facts) + content)
    return tmp_path / "x.pth"


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "content,words",
    [
        (calling("builtins", "bytearray", 10**11), r"asks for builtins\.bytearray"),
        (calling("torch", "FloatTensor", 10**11), r"asks for torch\.FloatTensor"),
        (calling("_codecs", "encode", "x", "utf-32"), r"asks for _codecs\.encode"),
        (calling("collections", "Counter", "x"), r"asks for collections\.Counter"),
        (twice(60), "holds a tuple in several places"),
        (
            b"\x80\2}X\1\0\0\0x\x85q\0q\1h\1\x86Ns.",
            "holds a tuple in several places",
        ),  # put into two places, and taken from the second
    ],
    ids=["bytearray", "FloatTensor", "encode", "Counter", "tuples", "tuples, put twice"],
)
def test_what_torch_would_make_of_a_pickle_without_end(tmp_path, zipped, content, words):
    with pytest.raises(UserError, match=f"x.pth is refused: its pickle {words}"):
        read_checkpoint(with_pickle(tmp_path, content, zipped))


def test_a_long_row_of_numbers_is_read_once(tmp_path):
    path = with_pickle(tmp_path, b"\x80\2}X\1\0\0\0a](" + b"K\1" * 10**6 + b"es.", True)
    with fuzz.limit(fuzz_files.SECONDS), pytest.raises(UserError, match="holds a list under 'a'"):
        read_checkpoint(path)


def test_a_block_whose_number_has_thousands_of_digits(tmp_path):
    pytest.importorskip("safetensors", reason="the extra convert is absent: pip install safetensors")
    tensors = random_tensors(make_arch(7)) | {f"blocks.{'1' * 5000}.att.key.weight": torch.ones(2)}
    write_safetensors(tmp_path / "m.safetensors", tensors, {})
    with pytest.raises(UserError, match="m.safetensors"):
        RWKV.load(tmp_path / "m.safetensors")


@pytest.mark.parametrize("protocol", [2, 3])
@pytest.mark.parametrize("zipped", [True, False])
def test_everything_plain_is_read(tmp_path, zipped, protocol):
    module = torch.nn.BatchNorm1d(3)
    tensors = module.state_dict()  # an OrderedDict with versions in addition to its items
    # torch reads no legacy file of fp8
    dtypes = [torch.float64, torch.bfloat16, torch.int16, torch.bool, *[torch.float8_e5m2] * zipped]
    tensors |= {str(dtype): torch.ones(2, 2, dtype=dtype) for dtype in dtypes}
    tensors |= {"p": torch.nn.Parameter(torch.ones(4)), "none": torch.ones(0, 3), "number": torch.tensor(2.0)}
    tensors["p"].note = "attributes come by another function"
    got = read_checkpoint(
        saved(tmp_path, tensors, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    )
    assert all(
        torch.equal(got[name].double(), t.double()) and got[name].dtype == t.dtype
        for name, t in tensors.items()
    )
    assert len(got) == len(tensors)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "tensor,words",
    [
        (torch.zeros(1).expand(10**6, 10**6), r": t claims \(1000000, 1000000\)"),
        (torch.eye(3).to_sparse(), r" is refused: its pickle asks for torch\._utils\._rebuild_sparse_tensor"),
        (
            torch.zeros(3, device="meta"),
            r" is refused: its pickle asks for torch\._utils\._rebuild_meta_tensor_no_storage",
        ),
        (torch.zeros(3, dtype=torch.complex64), ": t is no plain tensor"),
    ],
    ids=["expanded", "sparse", "meta", "complex"],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_are_no_plain_numbers(tmp_path, zipped, tensor, words):
    with pytest.raises(UserError, match=f"x.pth{words}"):
        read_checkpoint(saved(tmp_path, {"t": tensor}, _use_new_zipfile_serialization=zipped))


def test_views_and_tied_tensors_are_plain(tmp_path):
    whole = torch.arange(12.0)
    tensors = {"a": whole, "b": whole, "c": whole.view(3, 4).t(), "d": whole[3:]}
    got = read_checkpoint(saved(tmp_path, tensors))
    assert got.keys() == tensors.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in tensors.items())


def test_one_storage_under_thousands_of_names(tmp_path):
    whole = torch.zeros(1 << 16)
    with pytest.raises(UserError, match="claims tensors of 524,288,000"):
        read_checkpoint(saved(tmp_path, {f"t{i}": whole for i in range(2000)}))


def test_a_changed_byte_is_found_by_the_checksum(tmp_path):
    path = saved(tmp_path)
    check_sums(path)
    content = bytearray(path.read_bytes())
    content[content.index(struct.pack("<f", 5.0))] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="is damaged.*copy it again"):
        check_sums(path)


def test_a_changed_byte_of_an_adapter_is_found_whenever_it_is_read(tmp_path):
    write_checkpoint(tmp_path / "a.pth", SOUND.items(), METADATA)
    content = bytearray((tmp_path / "a.pth").read_bytes())
    content[content.index(struct.pack("<f", 5.0))] ^= 1
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(UserError, match="a.pth is damaged.*copy it again"):
        read_adapter(tmp_path / "a.pth")


@pytest.mark.parametrize("content", [b"[" * 100_000, b"[1]", b"\xff", b'{"a": 1'])
def test_json_that_is_none(tmp_path, content):
    path = tmp_path / "x.pth"
    write_checkpoint(path, SOUND.items(), {"step": 1})
    with pytest.raises(UserError, match="JSON"):
        read_metadata(rezipped(path, lambda name, old: content if name.endswith(".json") else old))


METADATA = dict(
    format=ADAPTER_FORMAT, format_version=1, method="miss", options={"rank": 3}, linears=["blocks.0.att.key"]
)


def test_an_adapter_of_the_fewest_words_is_read(tmp_path):
    write_checkpoint(tmp_path / "a.pth", SOUND.items(), METADATA)
    assert read_adapter(tmp_path / "a.pth")[1]["train_parts"] == []


@pytest.mark.parametrize(
    "name,wanted", [("targets", []), ("train_parts", []), ("versions", {}), ("base", None), ("arch", None)]
)
def test_nothing_in_a_field_is_as_if_it_were_absent(tmp_path, name, wanted):
    write_checkpoint(tmp_path / "a.pth", SOUND.items(), {**METADATA, name: None})
    assert read_adapter(tmp_path / "a.pth")[1][name] == wanted


@pytest.mark.parametrize(
    "name,value",
    [
        ("method", 5),
        ("method", None),
        ("method", "no such"),
        ("options", []),
        ("options", None),
        ("linears", "att"),
        ("linears", [1]),
        ("targets", 3),
        ("train_parts", {"a": 1}),
        ("arch", [1]),
        ("base", 4),
        ("base_fingerprint", 4),
        ("versions", "x"),
        ("tokenizer", ["/dev/zero"]),
        ("template", 7),
        ("tokens", [7, "x"]),
        ("format_version", 4),
        ("format_version", "x"),
    ],
)
def test_metadata_of_another_kind(tmp_path, name, value):
    write_checkpoint(tmp_path / "a.pth", SOUND.items(), {**METADATA, name: value})
    with pytest.raises(UserError, match=f"a.pth (is damaged: its {name}|has {name}|was made with {name})"):
        read_adapter(tmp_path / "a.pth")


@pytest.mark.parametrize("tokens", [[66, 65], [65, 65], [-1, 65]])
def test_ids_of_tokens_that_no_run_writes(tmp_path, tokens):
    """Their rows would be added to others than a run has trained, or to none."""
    write_checkpoint(tmp_path / "a.pth", SOUND.items(), {**METADATA, "tokens": tokens})
    with pytest.raises(UserError, match="a.pth is damaged: its tokens are .* each once, in their order"):
        read_adapter(tmp_path / "a.pth")


@pytest.mark.parametrize(
    "change",
    [
        {"n_layer": "3"},
        {"n_layer": True},
        {"more": 1},
        {"ranks": {"w": "x"}},
        {"ranks": None},
        {"initial_state": 1},
        {"n_embd": None},
    ],
)
def test_sizes_of_another_kind(change):
    sound = make_arch(7).to_dict()
    assert Arch.from_dict(sound) == make_arch(7)
    with pytest.raises(UserError, match="expected are the fields version"):
        Arch.from_dict({**sound, **change})
    with pytest.raises(UserError, match="expected are the fields version"):
        Arch.from_dict(
            {name: value for name, value in sound.items() if name not in change or name == "more"}
            | {"more": 1}
        )


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", ""])
def test_pipes_and_devices_in_the_place_of_files(tmp_path, name):
    """Opening a pipe waits for ever, and /dev/zero never ends."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text("{}")
    (tmp_path / "a" / "adapter_model.safetensors").write_text("{}")
    place = tmp_path / "a" / name if name else tmp_path / "b"
    place.unlink(missing_ok=True)
    for make in (os.mkfifo, lambda place: os.symlink("/dev/zero", place)):
        make(place)
        with pytest.raises(UserError, match=f"{place.name} is no regular file"):
            open_source(place if place.name == "b" else tmp_path / "a")
        place.unlink()


def test_a_configuration_and_a_header_beyond_all_reason(tmp_path):
    (tmp_path / "adapter_config.json").write_bytes(b" " * LARGEST_JSON + b"{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match=r"adapter_config.json has 16,777,218 bytes, far beyond"):
        open_source(tmp_path)
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", LARGEST_JSON + 1) + b"{" + b" " * LARGEST_JSON)
    with pytest.raises(UserError, match="has a header of 16,777,217 bytes"):
        open_source(tmp_path / "m.safetensors")


@pytest.mark.parametrize("path", ["/dev/zero", "/", "\0"])
def test_a_recorded_path_that_is_no_small_file(tmp_path, path):
    with pytest.raises(UserError, match="cannot read"):
        load_tokenizer(path, 256)
    with pytest.raises(UserError, match="cannot read"):
        load_template(path, "")
    with open(tmp_path / "large", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match="it has 1,099,511,627,776 bytes"):
        load_tokenizer(str(tmp_path / "large"), 256)


def test_control_characters_do_not_reach_the_terminal(tmp_path, capsys):
    assert printable("a\x1b[2J\nb\u202e") == r"a\x1b[2J b\u202e" and printable("é 中 ok") == "é 中 ok"
    from rwkv_miss.__main__ import main

    write_checkpoint(tmp_path / "a.pth", SOUND.items(), {**METADATA, "base": "\x1b]0;title\x07"})
    main(["inspect", str(tmp_path / "a.pth")])
    assert "\x1b" not in capsys.readouterr().out
    torch.save({"\x1b[31m": torch.zeros(2, dtype=torch.complex64)}, tmp_path / "b.pth")
    with pytest.raises(SystemExit):
        main(["inspect", str(tmp_path / "b.pth")])
    err = capsys.readouterr().err
    assert "\x1b" not in err and r"\x1b[31m is no plain tensor" in err


class Code:
    def __reduce__(self):
        return os.system, ("echo executed > executed",)


@pytest.mark.parametrize(
    "nested", [lambda code: {"a": code}, lambda code: {"a": torch.zeros(2), "b": [code]}, lambda code: code]
)
def test_code_among_tensors(tmp_path, monkeypatch, nested):
    monkeypatch.chdir(tmp_path)
    torch.save(nested(Code()), "x.pth")
    for read in (rwkv_miss.read_checkpoint, read_adapter):
        with pytest.raises(UserError, match="could run code"):
            read("x.pth")
    assert not os.path.exists("executed")


def test_a_pickle_alone_is_no_checkpoint(tmp_path):
    (tmp_path / "x.pth").write_bytes(pickle.dumps({"a": io.BytesIO(json.dumps({}).encode())}))
    with pytest.raises(UserError, match="is refused: its pickle asks for"):
        read_checkpoint(tmp_path / "x.pth")
