"""Damage model and adapter files of every kind at random, and read them.

Reading must give a result or one clear message, in little memory and time.

    python -m benchmarks.fuzz_files [--inputs 5000] [--seed 0] [--readers NAME ...]

An input is a valid file or folder, damaged one to four times: bytes changed, cut out, doubled; records of an
archive dropped, exchanged, compressed, blown up; values in JSON and in headers replaced by odd ones; tensors
with other shapes, dtypes, names, or with NaN. Each reader gets the same number of inputs. A reader's memory
is the highest rise of RssAnon above its start over all inputs. The last line is JSON. An input that fails is
kept, and its number and seed are printed.
"""

import collections
import copy
import dataclasses
import io
import json
import pathlib
import random
import shutil
import struct
import tempfile
import time
import zipfile
from collections.abc import Callable
from typing import Any

import torch

import rwkv_miss
from rwkv_miss import UserError, convert
from rwkv_miss.files.checkpoint import METADATA, read_metadata, write_checkpoint
from rwkv_miss.merging.diff import diff_files
from rwkv_miss.merging.unmerge import check_merge
from src.chat.conversation_file import load_chat, save_chat
from src.export import TextSettings, export
from src.inference.adapters import Adapters
from src.inference.conversation import Conversation
from src.inference.engine import Engine
from src.inference.load import load_with
from src.inference.sampling import Sampling
from src.inference.torch_decoder import TorchDecoder
from src.model import RWKV, default_arch, read_model_file

from . import fuzz
from .common import add_integers, argument_parser, peak_above_start, report

Files = dict[str, bytes]
SECONDS = 10
MEGABYTES = 256  # allowed rise of RssAnon, with libraries loaded late and the allocator's reserve
ODD = [
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**63,
    1e308,
    float("nan"),
    "",
    "x",
    "\x00",
    "../../etc/passwd",
    "/dev/zero",
    [],
    {},
    [[]],
    [None],
    {"a": 1},
    "9" * 400,
    [0, 10**12],
    "blocks.0.att.key",
    "miss",
    "bat",
    "F8_E4M3",
    "__reduce__",
]


@dataclasses.dataclass(frozen=True)
class Reader:
    """Reader of a kind of files: make(folder) writes valid files, use(folder) reads them as a user's command
    does. `sealed`: files that are not to be damaged.
    """

    make: Callable[[pathlib.Path], None]
    use: Callable[[pathlib.Path], Any]
    sealed: tuple[str, ...] = ()


def small_model(vocab_size: int = 19) -> RWKV:
    torch.manual_seed(0)
    model = RWKV(default_arch(7, 2, 16, vocab_size, 8))
    for p in model.parameters():
        p.data = torch.randn(p.shape)
    return model


def write_base(folder: pathlib.Path, vocab_size: int = 19) -> None:
    write_checkpoint(
        folder / "base.pth",
        ((name, p.bfloat16()) for name, p in small_model(vocab_size).state_dict().items()),
    )


def write_adapter(path: pathlib.Path, method: str = "miss", parts: str = "", **options) -> None:
    model = small_model()
    rwkv_miss.inject(model, method, ["att.key", "ffn.value"], parts, **options)
    for p in model.parameters():
        if p.requires_grad:
            p.data.normal_()
    rwkv_miss.save_adapter(model, path, tokenizer="bytes", eod="", template="rwkv:hermes", step=3)


def write_state(path: pathlib.Path) -> None:
    write_checkpoint(path, {f"blocks.{i}.att.time_state": torch.randn(2, 8, 8) for i in range(2)}.items())


def merge(folder: pathlib.Path) -> None:
    rwkv_miss.merge_file(folder / "base.pth", folder / "adapter.pth", folder / "out.pth")


def load(folder: pathlib.Path) -> None:
    rwkv_miss.load_adapter(RWKV.load(folder / "base.pth", torch.float32), folder / "adapter.pth")


