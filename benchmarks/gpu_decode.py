"""Measure tokens a second of answers on a GPU, of one row and of many, with unmerged adapters.

    python -m benchmarks.gpu_decode [--version 7] [--layers 24] [--width 2048] [--rank 64] [--prompt 1024]
    [--tokens 64] [--rounds 5] [--rows 1 8 32] [--device cuda] [--dtype auto]

The base is random, with the World vocabulary's size. It is measured alone, with MiSS, with LoRA of half the
rank, with rows that have one of two MiSS and two LoRA adapters ("mixed"), and with peft's LoRA. A token of
all rows is recorded as one CUDA graph where that works, and is also measured without a graph; peft's only
without. The fastest round counts. The share is the bytes of all weights but the embedding over a token's
time, divided by the bandwidth that a copy of the head reaches. The last line is JSON.
"""

import argparse
import pathlib
import tempfile
from typing import Any, NamedTuple

import torch

from src import ops
from src.common.device import PRECISIONS
from src.inference.adapters import BASE, Adapters, Applied
from src.inference.decoders import fastest
from src.inference.torch_decoder import TorchDecoder
from src.model import RWKV

from .common import add_integers, argument_parser, precision_on, report, report_so_far, timed
from .decode_contenders import write_adapter, write_base
from .step import add_peft

# adapters of the rows of "mixed", in turns
OF_MIXED = [("miss",), ("lora",), ("miss2",), ("lora2",)]


def load(base, args) -> RWKV:
    kernel, _ = ops.choose("auto", args.device)
    return RWKV.load(base, PRECISIONS[args.dtype], args.device, kernel).eval()


class Contender(NamedTuple):
    name: str
    decoder: Any
    applied: list[Applied]  # each row's adapters


def contenders(folder: pathlib.Path, args):
    """Yield one contender after another."""
    base = folder / "base.pth"
    write_base(base, args.version, args.layers, args.width)
    files = {name: folder / name for name in ("miss", "miss2", "lora", "lora2")}
    for name, path in files.items():
        method = name.removesuffix("2")
        write_adapter(path, base, args.rank if method == "miss" else args.rank // 2, method)
    adapters = Adapters(load(base, args), files)
    for name, of_rows in {"base": [()], "miss": [("miss",)], "lora": [("lora",)], "mixed": OF_MIXED}.items():
        for rows in args.rows:
            applied = [Applied(of_rows[row % len(of_rows)]) for row in range(rows)]
            decoder, how = fastest(adapters.model, adapters, rows)
            if type(decoder) is not TorchDecoder:
                yield Contender(f"{name}, {how}", decoder, applied)
            decoder.close()
            yield Contender(f"{name}, launches", TorchDecoder(adapters.model, rows, adapters), applied)
    model = load(base, args)
    add_peft(model, "peft lora", args.rank)
    model.to(args.device)
    for rows in args.rows:
        yield Contender("peft lora, launches", TorchDecoder(model, rows), [BASE] * rows)


def measure(contender: Contender, prompt: torch.Tensor, tokens: int, rounds: int) -> tuple[float, float]:
    """Measure seconds of the fastest round: for a token of all rows, and for reading the prompt of one
    row."""
    _, decoder, applied = contender
    device, found = prompt.device.type, []
    for _ in range(rounds + 1):
        whole = timed(lambda: decoder.read(prompt, None, applied[0]), device=device)
        _, state = decoder.read(prompt, None, applied[0])
        for row in range(len(applied)):
            decoder.put(row, state)

        def answer() -> None:
            for token in range(tokens):
                decoder.step([token] * len(applied), applied)

        found.append((timed(answer, device=device) / tokens, whole))
    one, whole = zip(*found[1:])
    return min(one), min(whole)


def bandwidth(weight: torch.Tensor, rounds: int) -> float:
    """Measure bytes a second, read and written, of copies of a tensor."""
    other = torch.empty_like(weight)
    return (
        2
        * weight.nbytes
        / min(timed(lambda: other.copy_(weight), device=weight.device.type) for _ in range(rounds))
    )


def arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--version", type=int, default=7, choices=(6, 7))
    add_integers(parser, layers=24, width=2048, rank=64, prompt=1024, tokens=64, rounds=5)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32], help="answers at once")
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="auto", choices=["auto", *PRECISIONS])
    args = parser.parse_args()
    args.dtype = precision_on(args.device, args.dtype)
    return args


@torch.no_grad()
def main() -> None:
    args = arguments()
    rows = []
    settings = {key: getattr(args, key) for key in ("version", "layers", "width", "rank", "prompt", "dtype")}
    with tempfile.TemporaryDirectory() as folder:
        for contender in contenders(pathlib.Path(folder), args):
            model, count = contender.decoder.model, len(contender.applied)
            prompt = torch.arange(args.prompt, device=args.device)[None] % model.arch.vocab_size
            one, whole = measure(contender, prompt, args.tokens, args.rounds)
            read = sum(p.nbytes for key, p in model.named_parameters() if key != "emb.weight")
            row = {
                "name": contender.name,
                "rows": count,
                "tokens_per_second": round(count / one, 1),
                "of_bandwidth": round(read / one / bandwidth(model.head.weight, args.rounds), 3),
                "prompt_tokens_per_second": round(args.prompt / whole),
            }
            rows.append(row)
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            report_so_far("gpu_decode", rows=rows, **settings)
    card = {"card": torch.cuda.get_device_name()} if args.device == "cuda" else {}
    report("gpu_decode", rows=rows, **settings, **card)


if __name__ == "__main__":
    main()
