"""Arithmetic of a training step on a GPU: what it asks for, and how long that should take.

    python -m benchmarks.gpu_budget --model 7 --n_layer 24 --n_embd 2048 --peft miss --r 64 \
        --micro_bsz 8 --ctx_len 1024 --card h100
    python -m benchmarks.gpu_budget --load_model rwkv.pth --card 4090
    python -m benchmarks.gpu_budget --predict

The model runs on the GPU that computes nothing (gpu_emulation/fake_gpu), with two and three layers. Every
launch is counted by kind, with its bytes and multiply-adds; a deeper model has as many of the third layer as
it needs. A card's bandwidth and speed turn them into milliseconds:

- a product takes its multiply-adds, or its bytes where those take longer;
- everything else takes its bytes, each tensor read or written once;
- no kernel reaches a card's peak: PRODUCTS and BANDWIDTH are the shares that are reckoned with. The WKV is
  bound by its instructions; WKV is the share of the bandwidth that the count of them comes to on an H100;
- a launch costs the host LAUNCH microseconds, which is what counts where the sum of launches is longer.

--predict writes gpu_predictions.json: the tokens a second of each card in MEASURED, the steps that
scripts/gpu_check.sh measures.

For RWKV-7 the last lines set RWKV-LM's trainer beside it: bytes by its published kernels, all parts in bf16.
The last line is JSON. It needs g++ and torch's wheel for CPUs.
"""

import argparse
import json
import pathlib
import sys

from gpu_emulation.fake_gpu import stub

# bytes a second of memory; operations a second of tensor cores, dense, with fp32 sums
CARDS = {
    "h100": (3.35e12, 989e12, "H100 SXM"),
    "a100": (2.04e12, 312e12, "A100 SXM 80 GB"),
    "5090": (1.792e12, 209.5e12, "RTX 5090"),
    "4090": (1.008e12, 165e12, "RTX 4090"),
    "3090": (0.936e12, 71e12, "RTX 3090"),
    "t4": (0.320e12, 65e12, "T4"),
}
# what --predict writes; names are those of the steps in scripts/gpu_check.sh
MEASURED = {
    "training": "--n_layer 24 --n_embd 2048 --micro_bsz 8 --ctx_len 1024",
    "published": "--n_layer 12 --n_embd 768 --micro_bsz 16 --ctx_len 512 --peft none",
}
PREDICTIONS = pathlib.Path(__file__).with_name("gpu_predictions.json")
# Its tensor cores know no bf16 and not the WKV's instructions: fp16, and the recurrence in fp32, which is
# bound by its multiply-adds; RECURRENCE has their number for each element of the state and token.
OLD_CARD, OLD_FP32, RECURRENCE = "t4", 8.1e12, {6: 3 + 7, 7: 5 + 16}
PRODUCTS, BANDWIDTH, WKV = 0.6, 0.9, 0.38
HEAD_SIZE = 64  # of all released models
LAUNCH = 10  # microseconds of Python and torch for a launch, forward and backward; seen on CPUs
# of a trained parameter: the norm reads g, Adam reads p, g, m, v and writes p, m, v, and g is set to zero
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
# of the logits in bf16: the loss reads them; its gradient reads them and is written
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
    parser.add_argument("--card", choices=CARDS, default="h100", help="another: --bandwidth and --flops")
    parser.add_argument("--operators", action="store_true", help="list a layer's operators, too")
    parser.add_argument("--predict", action="store_true", help="write gpu_predictions.json, and do no more")
    parser.add_argument("--bandwidth", type=positive, help="bytes a second, of another card")
    parser.add_argument("--flops", type=positive, help="floating-point operations a second, of another card")
    return parser.parse_args(argv)


def main() -> None:
    args = parse()
    try:
        stub.load()
    except stub.Unavailable as reason:
        sys.exit(f"gpu_budget: {reason}; it counts with torch's wheel for CPUs")
    from gpu_emulation.fake_gpu.device import install  # imports torch, which has to come after the stub
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
    bandwidth, flops, card = CARDS[args.card]
    if args.bandwidth or args.flops:
        bandwidth, flops, card = args.bandwidth or bandwidth, args.flops or flops, "another card"
    settings = {"quant": args.quant, "grad_cp": args.grad_cp, "micro_bsz": rows, "ctx_len": width}
    config = config_of(args.peft, args.r, precision="fp16" if args.card == OLD_CARD else "bf16", **settings)
    layer, few = layer_tallied(arch, config, rows, width)
    # a layer of which a model has n_layer, and what it has beside its layers
    whole = {
        what: {
            kind: few[what].get(kind, 0) + (arch.n_layer - FEW) * layer[what].get(kind, 0)
            for kind in {**few[what], **layer[what]}
        }
        for what in few
    }

    def of(what: str, *kinds: str) -> int:
        return sum(whole[what].get(kind, 0) for kind in kinds)

    seconds_of_bytes = 1 / (bandwidth * BANDWIDTH)
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
    for name, part in parts.items():
        share = WKV / BANDWIDTH if name == "WKV" else 1
        part["ms"] = 1e3 * max(
            part["GB"] * 1e9 * seconds_of_bytes / share, part["TFLOP"] * 1e12 / (flops * PRODUCTS)
        )
    if args.card == OLD_CARD:
        elements = arch.n_layer * rows * width * arch.dim_att * arch.head_size
        parts["WKV"]["ms"] = 1e3 * 2 * RECURRENCE[arch.version] * elements / (OLD_FP32 * PRODUCTS)
    gpu = sum(part["ms"] for part in parts.values())
    launches = sum(part["launches"] for part in parts.values())
    host = launches * LAUNCH / 1e3
    per_layer = sum(layer["launches"].values())
    tensors = activations(layer, rows, width, arch.n_embd)
    tokens = rows * width
    print(
        f"RWKV-{arch.version}, {arch.n_layer} x {arch.n_embd}, {args.peft}, {rows} x {width} tokens,"
        f" {config.precision}, {card}: {bandwidth / 1e12:.2f} TB/s, {flops / 1e12:.0f} TFLOP/s\n"
    )
    print(f"{'part':20} {'launches':>8} {'GB':>8} {'TFLOP':>7} {'ms':>7}")
    for name, part in parts.items():
        print(f"{name:20} {part['launches']:8,} {part['GB']:8.1f} {part['TFLOP']:7.2f} {part['ms']:7.1f}")
    print(f"{'GPU, sum':20} {launches:8,} {'':8} {'':7} {gpu:7.1f}")
    print(f"{'host':20} {'':8} {'':8} {'':7} {host:7.1f}   {LAUNCH} us a launch")
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
        "card": card,
        "parts": {name: {key: round(x, 3) for key, x in part.items()} for name, part in parts.items()},
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


if __name__ == "__main__":
    main()
