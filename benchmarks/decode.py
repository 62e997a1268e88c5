"""Measure tokens a second while chatting and while reading a prompt.

In one run: the decoder in fp32, bf16 and int8, the package `rwkv`, and llama.cpp.

    python -m benchmarks.decode [--version 7] [--layers 12] [--width 768] [--threads 1 2] [--prompt 256]
    [--rounds 8] [--miss 64] [--llama FOLDER]

The model is random, with the World vocabulary's size. One thread is measured in CPU time, more in wall time.
Rounds alternate between the contenders and the memory's read bandwidth, measured by a sum of 300 MB, and the
fastest counts. A token reads the bytes of all weights but the embedding.

The KL of the next token is taken from the decoder in fp32 with the same bf16 weights, fed token by token. The
first KL is the mean over 128 tokens that are fed one by one. The second is the mean over the prompts of 16,
32, ..., 128 of these tokens, each read at once, like the timed prompt.

With --miss RANK the decoder is also measured on the bf16 base with an unmerged MiSS adapter of that rank, and
with the same adapter merged in fp32; the unmerged one's KL is taken from the merged one.

FOLDER holds llama.cpp's libraries, with kernels for this CPU, such as the unpacked content of
`npm pack @node-llama-cpp/linux-x64`. `pip install gguf` writes its files. The last line is JSON.
"""

import argparse
import dataclasses
import functools
import importlib.util
import pathlib
import tempfile

import torch

from .common import add_integers, argument_parser, report, timed
from .decode_contenders import Adapted, Ours, Package, llama_contenders, write_adapter, write_base

TOKENS = 10  # tokens fed in a round


def one_by_one(contender, ids: list[int]) -> list[torch.Tensor]:
    """Return the logits after every token."""
    contender.start(1)
    return [contender.feed([token]).float().clone() for token in ids]


def at_once(contender, ids: list[int], lengths: range) -> list[torch.Tensor]:
    """Return the logits after prompts of these lengths, each read from the beginning in one call."""
    logits = []
    for length in lengths:
        contender.start(1)
        logits.append(contender.feed(ids[:length]).float().clone())
    return logits


def kl(got: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    """Return the mean KL divergence of `got` from `exact`, in nats, rounded to two digits."""
    got, want = torch.stack(got).log_softmax(-1), torch.stack(exact).log_softmax(-1)
    return float(f"{(want.exp() * (want - got)).sum(-1).mean():.1e}")


def divergences(contender, exact: list[torch.Tensor], ids: list[int]) -> dict[str, float]:
    """Measure the KL of tokens fed one by one, and of prompts; `exact`: logits after every token of `ids`."""
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
        "--miss", type=int, help="rank of a MiSS adapter, which is measured unmerged and merged"
    )
    parser.add_argument(
        "--llama",
        type=pathlib.Path,
        help="folder of llama.cpp's libraries; without it llama.cpp is not measured",
    )
    return parser.parse_args()


def make_contenders(path: pathlib.Path, args) -> dict:
    """Load all contenders that can run here, on the same weights; print the absent ones."""
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
    return contenders | llama_contenders(args.llama, path, ("F32", "BF16", "Q8_0"))


def all_divergences(contenders: dict, ids: list[int]) -> dict[str, dict[str, float]]:
    """Measure the KL of every contender from an fp32 decoder with the contender's weights."""
    exact, found = {}, {}
    for name, contender in contenders.items():
        reference = "merged fp32" if isinstance(contender, Adapted) else "ours fp32"
        if reference not in exact:
            exact[reference] = one_by_one(contenders[reference], ids)
        found[name] = divergences(contender, exact[reference], ids)
    return found


def feed_each(contender, tokens: list[int]) -> None:
    for token in tokens:
        contender.feed([token])


@dataclasses.dataclass
class Fastest:
    """Seconds of the fastest round: reading the memory, a token and the prompt of each contender."""

    read: float
    token: dict[str, float]
    prompt: dict[str, float]


def fastest(contenders: dict, memory: torch.Tensor, threads: int, prompt: list[int], rounds: int) -> Fastest:
    never = float("inf")
    found = Fastest(never, dict.fromkeys(contenders, never), dict.fromkeys(contenders, never))
    for _ in range(rounds):
        for name, contender in contenders.items():
            contender.start(threads)
            found.read = min(found.read, timed(memory.sum, threads))
            whole = timed(functools.partial(contender.feed, prompt), threads)
            tokens = timed(functools.partial(feed_each, contender, prompt[:TOKENS]), threads)
            found.prompt[name] = min(found.prompt[name], whole)
            found.token[name] = min(found.token[name], tokens / TOKENS)
    return found


def share_of_bandwidth(contender, seconds: float, bandwidth: float) -> float | None:
    """Return the share, or None for a contender that does not tell the bytes of its weights."""
    size = getattr(contender, "bytes", 0)
    return round(size / seconds / bandwidth, 3) if size else None


def show(row: dict) -> None:
    print(
        f"{row['name']:<12} {row['tokens_per_second']:9.1f} {row['of_bandwidth'] or '':>12} "
        f"{row['prompt_tokens_per_second']:9d} {row['kl']:9.1e} {row['kl_prompt']:11.1e}"
    )


def measure(contenders: dict, memory: torch.Tensor, args) -> list[dict]:
    prompt = torch.randint(65536, (args.prompt,), generator=torch.Generator().manual_seed(0)).tolist()
    divergence = all_divergences(contenders, prompt[:128])
    rows = []
    for threads in args.threads:
        found = fastest(contenders, memory, threads, prompt, args.rounds)
        bandwidth = memory.nbytes / found.read
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
    memory = torch.ones(75_000_000)
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