def make_merge(*adapter, **options):
    def make(folder: pathlib.Path) -> None:
        write_base(folder)
        write_adapter(folder / "adapter.pth", *adapter, **options)

    return make


def to_native(name: str, origin: str = ""):
    return lambda folder: convert.convert(folder / name, folder / "out.pth", "native", convert.Hints(origin))


def converted(to: str, method: str, origin: str = "", **options) -> Reader:
    """Make the reader of a format that convert() writes."""

    def make(folder: pathlib.Path) -> None:
        write_adapter(folder / "native.pth", method, **options)
        convert.convert(folder / "native.pth", folder / "sound", to)
        (folder / "native.pth").unlink()

    return Reader(make, to_native("sound", origin))


def package(embedded: bool) -> Reader:
    """Make the reader of rwkv_lightning's packages: a folder, or one file with the manifest inside."""

    def make(folder: pathlib.Path) -> None:
        make_merge(rank=4)(folder)
        convert.convert(
            folder / "adapter.pth",
            folder / "sound",
            "rwkv-lightning",
            convert.Hints(base=str(folder / "base.pth")),
        )
        (folder / "adapter.pth").unlink()
        if embedded:
            with zipfile.ZipFile(folder / "sound" / "adapter.pth", "a") as archive:
                archive.writestr("archive/miss.json", (folder / "sound" / "adapter.json").read_text())
            (folder / "sound" / "adapter.pth").rename(folder / "sound.pth")
            shutil.rmtree(folder / "sound")

    return Reader(make, to_native("sound.pth" if embedded else "sound"), ("base.pth",))


def written(to: str, method: str) -> Reader:
    """Make the writer of a format, for a native file that was converted from this format."""

    def make(folder: pathlib.Path) -> None:
        make_merge(method, rank=4)(folder)
        hints = convert.Hints(base=str(folder / "base.pth"))
        convert.convert(folder / "adapter.pth", folder / "there", to, hints)
        (folder / "adapter.pth").unlink()
        convert.convert(folder / "there", folder / "native.pth", "native", hints)
        shutil.rmtree(folder / "there")

    return Reader(
        make, lambda folder: convert.convert(folder / "native.pth", folder / "out", to), ("base.pth",)
    )


def exported(to: str, **named) -> Reader:
    """Make the reader that turns another form of a model back into a checkpoint."""

    def make(folder: pathlib.Path) -> None:
        sizes = default_arch(7, 2, 64, 67, 64)
        torch.manual_seed(0)
        write_checkpoint(
            folder / "base.pth",
            ((name, torch.randn(p.shape).bfloat16()) for name, p in RWKV(sizes).state_dict().items()),
        )
        export(folder / "base.pth", folder / "sound", to, **named)
        (folder / "base.pth").unlink()

    return Reader(make, lambda folder: export(folder / "sound", folder / "out.pth", "pth"))


def make_trainers_file(folder: pathlib.Path) -> None:
    """Write a base as a trainer saves it."""
    write_base(folder)
    tensors = rwkv_miss.read_checkpoint(folder / "base.pth")
    extra = {"epoch": 3, "optimizer_states": [{"state": {0: {"step": torch.ones(1)}}, "betas": (0.9, 0.99)}]}
    whole = {**extra, "state_dict": {f"_forward_module.{name}": tensor for name, tensor in tensors.items()}}
    torch.save(whole, folder / "base.pth")


def chat(folder: pathlib.Path) -> tuple[Conversation, Adapters]:
    adapters, tokenizer = load_with(folder / "base.pth", {}, "bytes", accelerator="cpu", wkv="torch")
    engine = Engine(TorchDecoder(adapters.model, 1, adapters), tokenizer)
    return Conversation(engine, Sampling(temperature=0)), adapters


def make_chat(folder: pathlib.Path) -> None:
    write_base(folder, 256)
    conversation, adapters = chat(folder)
    list(conversation.answer("hello", 4))
    save_chat(conversation, adapters, folder / "chat.pth")


