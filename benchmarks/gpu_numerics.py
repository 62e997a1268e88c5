"""Compare the CUDA kernels on this GPU with float64.

    python -m benchmarks.gpu_numerics [--small]

For each operation, kernel and dtype it prints the worst relative error (rms) of y, the final state and each
gradient. The cases are lengths around the kernels' chunks, head sizes, scans of one, two and four warps, many
segments, documents that start inside a row, and decays of exactly 0 and 1. Small cases are compared with the
recurrence, token by token on the CPU, and large ones with the chunked form in plain torch. The last line is
JSON. The exit code is 1 if an error is above what the dtype explains, or not finite. --small has few tokens,
for compute-sanitizer. The elementwise functions and the loss have the cases of tests/elementwise_cases.py and
loss_cases.py.
"""

from __future__ import annotations

import argparse
import json
import math
import sys

import torch
from torch.nn.functional import normalize

from src import ops

OPS = {6: ops.wkv6, 7: ops.wkv7}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# (batch, tokens, heads, head size). On tensor cores a block of `scan` has one warp; two from batch x heads 64
# on, and four from 128 on. There a segment is 16 chunks, or 256 tokens.
FEW = [(1, 1, 1, 64), (2, 17, 2, 64)]
SMALL = [*FEW, (1, 272, 64, 64), (2, 20, 64, 64)]
SHAPES = [
    *FEW,
    (2, 16, 1, 64),
    (1, 33, 3, 64),
    (2, 129, 2, 64),
    (1, 700, 2, 64),
    (4, 48, 64, 64),
    (2, 40, 2, 32),
    (1, 40, 2, 128),
    (1, 24, 1, 256),
    (4, 600, 32, 64),
    (1, 300, 64, 64),
    (8, 40, 16, 64),
]
# (extreme decays, documents that start inside a row)
VARIANTS = ((False, False), (False, True), (True, True))
# floats of all states that autograd keeps for the recurrence
MOST_STATES = 1 << 24
# largest errors that rounding explains: fp32 sums and the telescoped gradient of w; results kept in 8 or 11
# bits; bf16 operands of the tensor cores
EXACT = {"float32": 1e-4, "bfloat16": 1e-2, "float16": 2e-3}
TENSOR_CORES = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 5e-2}


def make(version: int, shape: tuple[int, ...], dtype: torch.dtype, extreme: bool) -> dict[str, torch.Tensor]:
    """Make inputs in the range of a trained model, rounded to the dtype; the extremes have decays of exactly
    0 (RWKV-6) and 1 among them.
    """
    r, k, v, w, p, q = (torch.randn(shape) for _ in range(6))
    if extreme:
        w = torch.where(torch.rand(shape) < 0.1, -torch.inf, w * 4)
        if version == 6:
            w = torch.where(torch.rand(shape) < 0.1, torch.inf, w)
    kappa = normalize(p, dim=-1)
    if version == 6:
        inputs = {"r": r, "k": k, "v": v, "w": w - 2, "u": torch.randn(shape[2:])}
    else:
        inputs = {"r": r, "w": 2 * w - 2, "k": k, "v": v, "a": -kappa, "b": kappa * torch.sigmoid(q)}
    return {name: x.to(dtype) for name, x in inputs.items()}


