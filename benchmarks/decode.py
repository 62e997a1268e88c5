"""Measure tokens a second while chatting and while reading a prompt.

In one run: the decoder in fp32, bf16 and int8, the package `rwkv`, and llama.cpp.

    python -m benchmarks.decode [--version 7] [--layers 12] [--width 768] [--threads 1 2] [--prompt 256]
    [--rounds 8] [--miss 64] [--llama FOLDER]

A random model with the World vocabulary's size. One thread is measured in CPU time, more in wall time; rounds
alternate between the contenders and the read bandwidth of the memory, and the fastest counts. Bytes of a
token are those of all weights but the embedding.

KL is that of the next token, from the decoder in fp32 with the same bf16 weights and one token after another.
The first is the mean over 128 tokens that are fed one by one. The second is the mean over the prompts of 16,
32, ..., 128 of these tokens, each read at once, as the timed prompt is.

With --miss RANK also the decoder with a MiSS adapter of that rank beside the bf16 base, and with the same
adapter merged in fp32, from which the KL of the former is.

FOLDER holds llama.cpp's libraries, which `python -m benchmarks.llama` fetches to where they are looked for;
`pip install gguf` writes its files. The last line is JSON.
"""

import argparse
import ctypes
import dataclasses
import functools
import importlib.util
import os
import pathlib
import tempfile

import torch

from rwkv_miss import inject, merge_file, read_checkpoint, save_adapter, write_checkpoint
from rwkv_miss.adapter import adapted_linears
from src import ops
from src.common.device import cpu_features
from src.export import TextSettings, export
from src.inference.adapters import Adapters
from src.inference.cpu_decoder import Decoder
from src.model import RWKV, default_arch
from src.ops import build, toolchain

from . import llama
from .common import add_integers, argument_parser, report, timed

TOKENS = 10  # of a round


def write_base(path, version: int, layers: int, width: int) -> None:
    """A random bf16 checkpoint in which every part of the model shows in the logits."""
    torch.manual_seed(0)
    tensors = {}
    for name, p in RWKV(default_arch(version, layers, width)).state_dict().items():
        noise = torch.randn(p.shape)
        if name == "emb.weight":
            p = noise
        elif p.squeeze().dim() < 2:
            p = p + 0.05 * noise
        elif name.endswith(".weight"):
            p = noise / p.shape[-1] ** 0.5
        else:
            p = p + 0.1 * noise
        tensors[name] = p.bfloat16()
    write_checkpoint(path, tensors.items())


class Ours:
    def __init__(self, path, dtype: torch.dtype, int8: bool = False):
        self.model = RWKV.load(path, dtype, kernel=ops.choose("cpu", "cpu")[0]).eval()
        self.int8, self.decoders = int8, {}
        self.bytes = 0
        for name, p in self.model.named_parameters():
            quantised = int8 and name.endswith(".weight") and p.numel() > 1e5
            if name != "emb.weight":
                self.bytes += p.numel() if quantised else p.nbytes

    def start(self, threads: int) -> None:
        torch.set_num_threads(threads)
        if threads not in self.decoders:
            self.decoders[threads] = Decoder(self.model, int8=self.int8)
        self.decoder, self.state = self.decoders[threads], None

    def feed(self, tokens: list[int]) -> torch.Tensor:
        logits, self.state = self.decoder.next_logits(torch.tensor([tokens]), self.state)
        return logits[0]


class Adapted(Ours):
    """A bf16 base with an adapter beside it, or merged in fp32."""

    def __init__(self, path, adapter, merged: bool):
        super().__init__(path, torch.bfloat16)
        adapters = Adapters(self.model, {"miss": adapter})
        if not merged:
            self.bytes += sum(change.B.nbytes for change in adapters.by_name["miss"].factors.values())
            adapters.use(["miss"])
            return
        merge_file(path, adapter, f"{adapter}.merged", "fp32")
        weights = read_checkpoint(f"{adapter}.merged")
        for name, linear in adapters.linears.items():
            linear.weight = torch.nn.Parameter(weights[f"{name}.weight"].clone(), requires_grad=False)
            self.bytes += linear.weight.numel() * 2


def write_adapter(path, base, rank: int) -> None:
    """A random MiSS adapter of a base."""
    model = RWKV.load(base)
    inject(model, "miss", rank=rank)
    for layer in adapted_linears(model).values():
        torch.nn.init.normal_(layer.miss, std=0.01)
    save_adapter(model, path)


