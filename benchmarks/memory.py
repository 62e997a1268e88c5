"""The plan's memory, compared with the memory of real runs on a CPU.

    python -m benchmarks.memory [--n_layer 12] [--n_embd 768] [--configurations v7 v6-bf16 v7-grad_cp]

Each configuration is a run of train.py in its own process, on a random model with the World vocabulary. The
rows are full, and all their tokens are trained. The measured figure is the highest resident memory of the
process (ru_maxrss: its own memory, and the mapped files that it touched), the larger one of two processes.
The predicted figure is that of `python -m scripts.plan --json` for one process, libraries included. The last
line is JSON.
"""

import json
import pathlib
import random
import subprocess
import sys
import tempfile

from src.planning.memory import LIBRARIES

from .common import add_integers, argument_parser, as_flags, report, write_random_base

# two steps of two micro-batches before the copies that --rollback_steps keeps, and four after: the heap is as
# large as it gets
COMMON = as_flags(accelerator="cpu", accumulate_grad_batches=2, epoch_steps=4, rollback_steps=2)
CONFIGURATIONS = {
    "v7": (7, as_flags(precision="fp32", micro_bsz=2, ctx_len=512)),
    "v6-bf16": (6, as_flags(precision="bf16", micro_bsz=1, ctx_len=1024)),
    "v7-grad_cp": (7, as_flags(precision="fp32", micro_bsz=8, ctx_len=160, grad_cp=1)),
    "v7-grad_cp2": (7, as_flags(precision="bf16", micro_bsz=4, ctx_len=512, grad_cp=2)),
    "v7-nf4": (7, as_flags(precision="bf16", micro_bsz=1, ctx_len=512, quant="nf4")),
    "v6-lora": (6, as_flags(precision="fp32", micro_bsz=3, ctx_len=256, peft="lora")),
    **{
        f"v7-zero{n}": (
            7,
            as_flags(precision="fp32", micro_bsz=1, ctx_len=512, devices=2, strategy=f"deepspeed_stage_{n}"),
        )
        for n in "123"
    },
}


def write_rows(path: pathlib.Path, rows: int, length: int) -> None:
    """Write rows of one document each, `length` tokens of letters and the end of document."""
    draw = random.Random(0)
    path.write_text(
        "".join(
            json.dumps({"text": "".join(draw.choices("abcdefgh ", k=length))}) + "\n" for _ in range(rows)
        )
    )


# a small process in between, because a process inherits the peak of the process that starts it
MEASURE = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""


def peak_resident(command: list[str]) -> int:
    """Measure ru_maxrss of a command, in bytes."""
    measured = subprocess.run([sys.executable, "-c", MEASURE, *command], stdout=subprocess.PIPE, text=True)
    if measured.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return int(measured.stdout) << 10


def compare(base: pathlib.Path, data: pathlib.Path, flags: list[str], folder: pathlib.Path) -> dict:
    """Predict and measure the bytes of one run."""
    files = as_flags(load_model=base, data_file=data, proj_dir=folder / "run")
    settings = [*files, *COMMON, *flags]
    planned = subprocess.run(
        [sys.executable, "-m", "scripts.plan", "--json", "--tokens_per_second", "1", *settings],
        capture_output=True,
        text=True,
    )
    if planned.returncode not in (0, 1):
        raise SystemExit(planned.stderr)
    plan = json.loads(planned.stdout.splitlines()[-1])
    predicted = sum(plan["memory"].values())
    return {
        "predicted": predicted,
        "measured": peak_resident([sys.executable, "train.py", *settings]),
        "parts": plan["memory"],
    }


def main() -> None:
    parser = argument_parser(__doc__)
    add_integers(parser, n_layer=12, n_embd=768)
    parser.add_argument("--configurations", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS))
    args = parser.parse_args()
    imports = (
        "import lightning.pytorch, matplotlib.pyplot, src.run, src.training.trainer, src.training.callbacks"
    )
    libraries = peak_resident([sys.executable, "-c", imports])
    print(
        f"the imports alone: {libraries / 1e6:,.0f} MB; the plan counts {LIBRARIES['cpu'] / 1e6:,.0f} MB for"
        " libraries"
    )
    results = {}
    for name in args.configurations:
        version, flags = CONFIGURATIONS[name]
        with tempfile.TemporaryDirectory() as temporary:
            folder = pathlib.Path(temporary)
            base, data = folder / "base.pth", folder / "rows.jsonl"
            write_random_base(base, version, args.n_layer, args.n_embd)
            write_rows(data, 64, int(flags[flags.index("--ctx_len") + 1]))
            results[name] = result = compare(base, data, flags, folder)
        ratio = result["ratio"] = round(result["predicted"] / result["measured"], 3)
        predicted, measured = (f"{result[key] / 1e6:,.0f}" for key in ("predicted", "measured"))
        print(
            f"{name:<12} {' '.join(flags):<75} predicted {predicted:>6} MB   measured {measured:>6} MB  "
            f" {ratio:.3f}",
            flush=True,
        )
    report("memory", n_layer=args.n_layer, n_embd=args.n_embd, libraries=libraries, results=results)


if __name__ == "__main__":
    main()