def make_diff(folder: pathlib.Path) -> None:
    make_merge(rank=4)(folder)
    rwkv_miss.merge_file(folder / "base.pth", folder / "adapter.pth", folder / "merged.pth")
    (folder / "adapter.pth").unlink()


def beside_base(folder: pathlib.Path) -> None:
    Adapters(RWKV.load(folder / "base.pth", torch.float32), {"a": folder / "adapter.pth"}).use(["a"], 0.5)


READERS: dict[str, Reader] = {
    "base": Reader(write_base, lambda folder: RWKV.load(folder / "base.pth", torch.float32)),
    "base, a trainer's file": Reader(
        make_trainers_file, lambda folder: RWKV.load(folder / "base.pth", torch.float32)
    ),
    "base, a folder": Reader(
        exported("hf", settings=TextSettings("none")).make,
        lambda folder: RWKV.load(folder / "sound", torch.float32),
    ),
    "base of a merge": Reader(make_merge(rank=4), merge, ("adapter.pth",)),
    "MiSS": Reader(make_merge("miss", "ln,time", rank=4), merge, ("base.pth",)),
    "MiSS, loaded": Reader(make_merge("miss", "ln,time", rank=4), load, ("base.pth",)),
    "MiSS, in a chat": Reader(make_merge("miss", "ln,time", rank=4), beside_base, ("base.pth",)),
    "chat": Reader(make_chat, lambda folder: load_chat(*chat(folder), folder / "chat.pth"), ("base.pth",)),
    "unmerge": Reader(
        make_merge(rank=4),
        lambda folder: check_merge(folder / "base.pth", folder / "base.pth", [folder / "adapter.pth"]),
    ),
    "diff": Reader(
        make_diff,
        lambda folder: diff_files(folder / "base.pth", folder / "merged.pth", folder / "out.pth", 4),
    ),
    "PiSSA": Reader(make_merge("pissa", rank=4), merge, ("base.pth",)),
    "MoS": Reader(make_merge("mos", rank=4), merge, ("base.pth",)),
    "VeRA": Reader(make_merge("vera", rank=4), merge, ("base.pth",)),
    "metadata": Reader(
        write_base, lambda folder: (read_model_file(folder / "base.pth"), read_metadata(folder / "base.pth"))
    ),
    "peft, MiSS": converted("peft", "miss", rank=4),
    "peft, Bat": converted("peft", "bat", rank=4),
    "peft, DoRA": converted("peft", "dora", rank=4),
    "rwkv-peft, MiSS": converted("rwkv-peft", "miss", rank=4),
    "rwkv-peft, Bat": converted("rwkv-peft", "bat", "rwkv-peft", rank=4, order="row"),
    "safetensors": converted("safetensors", "miss", rank=4),
    "peft, LoRA": converted("peft", "lora", rank=4, rank_map={"ffn": 3}, alpha_map={"key": 5.5}),
    "peft, VeRA": converted("peft", "vera", rank=4),
    "to peft": written("peft", "miss"),
    "to lora": written("lora", "pissa"),
    "to rwkv-lightning": written("rwkv-lightning", "miss"),
    "rwkv-lightning": package(False),
    "rwkv-lightning, file": package(True),
    "model, safetensors": exported("safetensors"),
    "model, GGUF": exported("gguf", settings=TextSettings("none")),
    "model, HF": exported("hf", settings=TextSettings("none")),
    "model, HF, fla": exported("hf", settings=TextSettings("none"), layout="fla"),
    "states": Reader(lambda folder: write_state(folder / "s.pth"), to_native("s.pth")),
}


# damage


def damaged(files: Files, others: list[bytes], rng: random.Random) -> Files:
    """Make one random change of one of the files."""
    files = dict(files)
    name = rng.choice(list(files))
    content = files[name]
    if content[:4] == b"PK\x03\x04" and rng.random() < 0.7:
        content = damaged_archive(content, rng)
    elif content[8:9] == b"{" and rng.random() < 0.7:
        content = damaged_safetensors(content, rng)
    elif content[:1] == b"{" and rng.random() < 0.7:
        content = damaged_json(content, rng)
    elif rng.random() < 0.5:  # near the beginning, where headers are
        content = fuzz.mutate(content[:512], others, rng) + content[512:]
    else:
        content = fuzz.mutate(content, others, rng)
    files[name] = content
    if len(files) > 1 and rng.random() < 0.02:
        del files[name]
    return files