def results(
    version: int, kernel: str, inputs: dict[str, torch.Tensor], state, reset, dy, dstate
) -> dict[str, torch.Tensor]:
    """Return y, the final state, and the gradients of every input and of the first state."""
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()} | {
        "s0": state.clone().requires_grad_()
    }
    y, final = OPS[version](**leaves, reset=reset, kernel=kernel)
    gradients = torch.autograd.grad((y, final), list(leaves.values()), (dy, dstate))
    return {"y": y, "state": final} | {f"d{name}": gradient for name, gradient in zip(leaves, gradients)}


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Compute the relative error, rms; for numbers near 0, such as one token's gradient through a decay of 1,
    the absolute error. NaN counts as infinite.
    """
    value = ((got.double() - want).norm() / max(want.norm(), 1e-3 * want.numel() ** 0.5)).item()
    return value if math.isfinite(value) else math.inf


def worst_errors(
    version: int, dtype: str, kernels: list[str], shapes, device: str
) -> dict[str, dict[str, float]]:
    """Map each kernel to the largest error of each result."""
    worst: dict[str, dict[str, float]] = {kernel: {} for kernel in kernels}
    for shape in shapes:
        B, T, H, N = shape
        # with --small compute-sanitizer watches addresses, which do not depend on the values
        for extreme, packed in VARIANTS[-1:] if shapes is SMALL else VARIANTS:
            inputs, dy = make(version, shape, DTYPES[dtype], extreme), torch.randn(shape).to(DTYPES[dtype])
            state, dstate = (torch.randn(B, H, N, N) for _ in range(2))
            reset = torch.rand(B, T) < 0.2 if packed else None
            exact = {name: x.double() for name, x in inputs.items()}
            given = [x if x is None else x.to(device) for x in (state, reset, dy, dstate)]
            if B * T * H * N * N <= MOST_STATES:
                want = results(
                    version, "reference", exact, state.double(), reset, dy.double(), dstate.double()
                )
            else:
                double = [x if x is None or x.dtype == torch.bool else x.double() for x in given]
                want = results(version, "torch", {name: x.to(device) for name, x in exact.items()}, *double)
                want = {name: x.cpu() for name, x in want.items()}
            there = {name: x.to(device) for name, x in inputs.items()}
            for kernel, errors in worst.items():
                got = results(version, kernel, there, *given)
                for name in want:
                    errors[name] = max(errors.get(name, 0.0), error(got[name].cpu(), want[name]))
    return worst


def elementwise_errors(dtype: str, device: str) -> dict[str, tuple[float, float]]:
    """Map each elementwise function to (its largest error relative to the largest value, the allowed one)."""
    # from the tests, because they have every function with its arguments
    from tests import elementwise_cases as cases

    allowed, found = cases.TOLERANCE[DTYPES[dtype]], {}
    for name in cases.FUNCTIONS:
        worst = 0.0
        for sizes in cases.SIZES:
            want = cases.results(name, sizes, "", torch.float64, True)
            got = cases.results(name, sizes, "cuda", DTYPES[dtype], True, [torch.float32], device)
            for a, b in zip(got, want, strict=True):
                value = ((a.cpu().double() - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()
                worst = max(worst, value if math.isfinite(value) else math.inf)
        found[name] = worst, allowed
    return found


def loss_errors(dtype: str, device: str) -> dict[str, tuple[float, float]]:
    """Map each loss and its gradient to (the largest relative error (rms), the allowed one)."""
    from src.model.loss import in_place_of
    from tests import loss_cases as cases  # here, because it needs pytest

    worst, half = 0.0, DTYPES[dtype]
    for rows, vocab in cases.LOGITS:
        if vocab == 1:
            continue  # without L2Wrap's term this gradient is 0
        logits, targets = cases.random_logits(rows, vocab)
        want = cases.exact_loss(logits, targets)
        there = logits.to(device)
        loss = torch.ops.rwkv.softmax_loss_(there, targets.to(device), None, half)
        for a, b in zip((loss, in_place_of(there, half)), want, strict=True):
            worst = max(worst, error(a.cpu(), b))
    return {"loss": (worst, 2 * cases.GRADIENT_ERRORS[half])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--small", action="store_true", help="a few tokens only, for compute-sanitizer")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--kernels", nargs="+", default=["cuda", "cuda-exact"])
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --device cpu --kernels cpu torch checks the CPU's kernels")
    torch.manual_seed(0)

    worst, failures = {}, []
    for version in OPS:
        for dtype in DTYPES:
            found = worst_errors(version, dtype, args.kernels, SMALL if args.small else SHAPES, args.device)
            for kernel, errors in found.items():
                title = f"wkv{version} {kernel}"
                allowed = (TENSOR_CORES if kernel == "cuda" else EXACT)[dtype]
                shown = "  ".join(f"{name} {value:.1e}" for name, value in errors.items())
                print(f"{title:<15} {dtype:<8} {shown}", flush=True)
                worst.setdefault(title, {})[dtype] = max(errors.values())
                for name, value in errors.items():
                    if value > allowed:
                        failures.append(f"{title} {dtype} {name}: {value:.1e}, allowed {allowed:.0e}")
    for dtype in DTYPES if args.device == "cuda" else ():
        found = elementwise_errors(dtype, args.device) | loss_errors(dtype, args.device)
        for name, (value, allowed) in found.items():
            print(f"{name:<18} {dtype:<8} {value:.1e}", flush=True)
            title = "loss" if name == "loss" else "elementwise"
            errors = worst.setdefault(title, {})
            errors[dtype] = max(errors.get(dtype, 0.0), value)
            if value > allowed:
                failures.append(f"{name} {dtype}: {value:.1e}, allowed {allowed:.0e}")
    for failure in failures:
        print("FAILED", failure)
    print(json.dumps({"errors": worst, "failures": failures}))
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
