"""Measure tokens a second of a chat on a GPU, and of reading a prompt, with adapters beside the base.

    python -m benchmarks.gpu_decode [--version 7] [--layers 24] [--width 2048] [--rank 64] [--prompt 1024]
    [--tokens 64] [--rounds 5] [--device cuda] [--dtype bf16]

A random base with the World vocabulary's size, alone, with MiSS and with LoRA (half the rank) beside it as
`demo.chat` has them, and with peft's LoRA. A token is recorded as one CUDA graph where that works, and is
measured without a graph, too; peft's only so. The fastest round counts. The share is the bytes of all
weights but the embedding over a token's time, of the bandwidth that a copy of the head reaches. The last line
is JSON.
"""

import argparse
import pathlib
import tempfile
import time

import torch

from rwkv_miss import inject, save_adapter
from rwkv_miss.adapter import adapted_linears
from src import ops
from src.common.device import PRECISIONS
from src.inference.adapters import BASE, Adapters
from src.inference.decoders import fastest
from src.inference.torch_decoder import TorchDecoder
from src.model import RWKV

from .common import add_integers, argument_parser, report
from .decode import write_base
from .step import add_peft


def write_adapter(path, base, method: str, rank: int) -> None:
    """A random adapter of a base."""
    model = RWKV.load(base)
    inject(model, method, rank=rank)
    for layer in adapted_linears(model).values():
        for p in layer.parameters():
            if p.requires_grad:
                torch.nn.init.normal_(p, std=0.01)
    save_adapter(model, path)


def load(base, args) -> RWKV:
    kernel, _ = ops.choose("auto", args.device)
    return RWKV.load(base, PRECISIONS[args.dtype], args.device, kernel).eval()


def contenders(folder: pathlib.Path, args):
    """(name, what answers for it), one after another."""
    base = folder / "base.pth"
    write_base(base, args.version, args.layers, args.width)
    for name in ("base", "miss", "lora", "peft lora"):
        model = load(base, args)
        if name == "peft lora":
            add_peft(model, name, args.rank)
            model.to(args.device)
        elif name != "base":
            write_adapter(folder / name, base, name, args.rank if name == "miss" else args.rank // 2)
            Adapters(model, {name: folder / name}).use([name])
        launches = TorchDecoder(model, 1)
        decoder, how = (launches, "launches") if name == "peft lora" else fastest(model)
        if not isinstance(decoder, TorchDecoder):
            yield f"{name}, {how}", decoder
        yield f"{name}, launches", launches


def seconds(work, device: str) -> float:
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(decoder, prompt: torch.Tensor, tokens: int, rounds: int) -> tuple[float, float]:
    """Seconds of the fastest round: of a token, and of reading the prompt."""
    device, found = prompt.device.type, []
    for _ in range(rounds + 1):
        whole = seconds(lambda: decoder.read(prompt, None), device)
        decoder.put(0, decoder.read(prompt, None)[1])

        def answer() -> None:
            for token in range(tokens):
                decoder.step([token], [BASE])

        found.append((seconds(answer, device) / tokens, whole))
    one, whole = zip(*found[1:])
    return min(one), min(whole)


def bandwidth(weight: torch.Tensor, rounds: int) -> float:
    """Bytes a second, read and written, of copies of a tensor."""
    other = torch.empty_like(weight)
    return (
        2
        * weight.nbytes
        / min(seconds(lambda: other.copy_(weight), weight.device.type) for _ in range(rounds))
    )


def arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--version", type=int, default=7, choices=(6, 7))
    add_integers(parser, layers=24, width=2048, rank=64, prompt=1024, tokens=64, rounds=5)
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="bf16", choices=PRECISIONS)
    return parser.parse_args()


@torch.no_grad()
def main() -> None:
    args = arguments()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, decoder in contenders(pathlib.Path(folder), args):
            model = decoder.model
            prompt = torch.arange(args.prompt, device=args.device)[None] % model.arch.vocab_size
            one, whole = measure(decoder, prompt, args.tokens, args.rounds)
            read = sum(p.nbytes for key, p in model.named_parameters() if key != "emb.weight")
            row = {
                "name": name,
                "tokens_per_second": round(1 / one, 1),
                "of_bandwidth": round(read / one / bandwidth(model.head.weight, args.rounds), 3),
                "prompt_tokens_per_second": round(args.prompt / whole),
            }
            rows.append(row)
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    card = {"card": torch.cuda.get_device_name()} if args.device == "cuda" else {}
    settings = {key: getattr(args, key) for key in ("version", "layers", "width", "rank", "prompt", "dtype")}
    report("gpu_decode", rows=rows, **settings, **card)


if __name__ == "__main__":
    main()
