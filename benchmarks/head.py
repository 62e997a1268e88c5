"""Measure the head and its loss, forward and backward with the gradient of its input.

All logits at once in plain torch stand against blocks of rows.

    python -m benchmarks.head [--tokens 2048] [--n_embd 768] [--vocab_size 65536] [--dtypes float32 bfloat16]
    [--threads 1] [--rounds 3]

CPU time with one thread, wall time with several, the forms in turns; and the most memory above the start, in
a process for each. The last line is JSON.
"""

import argparse

import torch

from src.model.loss import head_loss, loss_sum

from .common import (
    add_dtypes,
    add_integers,
    argument_parser,
    clock_name,
    fastest_by_turns,
    json_of_process,
    peak_above_start,
    report,
    same_flags,
    settings_without,
)

FORMS = {
    "all logits": lambda x, weight, targets: loss_sum(torch.nn.functional.linear(x, weight), targets),
    "blocks, plain softmax": head_loss,
    "blocks": lambda x, weight, targets: head_loss(x, weight, targets, native=True),
}


def make(form: str, args, dtype: str):
    torch.manual_seed(0)
    x = torch.randn(args.tokens, args.n_embd).to(getattr(torch, dtype)).requires_grad_()
    weight = torch.randn(args.vocab_size, args.n_embd).mul_(0.02).to(x.dtype)
    targets = torch.randint(args.vocab_size, (args.tokens,))

    def work() -> None:
        x.grad = None
        FORMS[form](x, weight, targets).backward()

    return work


def peaks_of(args, dtype: str) -> dict[str, int]:
    """Bytes above the start of every form, each in a process of its own."""
    sizes = same_flags(args, "tokens", "n_embd", "vocab_size", "threads")
    flags = [*sizes, "--dtypes", dtype, "--peak"]
    return {form: json_of_process("benchmarks.head", *flags, form) for form in FORMS}


def measure(args, dtype: str) -> list[dict]:
    seconds = fastest_by_turns({form: make(form, args, dtype) for form in FORMS}, args.rounds)
    peaks = peaks_of(args, dtype)
    return [
        {
            "form": form,
            "dtype": dtype,
            "seconds": round(seconds[form], 4),
            "peak_MB": round(peaks[form] / 1e6),
            "time_of_all_logits": round(seconds[form] / seconds["all logits"], 3),
            "peak_of_all_logits": round(peaks[form] / peaks["all logits"], 3),
        }
        for form in FORMS
    ]


def show(row: dict) -> None:
    time = f"{row['seconds']:8.3f} s {row['time_of_all_logits']:6.3f} of all logits"
    memory = f"{row['peak_MB']:6} MB {row['peak_of_all_logits']:6.3f}"
    print(f"{row['dtype']:<9} {row['form']:<22} {time}   {memory}", flush=True)


def main() -> None:
    parser = argument_parser(__doc__)
    add_integers(parser, tokens=2048, n_embd=768, vocab_size=65536, threads=1, rounds=3)
    add_dtypes(parser)
    parser.add_argument("--peak", choices=FORMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak:
        print(peak_above_start(make(args.peak, args, args.dtypes[0])))
        return
    rows = []
    for dtype in args.dtypes:
        found = measure(args, dtype)
        for row in found:
            show(row)
        rows += found
    report(
        "head",
        rows=rows,
        clock=clock_name(args.threads),
        **settings_without(args, "peak", "dtypes"),
    )


if __name__ == "__main__":
    main()
