"""The elementwise parts of a layer, forward and backward, each beside its form in plain torch, in one run.

    python -m benchmarks.elementwise [--shapes 1,512,768 1,512,2048] [--dtypes float32 bfloat16] [--rounds 30]

CPU time of one thread; native form, plain form and a copy of one activation take turns, and the fastest round
counts. The bytes are those that the activations and gradients of a function have, each read or written once;
the copy reads and writes one activation. relu_squared has four times the width. The last line is JSON.
"""

import functools

import torch

from src.ops import elementwise

from .common import add_dtypes, add_integers, argument_parser, fastest_by_turns, keep_pages, report

HEAD, RANK = 64, 32  # channels of a head, rank of RWKV-6's mixes


def cases(shape: tuple[int, int, int], dtype: torch.dtype) -> dict:
    """{name: (function of (activations, native), activations, moved)}; moved: activations read and written by
    forward and backward.
    """
    B, T, C = shape
    heads = C // HEAD

    def x(*sizes: int):
        return torch.randn(sizes or shape).to(dtype).requires_grad_()

    def vectors(n: int):
        return [torch.randn(C) for _ in range(n)]

    mixes, maps, last = vectors(6), torch.randn(5, RANK, C), x(B, C)
    k_k, k_a, weight, bias = vectors(4)
    r_k = torch.randn(heads, HEAD)
    return {
        "shift_mix, 6 mixes": (
            lambda z, native: elementwise.shift_mix(z, last, None, mixes, native),
            [x()],
            7 + 7,
        ),
        "shift_mix, 1 mix": (
            lambda z, native: elementwise.shift_mix(z, last, None, mixes[:1], native),
            [x()],
            2 + 2,
        ),
        "shift_mix_low_rank": (
            lambda z, q, native: elementwise.shift_mix_low_rank(z, last, None, mixes[:5], q, maps, native),
            [x(), x(5, B * T, RANK)],
            6 + 7,
        ),
        "value_residual": (elementwise.value_residual, [x(), x(), x()], 4 + 7),
        "delta_inputs": (
            lambda k, a, native: elementwise.delta_inputs(k, a, k_k, k_a, heads, native),
            [x(), x()],
            5 + 7,
        ),
        "readout7": (
            lambda *a: elementwise.readout7(*a[:5], r_k, weight, bias, 64e-5, a[5]),
            [x() for _ in range(5)],
            6 + 11,
        ),
        "readout6": (
            lambda y, g, native: elementwise.readout6(y, g, weight, bias, heads, 64e-5, native),
            [x(), x()],
            3 + 5,
        ),
        "relu_squared": (elementwise.relu_squared, [x(B, T, 4 * C)], 4 * (2 + 3)),
    }


def forward_and_backward(run, activations, gradients) -> None:
    torch.autograd.grad(run(), activations, gradients)


def measure(shape: tuple[int, int, int], dtype: torch.dtype, rounds: int) -> list[dict]:
    rows, activation = [], torch.randn(shape).to(dtype)
    copy = torch.empty_like(activation)
    for name, (function, inputs, moved) in cases(shape, dtype).items():
        native, plain = (functools.partial(function, *inputs, native) for native in ("cpu", ""))
        out = native()
        gradients = [torch.randn_like(y) for y in (out if isinstance(out, (list, tuple)) else [out])]
        works = {
            "native": functools.partial(forward_and_backward, native, inputs, gradients),
            "plain": functools.partial(forward_and_backward, plain, inputs, gradients),
            "copy": lambda: copy.copy_(activation),
        }
        best = fastest_by_turns(works, rounds)
        size = activation.nbytes
        rows.append(
            {
                "function": name,
                "shape": shape,
                "dtype": str(dtype).removeprefix("torch."),
                "native_ms": round(1e3 * best["native"], 3),
                "plain_ms": round(1e3 * best["plain"], 3),
                "times_faster": round(best["plain"] / best["native"], 2),
                "gb_per_s": round(moved * size / best["native"] / 1e9, 1),
                "copy_gb_per_s": round(2 * size / best["copy"] / 1e9, 1),
            }
        )
    return rows


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--shapes", nargs="+", default=["1,512,768", "1,512,2048"], help="B,T,C")
    add_dtypes(parser)
    add_integers(parser, rounds=30)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    note = "" if keep_pages() else "; memory is not kept between rounds"
    rows = []
    for text in args.shapes:
        for dtype in args.dtypes:
            shape = tuple(map(int, text.split(",")))
            print(f"{shape} {dtype}: forward and backward{note}")
            for row in measure(shape, getattr(torch, dtype), args.rounds):
                print(
                    f"  {row['function']:<20} {row['native_ms']:8.3f} ms   plain {row['plain_ms']:8.3f} ms"
                    f" ({row['times_faster']:5.2f} times)   {row['gb_per_s']:6.1f} GB/s   copy"
                    f" {row['copy_gb_per_s']:6.1f} GB/s"
                )
                rows.append(row)
    report("elementwise", rows=rows, rounds=args.rounds)


if __name__ == "__main__":
    main()