def damaged_json(content: bytes, rng: random.Random) -> bytes:
    """Drop one value somewhere in a JSON object, or replace it by an odd one."""
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        return content
    return json.dumps(_exchanged(values, rng)).encode()


def _exchanged(values: Any, rng: random.Random) -> Any:
    values = copy.deepcopy(values)
    owner, place = None, None
    here = values
    while isinstance(here, (dict, list)) and here and (owner is None or rng.random() < 0.8):
        owner, place = here, rng.choice(list(here) if isinstance(here, dict) else range(len(here)))
        here = here[place]
    if owner is None:
        return rng.choice(ODD)
    kind = rng.randrange(5)
    if kind == 0:
        del owner[place]
    elif kind == 1 and isinstance(owner, dict):
        owner[rng.choice(["x", "", str(place) + "_", *map(str, owner)])] = owner.pop(place)
    elif kind == 2 and isinstance(here, int):
        owner[place] = here + rng.choice([-1, 1, 8, -here, here, 10**6, -(10**6)])
    else:
        owner[place] = rng.choice(ODD)
    return values


def damaged_safetensors(content: bytes, rng: random.Random) -> bytes:
    length = struct.unpack("<Q", content[:8])[0]
    header, data = content[8 : 8 + length], content[8 + length :]
    header = damaged_json(header, rng)
    return struct.pack("<Q", len(header) + rng.choice([0, 0, 0, 0, 1, -1, 2**40])) + header + data


def damaged_archive(content: bytes, rng: random.Random) -> bytes:
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            records = {name: archive.read(name) for name in archive.namelist()}
    except Exception:  # damaged before
        return content
    kind, method = rng.randrange(8), zipfile.ZIP_STORED
    name = rng.choice(list(records))
    index = next((name for name in records if name.endswith("data.pkl")), name)
    record = next((name for name in records if name.endswith(METADATA)), name)
    if kind == 0:
        return damaged_tensors(content, rng)
    if kind == 1:
        records[index] = fuzz.mutate(records[index], list(records.values()), rng)
    elif kind == 2:
        records[record] = damaged_json(records[record], rng)
    elif kind == 3:
        del records[name]
    elif kind == 4:
        records[name] = records[rng.choice(list(records))]
    elif kind == 5:
        method = zipfile.ZIP_DEFLATED
        records[name] = rng.choice([records[name], b"\0" * (1 << 24)])
    elif kind == 6:
        records[name] = records[name][: rng.randrange(len(records[name]) + 1)]
    else:
        records[name] = fuzz.mutate(records[name], list(records.values()), rng)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    return out.getvalue()


def damaged_tensors(content: bytes, rng: random.Random) -> bytes:
    """Write the same checkpoint as a valid file, with one tensor that does not fit."""
    try:
        tensors = torch.load(io.BytesIO(content), weights_only=True)
        name = rng.choice(sorted(tensors))
        tensor = tensors[name].detach()
    except Exception:  # damaged before
        return content
    kind = rng.randrange(9)
    if kind == 0:
        del tensors[name]
    elif kind == 1:
        tensors[rng.choice(["x", name + "x", name.replace("0", "7"), "shared." + name, ""])] = tensors.pop(
            name
        )
    elif kind == 2:
        tensors[name] = tensor.reshape(-1)
    elif kind == 3:
        tensors[name] = tensor.t().contiguous() if tensor.dim() == 2 else tensor[None]
    elif kind == 4:
        tensors[name] = tensor.to(
            rng.choice(
                [torch.float64, torch.float16, torch.int64, torch.bool, torch.float8_e4m3fn, torch.uint8]
            )
        )
    elif kind == 5:
        tensors[name] = (
            torch.full_like(tensor, rng.choice([float("nan"), float("inf"), 6e4]))
            if tensor.is_floating_point()
            else tensor
        )
    elif kind == 6:
        tensors[name] = tensor[: rng.randrange(len(tensor) + 1)] if tensor.dim() else tensor
    elif kind == 7:
        tensors[name] = tensors[rng.choice(list(tensors))]
    else:
        tensors[name] = tensor.new_zeros(rng.choice([(0,), (), (1, 1, 1, 1, 1), (0, 7), (1,)]))
    out = io.BytesIO()
    torch.save(
        {name: value.detach() for name, value in tensors.items() if isinstance(value, torch.Tensor)}, out
    )
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "a") as archive:
        for record in old.namelist():
            if record.endswith(METADATA):
                archive.writestr(f"{archive.namelist()[0].partition('/')[0]}/{METADATA}", old.read(record))
    return out.getvalue()


