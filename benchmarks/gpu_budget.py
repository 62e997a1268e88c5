"""Arithmetic of a training step on a GPU: its bytes and operations, and the time that these should take.

    python -m benchmarks.gpu_budget --model 7 --n_layer 24 --n_embd 2048 --peft miss --r 64 \
        --micro_bsz 8 --ctx_len 1024 --card h100
    python -m benchmarks.gpu_budget --load_model rwkv.pth --card 4090
    python -m benchmarks.gpu_budget --predict

The model runs on the GPU that computes nothing (gpu_emulation/fake_gpu), with two and three layers. Every
launch is counted by kind, with its bytes and multiply-adds; each layer of a deeper model counts as the third
layer. A card's bandwidth and speed turn the counts into milliseconds:

- a product takes the time of its multiply-adds, or of its bytes if that is longer;
- any other operation takes the time of its bytes, with each tensor read or written once;
- no kernel reaches a card's peak: PRODUCTS and BANDWIDTH are the assumed shares of it;
- the WKV takes the time of its bytes, of the scratch that the card's L2 does not hold, and of its counted
  instructions, one after the other (benchmarks/wkv_budget.py). The longest of these is the card's class;
- a launch costs the host LAUNCH microseconds; if the sum of all launches is longer, it is the step's time.

--predict writes gpu_predictions.json: for each card the tokens a second of the steps in MEASURED, which
scripts/gpu_check.sh measures.

For RWKV-7 the last lines compare with RWKV-LM's trainer: the bytes of its published kernels, all parts in
bf16. The last line is JSON. The program needs g++ and torch's wheel for CPUs.
"""

import argparse
import json
import pathlib
import sys

from gpu_emulation.fake_gpu import stub

from . import wkv_budget
from .wkv_budget import Card

# multiprocessors, clocks and L2 come from NVIDIA's data sheets
CARDS = {
    "h100": Card(3.35e12, 989e12, "H100 SXM", 132, 1.755e9, 50e6),
    "a100": Card(2.04e12, 312e12, "A100 SXM 80 GB", 108, 1.41e9, 40e6),
    "5090": Card(1.792e12, 209.5e12, "RTX 5090", 170, 2.407e9, 96e6),
    "4090": Card(1.008e12, 165e12, "RTX 4090", 128, 2.52e9, 72e6),
    "3090": Card(0.936e12, 71e12, "RTX 3090", 82, 1.695e9, 6e6),
    "3060": Card(0.360e12, 25.5e12, "RTX 3060", 28, 1.777e9, 3e6),
    "t4": Card(0.320e12, 65e12, "T4", 40, 1.59e9, 4e6),
}
# steps that --predict computes, under their names in scripts/gpu_check.sh
MEASURED = {
    "training": "--n_layer 24 --n_embd 2048 --micro_bsz 8 --ctx_len 1024",
    "published": "--n_layer 12 --n_embd 768 --micro_bsz 16 --ctx_len 512 --peft none",
}
PREDICTIONS = pathlib.Path(__file__).with_name("gpu_predictions.json")
# a card whose tensor cores lack bf16 and the WKV's instructions: it computes in fp16, the recurrence in fp32
OLD_CARD = "t4"
PRODUCTS, BANDWIDTH = 0.6, 0.9
L2_SIZES = (3, 6, 40, 50, 72, 96)  # MB; --card's WKV is also computed for these sizes
HEAD_SIZE = 64  # head size of all released models
LAUNCH = 10  # microseconds of Python and torch for a launch, forward and backward; measured on CPUs
# bytes for a trained parameter: the norm reads g, Adam reads p, g, m, v, writes p, m, v, and g is set to zero
OPTIMIZER_BYTES = 36