class Package:
    """The package `rwkv`, with TorchScript. It chooses the version by the environment when it is imported."""

    def __init__(self, path, strategy: str, version: int):
        os.environ |= {"RWKV_V7_ON": str(int(version == 7)), "RWKV_JIT_ON": "1", "RWKV_CUDA_ON": "0"}
        from rwkv.model import RWKV as Model

        self.model, self.version = Model(str(path).removesuffix(".pth"), strategy), version

    def start(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self.state = self.model.generate_zero_state() if self.version == 7 else None

    def feed(self, tokens: list[int]) -> torch.Tensor:
        single = len(tokens) == 1 and self.version == 7
        logits, self.state = self.model.forward(tokens[0] if single else tokens, self.state)
        return logits


def native() -> ctypes.CDLL:
    """The library of decode_peers.cpp."""
    source = pathlib.Path(__file__).with_name("decode_peers.cpp")
    command = [toolchain.find_cxx(), "-std=c++17", "-O3", "-march=native", "-fPIC", "-pthread"]
    path = build.build(
        "decode_peers",
        "the decoder's peers",
        3,
        [source],
        build.headers(),
        command,
        ["-pthread"],
        cpu_features(),
    )
    return ctypes.CDLL(str(path))


def one_by_one(contender, ids: list[int]) -> list[torch.Tensor]:
    """Logits after every token."""
    contender.start(1)
    return [contender.feed([token]).float().clone() for token in ids]


def at_once(contender, ids: list[int], lengths: range) -> list[torch.Tensor]:
    """Logits after prompts of these lengths, each read from the beginning in one call."""
    logits = []
    for length in lengths:
        contender.start(1)
        logits.append(contender.feed(ids[:length]).float().clone())
    return logits


def kl(got: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    """Mean divergence of got from exact, in nats, rounded to two digits."""
    got, want = torch.stack(got).log_softmax(-1), torch.stack(exact).log_softmax(-1)
    return float(f"{(want.exp() * (want - got)).sum(-1).mean():.1e}")


def divergences(contender, exact: list[torch.Tensor], ids: list[int]) -> dict[str, float]:
    """Of tokens fed one by one, and of prompts; `exact` are the logits after every token of `ids`."""
    lengths = range(len(ids), 0, -16)
    return {
        "kl": kl(one_by_one(contender, ids), exact),
        "kl_prompt": kl(at_once(contender, ids, lengths), [exact[length - 1] for length in lengths]),
    }


def arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--version", type=int, default=7, choices=(6, 7))
    add_integers(parser, layers=12, width=768)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--prompt", type=int, default=256, help="tokens of the prompt")
    add_integers(parser, rounds=8)
    parser.add_argument(
        "--miss", type=int, help="rank of a MiSS adapter, which is measured beside the base and merged"
    )
    parser.add_argument(
        "--llama",
        default=llama.FOLDER,
        type=pathlib.Path,
        help="folder of llama.cpp's libraries [%(default)s]",
    )
    return parser.parse_args()


def make_contenders(path: pathlib.Path, args) -> dict:
    """All that can run here, on the same weights; what is absent is said."""
    contenders = {
        "ours fp32": Ours(path, torch.float32),
        "ours bf16": Ours(path, torch.bfloat16),
        "ours int8": Ours(path, torch.bfloat16, True),
    }
    if args.miss:
        adapter = str(path.with_name("adapter.pth"))
        write_adapter(adapter, path, args.miss)
        contenders["bf16 + miss"] = Adapted(path, adapter, merged=False)
        contenders["merged fp32"] = Adapted(path, adapter, merged=True)
    if importlib.util.find_spec("rwkv"):
        for kind in ("fp32", "bf16"):
            contenders[f"rwkv {kind}"] = Package(path, f"cpu {kind}", args.version)
    else:
        print("the package rwkv is absent: not measured")
    if args.llama.exists():
        llama_cpp = llama.load_library(args.llama)
        for kind in ("F32", "BF16", "Q8_0"):
            file = str(path.with_name(f"{kind}.gguf"))
            export(path, file, "gguf", kind, settings=TextSettings("none"))
            contenders[f"llama {kind}"] = llama.Llama(llama_cpp, file)
    else:
        print(f"llama.cpp is not measured: {args.llama} is not there; python -m benchmarks.llama fetches it")
    return contenders


def all_divergences(contenders: dict, ids: list[int]) -> dict[str, dict[str, float]]:
    """Of every contender, from the fp32 form of the weights that it has."""
    exact, found = {}, {}
    for name, contender in contenders.items():
        reference = "merged fp32" if isinstance(contender, Adapted) else "ours fp32"
        if reference not in exact:
            exact[reference] = one_by_one(contenders[reference], ids)
        found[name] = divergences(contender, exact[reference], ids)
    return found


class Memory:
    """Reading a large buffer, as a bound for the decoders: they read every weight for every token."""

    def __init__(self):
        self.buffer = torch.ones(300_000_000 // 4)
        self.library = native()

    def read_seconds(self, threads: int) -> float:
        pointer, size = ctypes.c_void_p(self.buffer.data_ptr()), ctypes.c_int64(self.buffer.nbytes)
        return timed(lambda: self.library.read_bytes(pointer, size, ctypes.c_int64(threads)), threads)


def feed_each(contender, tokens: list[int]) -> None:
    for token in tokens:
        contender.feed([token])


@dataclasses.dataclass
class Fastest:
    """Seconds of the fastest round: reading the memory, a token and the prompt of each contender."""

    read: float
    token: dict[str, float]
    prompt: dict[str, float]


def fastest(contenders: dict, memory: Memory, threads: int, prompt: list[int], rounds: int) -> Fastest:
    never = float("inf")
    found = Fastest(never, dict.fromkeys(contenders, never), dict.fromkeys(contenders, never))
    for _ in range(rounds):
        for name, contender in contenders.items():
            found.read = min(found.read, memory.read_seconds(threads))
            contender.start(threads)
            whole = timed(functools.partial(contender.feed, prompt), threads)
            tokens = timed(functools.partial(feed_each, contender, prompt[:TOKENS]), threads)
            found.prompt[name] = min(found.prompt[name], whole)
            found.token[name] = min(found.token[name], tokens / TOKENS)
    return found


def share_of_bandwidth(contender, seconds: float, bandwidth: float) -> float | None:
    """None for a contender that does not tell the bytes of its weights."""
    size = getattr(contender, "bytes", 0)
    return round(size / seconds / bandwidth, 3) if size else None


def show(row: dict) -> None:
    print(
        f"{row['name']:<12} {row['tokens_per_second']:9.1f} {row['of_bandwidth'] or '':>12} "
        f"{row['prompt_tokens_per_second']:9d} {row['kl']:9.1e} {row['kl_prompt']:11.1e}"
    )


def measure(contenders: dict, memory: Memory, args) -> list[dict]:
    prompt = torch.randint(65536, (args.prompt,), generator=torch.Generator().manual_seed(0)).tolist()
    divergence = all_divergences(contenders, prompt[:128])
    rows = []
    for threads in args.threads:
        found = fastest(contenders, memory, threads, prompt, args.rounds)
        bandwidth = memory.buffer.nbytes / found.read
        print(f"\n{threads} threads, read bandwidth {bandwidth / 1e9:.1f} GB/s")
        print(f"{'':<12} {'tokens/s':>9} {'of bandwidth':>12} {'prompt/s':>9} {'KL':>9} {'KL, prompt':>11}")
        for name, contender in contenders.items():
            row = {
                "threads": threads,
                "name": name,
                "tokens_per_second": round(1 / found.token[name], 1),
                "of_bandwidth": share_of_bandwidth(contender, found.token[name], bandwidth),
                "prompt_tokens_per_second": round(args.prompt / found.prompt[name]),
                **divergence[name],
                "read_gb_per_second": round(bandwidth / 1e9, 1),
            }
            rows.append(row)
            show(row)
    return rows


def main() -> None:
    args = arguments()
    memory = Memory()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = pathlib.Path(folder, "base.pth")
        write_base(path, args.version, args.layers, args.width)
        contenders = make_contenders(path, args)
        vocabulary = contenders["ours fp32"].model.arch.vocab_size
        rows = measure(contenders, memory, args)
    report(
        "decode",
        rows=rows,
        version=args.version,
        shapes={"layers": args.layers, "width": args.width, "vocabulary": vocabulary},
        prompt=args.prompt,
        rounds=args.rounds,
    )


if __name__ == "__main__":
    main()