# reading


def read_files(folder: pathlib.Path) -> Files:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def write_files(folder: pathlib.Path, files: Files) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    folder.mkdir(exist_ok=True)


def fuzz_reader(name: str, folder: pathlib.Path, seed: int, numbers: range) -> collections.Counter:
    """Count how the inputs with these numbers ended: "result" | "message" -> inputs. Raises AssertionError
    for any other end, an executed pickle, a changed input, and a half-written file.
    """
    reader, here = READERS[name], folder / "input"
    write_files(here, {})
    torch.manual_seed(0)
    reader.make(here)
    sound = read_files(here)
    reader.use(here)  # undamaged files must be readable
    sealed = {name: content for name, content in sound.items() if name in reader.sealed}
    ends: collections.Counter = collections.Counter()
    for number in numbers:
        rng = random.Random(f"{seed} {name} {number}")
        files = {name: content for name, content in sound.items() if name not in sealed}
        for _ in range(rng.choice([1, 1, 1, 2, 4])):
            files = damaged(files, list(sound.values()), rng)
        write_files(here, {**sealed, **files})
        try:
            with fuzz.limit(SECONDS):
                reader.use(here)
            ends["result"] += 1
        except UserError as error:
            assert len(str(error)) > 10, f"input {number} of seed {seed}, {name}: {error}"
            left = [
                path.name
                for path in here.rglob("*")
                if path.name.startswith("out") or path.name.endswith(".tmp")
            ]
            assert not left, f"input {number} of seed {seed}, {name}: {left} was left by a refused input"
            ends["message"] += 1
        except BaseException as error:
            raise AssertionError(
                f"input {number} of seed {seed}, {name}: {type(error).__name__}: {error}; kept: {here}"
            ) from error
    return ends


def main() -> None:
    parser = argument_parser(__doc__)
    add_integers(parser, inputs=5000, seed=0)
    parser.add_argument("--readers", nargs="+", default=list(READERS), choices=list(READERS))
    args = parser.parse_args()
    figures = {}
    folder = pathlib.Path(tempfile.mkdtemp(prefix="fuzz-"))
    for name in args.readers:
        ends: collections.Counter = collections.Counter()
        start = time.perf_counter()
        peak = peak_above_start(lambda: ends.update(fuzz_reader(name, folder, args.seed, range(args.inputs))))  # noqa: B023
        seconds = time.perf_counter() - start
        print(
            f"{name:<20}{ends['result']:6} results {ends['message']:6} messages {seconds:7.1f} s,"
            f" {peak / 1e6:5.0f} MB",
            flush=True,
        )
        assert peak < MEGABYTES * 1e6, f"{name}: {peak:,} bytes above the start"
        figures[name] = {**ends, "seconds": round(seconds, 1), "peak_mb": round(peak / 1e6)}
    shutil.rmtree(folder)
    print(f"{args.inputs} inputs a reader: no crash, no hang, no file left half-written")
    report("fuzz_files", inputs=args.inputs, seed=args.seed, readers=figures)


if __name__ == "__main__":
    main()