# RWKV-7's layer in RWKV-LM's train_temp, in tensors of (B, T, C) in bf16: (read, written) forward, backward.
# Counted from its published kernels, full training's sums over tokens left out. The feed-forward's inner
# width is four such tensors.
RWKV_LM = {
    "layer norms, two": ((2, 2), (4, 2)),
    "residuals, two": ((4, 2), (4, 2)),
    "mix6": ((1, 6), (7, 1)),
    "decay's bias": ((1, 1), (0, 0)),
    "a_gate": ((1, 1), (2, 1)),
    "vres_gate": ((3, 1), (4, 3)),
    "kk_pre": ((2, 3), (5, 2)),
    "lnx, bonus and gate": ((5, 1), (6, 5)),
    "cmix: mix": ((1, 1), (2, 1)),
    "cmix: squared ReLU": ((4, 4), (8, 4)),
    "sums of gradients of r, k, v, v_first": ((0, 0), (8, 4)),
}
RWKV_LM_TENSORS = sum(sum(read_written) for parts in RWKV_LM.values() for read_written in parts)
# passes over the logits in bf16: the loss reads them; the gradient reads them and is written
RWKV_LM_LOGITS = 3


def positive(text: str) -> float:
    """Read a flag's number above zero."""
    if not 0 < (number := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no number above zero")
    return number


def size(text: str) -> int:
    """Read a flag's whole number above zero."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number above zero")
    return number


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_budget", description=__doc__.partition("\n\n")[0], allow_abbrev=False
    )
    parser.add_argument("--load_model", help="a .pth, whose sizes are taken")
    parser.add_argument("--model", type=int, choices=(6, 7), default=7, help="version, without --load_model")
    for name, default in {"n_layer": 24, "n_embd": 2048, "vocab": 65536}.items():
        parser.add_argument(f"--{name}", type=size, default=default)
    parser.add_argument("--peft", default="miss")
    parser.add_argument("--r", type=size, default=64, help="rank of the adapters")
    parser.add_argument("--quant", choices=("none", "int8", "nf4"), default="none")
    parser.add_argument("--grad_cp", type=int, choices=(0, 1, 2), default=0)
    parser.add_argument("--micro_bsz", type=size, default=8)
    parser.add_argument("--ctx_len", type=size, default=1024)
    parser.add_argument(
        "--card", choices=CARDS, default="h100", help="another: --bandwidth, --flops and --l2 of the nearest"
    )
    parser.add_argument("--operators", action="store_true", help="list a layer's operators, too")
    parser.add_argument("--predict", action="store_true", help="write gpu_predictions.json, and do no more")
    parser.add_argument("--bandwidth", type=positive, help="bytes a second, of another card")
    parser.add_argument("--flops", type=positive, help="floating-point operations a second, of another card")
    parser.add_argument("--l2", type=positive, help="MB of its L2 cache, of another card")
    return parser.parse_args(argv)


def main() -> None:
    args = parse()
    try:
        stub.load()
    except stub.Unavailable as reason:
        sys.exit(f"gpu_budget: {reason}; it counts with torch's wheel for CPUs")
    from gpu_emulation.fake_gpu.device import install  # imports torch, which must come after the stub
    from rwkv_miss.errors import one_line_errors

    install()
    with one_line_errors():
        print(json.dumps(predict() if args.predict else report(args)))


def predict() -> dict[str, dict[str, int]]:
    """Write the tokens a second of MEASURED's steps on each card to PREDICTIONS."""
    figures = {
        step: {card: report(parse([*flags.split(), "--card", card]))["tokens_per_second"] for card in CARDS}
        for step, flags in MEASURED.items()
    }
    PREDICTIONS.write_text(json.dumps(figures, indent=1) + "\n")
    return figures


def report(args: argparse.Namespace) -> dict:
    """Print the budget, and return its figures."""
    import torch

    from benchmarks.op_counts import TRAFFIC
    from gpu_emulation.fake_gpu.micro_batch import FEW, activations, config_of, layer_tallied, trained_numbers
    from rwkv_miss.errors import UserError
    from rwkv_miss.files.checkpoint import Arch, read_checkpoint
    from src.model import default_arch

    capability = (7, 5) if args.card == OLD_CARD else (9, 0)
    torch.cuda.get_device_capability = lambda *_: capability
    if args.load_model:
        arch = Arch.detect(read_checkpoint(args.load_model))
    else:
        if args.n_embd % HEAD_SIZE:
            raise UserError(f"--n_embd {args.n_embd} has to be a multiple of {HEAD_SIZE}, the head size")
        arch = default_arch(args.model, args.n_layer, args.n_embd, args.vocab, HEAD_SIZE)
    rows, width = args.micro_bsz, args.ctx_len
    card = CARDS[args.card]
    if args.bandwidth or args.flops or args.l2:
        flops = args.flops or card.flops
        card = card._replace(
            bandwidth=args.bandwidth or card.bandwidth,
            flops=flops,
            name="another card",
            clock=card.clock * flops / card.flops,
            l2=args.l2 * 1e6 if args.l2 else card.l2,
        )
    settings = {"quant": args.quant, "grad_cp": args.grad_cp, "micro_bsz": rows, "ctx_len": width}
    config = config_of(args.peft, args.r, precision="fp16" if args.card == OLD_CARD else "bf16", **settings)
    layer, few = layer_tallied(arch, config, rows, width)
    # counts of the whole model: those of the small one, plus a layer's counts for each further layer
    whole = {
        what: {
            kind: few[what].get(kind, 0) + (arch.n_layer - FEW) * layer[what].get(kind, 0)
            for kind in {**few[what], **layer[what]}
        }
        for what in few
    }

    def of(what: str, *kinds: str) -> int:
        return sum(whole[what].get(kind, 0) for kind in kinds)

    seconds_of_bytes = 1 / (card.bandwidth * BANDWIDTH)
    trained = trained_numbers(arch, config)
    parts = {
        name: {
            "launches": of("launches", *kinds),
            "GB": of("bytes", *kinds) / 1e9,
            "TFLOP": 2 * of("multiply_adds", *kinds) / 1e12,
        }
        for name, kinds in {
            "matrix products": ("product",),
            "adapters' products": ("adapter product",),
            "WKV": ("wkv",),
            "elementwise": TRAFFIC,
            "loss": ("loss",),
            "dequantise": ("dequantise",),
        }.items()
    }
    parts["optimizer"] = {"launches": 0, "GB": OPTIMIZER_BYTES * trained / 1e9, "TFLOP": 0}
    for part in parts.values():
        part["ms"] = 1e3 * max(
            part["GB"] * 1e9 * seconds_of_bytes, part["TFLOP"] * 1e12 / (card.flops * PRODUCTS)
        )
    forward, backward = (
        of("calls of operators", f"wkv: wkv{arch.version}{end}", f"wkv: mix7_chunked{end}")
        for end in ("", "_backward")
    )
    heads = max(1, arch.dim_att * arch.head_size // HEAD_SIZE**2)
    tensor_cores = args.card != OLD_CARD and width >= wkv_budget.CHUNK and arch.head_size == HEAD_SIZE
    calls = wkv_budget.Calls(arch.version, tensor_cores, forward, backward, rows, width, heads)
    beyond, busy = wkv_budget.beyond(calls, card.l2), wkv_budget.work(calls, card)
    wkv = {
        "bandwidth": parts["WKV"]["ms"],  # reading the arguments and writing the results once
        "L2": 1e3 * beyond * seconds_of_bytes,
        "compute": 1e3 * max(busy.values()),
        "launches": 1e3 * parts["WKV"]["launches"] * wkv_budget.START,
    }
    parts["WKV"] |= {"GB": parts["WKV"]["GB"] + beyond / 1e9, "ms": sum(wkv.values())}
    gpu = sum(part["ms"] for part in parts.values())
    launches = sum(part["launches"] for part in parts.values())
    host = launches * LAUNCH / 1e3
    per_layer = sum(layer["launches"].values())
    tensors = activations(layer, rows, width, arch.n_embd)
    tokens = rows * width
    print(
        f"RWKV-{arch.version}, {arch.n_layer} x {arch.n_embd}, {args.peft}, {rows} x {width} tokens,"
        f" {config.precision}, {card.name}: {card.bandwidth / 1e12:.2f} TB/s,"
        f" {card.flops / 1e12:.0f} TFLOP/s, L2 {card.l2 / 1e6:.0f} MB\n"
    )
    print(f"{'part':20} {'launches':>8} {'GB':>8} {'TFLOP':>7} {'ms':>7}")
    for name, part in parts.items():
        print(f"{name:20} {part['launches']:8,} {part['GB']:8.1f} {part['TFLOP']:7.2f} {part['ms']:7.1f}")
    print(f"{'GPU, sum':20} {launches:8,} {'':8} {'':7} {gpu:7.1f}")
    print(f"{'host':20} {'':8} {'':8} {'':7} {host:7.1f}   {LAUNCH} us a launch")
    print(
        f"\nWKV: bound by {max(wkv, key=wkv.get)}. Bandwidth {wkv['bandwidth']:.1f} ms, scratch beyond L2"
        f" {wkv['L2']:.1f} ({beyond / 1e9:.1f} GB), {max(busy, key=busy.get)} {wkv['compute']:.1f}, launches"
        f" {wkv['launches']:.1f}"
    )
    segments = {}
    if tensor_cores:
        segments = segments_by_l2(calls, card, 1e-3 * (gpu - wkv["L2"] - wkv["launches"]), launches)
    print(f"\na layer: {per_layer} launches, {tensors:.1f} elementwise tensors of (B, T, C)")
    print("by kind: " + ", ".join(f"{kind} {count}" for kind, count in sorted(layer["launches"].items())))
    if args.operators:
        print(f"\n{'operator':50} {'launches':>8} {'tensors':>8}")
        moved = layer["bytes of operators"]
        for name in sorted(moved, key=moved.get, reverse=True):
            size = moved[name] / (2 * tokens * arch.n_embd)
            print(f"{name:50} {layer['launches of operators'].get(name, 0):8} {size:8.1f}")
    figures = {
        "model": f"v{arch.version} {arch.n_layer} x {arch.n_embd}",
        "peft": args.peft,
        "tokens": tokens,
        "card": card.name,
        "parts": {name: {key: round(x, 3) for key, x in part.items()} for name, part in parts.items()},
        "wkv": {"bound_by": max(wkv, key=wkv.get)} | {name: round(ms, 1) for name, ms in wkv.items()},
        "segment_chunks": segments,
        "gpu_ms": round(gpu, 1),
        "host_ms": round(host, 1),
        "tokens_per_second": round(1e3 * tokens / max(gpu, host)),
        "layer": {"launches": layer["launches"], "tensors": round(tensors, 1)},
    }
    if arch.version == 7:
        ours = of("bytes", *TRAFFIC) / 1e9
        theirs = arch.n_layer * RWKV_LM_TENSORS * 2 * tokens * arch.n_embd / 1e9
        loss = RWKV_LM_LOGITS * 2 * tokens * arch.vocab_size / 1e9
        print(
            f"RWKV-LM's kernels: {RWKV_LM_TENSORS} elementwise tensors a layer, {theirs:.1f} GB in all;"
            f" ours {ours:.1f}"
        )
        print(f"its loss: {loss:.1f} GB of logits; ours {parts['loss']['GB']:.1f}")
        figures["rwkv_lm"] = {
            "tensors": RWKV_LM_TENSORS,
            "elementwise_GB": round(theirs, 1),
            "loss_GB": round(loss, 1),
        }
    return figures


def segments_by_l2(calls: wkv_budget.Calls, card: Card, gpu: float, launches: int) -> dict[str, int]:
    """Print the best number of chunks in a segment of time for each of L2_SIZES; returns MB -> number.

    `gpu`: seconds of the step without the WKV's scratch and launches. `launches`: number in the whole step.
    """
    forward, scratch = wkv_budget.scratch(calls)
    host = (launches - wkv_budget.launches(calls)) * LAUNCH / 1e6
    print(f"its scratch: {forward / 1e6:.0f} MB forward, {scratch / 1e6:.0f} backward")
    print("with another L2, chunks of time in a segment, and ms of the scratch and the launches:")
    print(f"{'L2, MB':>8} {'fit':>6} {'best':>6} {'ms':>8} {'ms now':>8}")
    found, rate = {}, card.bandwidth * BANDWIDTH
    for size in L2_SIZES:
        fit = int(size * 1e6 // wkv_budget.scratch(calls, 1)[1])
        best = wkv_budget.best(calls, size * 1e6, rate, gpu, host, LAUNCH / 1e6)
        ms, now = (
            1e3 * wkv_budget.beyond(calls, size * 1e6, most) / rate
            + 1e3 * wkv_budget.START * wkv_budget.launches(calls, most)
            for most in (best, 0)
        )
        print(f"{size:8} {min(fit, calls.chunks):6} {best:6} {ms:8.1f} {now:8.1f}")
        found[str(size)] = best
    return found


if __name__ == "__main__":
    main()
