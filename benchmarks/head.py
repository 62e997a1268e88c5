"""Measure the head and its loss, forward and backward with the gradient of its input.

All logits at once in plain torch stand against blocks of rows.

    python -m benchmarks.head [--tokens 2048] [--n_embd 768] [--vocab_size 65536] [--dtypes float32 bfloat16]
    [--threads 1] [--rounds 3]

CPU time with one thread, wall time with several, the forms in turns; and the most memory above the start, in
a process for each. The last line is JSON.
"""

import argparse
import json
import subprocess
import sys

import torch

from src.model.loss import head_loss, loss_sum

from .common import peak_above_start, report
from .step import timed

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0], allow_abbrev=False)
    for name, default in (
        ("tokens", 2048),
        ("n_embd", 768),
        ("vocab_size", 65536),
        ("threads", 1),
        ("rounds", 3),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument(
        "--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"]
    )
    parser.add_argument("--peak", choices=FORMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak:
        print(peak_above_start(make(args.peak, args, args.dtypes[0])))
        return
    rows = []
    for dtype in args.dtypes:
        works = {form: make(form, args, dtype) for form in FORMS}
        seconds = dict.fromkeys(works, float("inf"))
        for _ in range(args.rounds + 1):
            for form, work in works.items():
                seconds[form] = min(seconds[form], timed(work))
        del works
        peaks = {}
        for form in FORMS:
            sizes = [
                str(part)
                for name in ("tokens", "n_embd", "vocab_size", "threads")
                for part in (f"--{name}", getattr(args, name))
            ]
            command = [sys.executable, "-m", "benchmarks.head", *sizes, "--dtypes", dtype, "--peak", form]
            peaks[form] = json.loads(
                subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            )
        for form in FORMS:
            rows.append(
                {
                    "form": form,
                    "dtype": dtype,
                    "seconds": round(seconds[form], 4),
                    "peak_MB": round(peaks[form] / 1e6),
                    "time_of_all_logits": round(seconds[form] / seconds["all logits"], 3),
                    "peak_of_all_logits": round(peaks[form] / peaks["all logits"], 3),
                }
            )
            row = rows[-1]
            print(
                f"{dtype:<9} {form:<22} {row['seconds']:8.3f} s {row['time_of_all_logits']:6.3f} of all"
                f" logits   {row['peak_MB']:6} MB {row['peak_of_all_logits']:6.3f}",
                flush=True,
            )
    report(
        "head",
        rows=rows,
        clock="CPU time" if args.threads == 1 else "wall time",
        **{k: v for k, v in vars(args).items() if k not in ("peak", "dtypes")},
    )


if __name__ == "__main__":
    main()
