"""Print tables of the memory that training takes, as scripts.plan counts it.

    python -m scripts.memory_table [--cpu | --moments | --scaling]

Without a flag: the table of docs/memory.md for one GPU. --cpu: that page's table for a CPU. --moments: that
page's table for full training with AdamW's moments in fp32 and in 8 bits. --scaling: the table of
docs/scaling.md, for several GPUs under DeepSpeed.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence

if not __package__:  # started as a file, so that Python does not find src
    raise SystemExit("error: run this from the repository's folder as python -m scripts.memory_table")

from src.common.startup import importing

with importing():
    from rwkv_miss.errors import Parser, one_line_errors
    from src.common.available_memory import GIB
    from src.config import Config
    from src.model import default_arch
    from src.planning.memory import memory_parts
    from src.planning.step_memory import model_on_meta, step_bytes

MODELS = {
    "0.1B": (12, 768),
    "0.4B": (24, 1024),
    "1.5B": (24, 2048),
    "2.9B": (32, 2560),
    "7.2B": (32, 4096),
    "13.3B": (61, 4096),
}
ROW = 1024  # tokens, all of them trained
# columns of the tables for one device: from the fastest run to the one that needs the least memory
RUNS = [
    {"grad_cp": 0},
    {"grad_cp": 0, "layers": "last:6"},
    {"grad_cp": 2},
    {"grad_cp": 1},
    {"grad_cp": 1, "quant": "nf4"},
]


# columns of the tables with layers that are computed again: method, strategy, number of GPUs, optimizer
SCALING = [
    ("miss", "auto", 1, "adamw"),
    *(("miss", "deepspeed_stage_3", n, "adamw") for n in (2, 4, 8)),
    ("miss", "deepspeed_stage_3_offload", 1, "adamw"),
    ("none", "deepspeed_stage_2", 8, "adamw"),
    *(("none", "deepspeed_stage_3", n, "adamw") for n in (2, 4, 8)),
    ("none", "deepspeed_stage_3_offload", 1, "adamw"),
]
MOMENTS = [
    ("none", strategy, gpus, optimizer)
    for strategy, gpus in (("auto", 1), ("deepspeed_stage_3", 8))
    for optimizer in ("adamw", "adamw8bit")
]


def main() -> None:
    with one_line_errors():
        parser = Parser(prog="python -m scripts.memory_table", description=__doc__.partition("\n\n")[0])
        tables = parser.add_mutually_exclusive_group()
        for flag, line, text in (
            ("--cpu", cpu_row, "for a CPU"),
            ("--moments", moments_row, "for a whole model, with moments in fp32 and in 8 bits"),
            ("--scaling", scaling_row, "for several GPUs"),
        ):
            tables.add_argument(flag, action="store_const", dest="line", const=line, help=text)
        line = parser.parse_args(sys.argv[1:]).line or row
        print(HEADS[line], "|---" * (HEADS[line].count("|") - 1) + "|", sep="\n")
        for name, (n_layer, n_embd) in MODELS.items():
            print(line(name, n_layer, n_embd), flush=True)


def recomputed(runs: Sequence[tuple[str, str, int, str]], name: str, n_layer: int, n_embd: int) -> str:
    """Write a model's row: GiB of one process with MiSS r=64 or full training, bf16, recomputed layers, one
    row of 1024 tokens at a time."""
    arch = default_arch(7, n_layer, n_embd)
    run = ("cuda", "bf16", ROW, ROW)
    columns, steps = [], {}  # steps: counted once, because a step is the same under every strategy
    for method, strategy, gpus, optimizer in runs:
        kind = {"peft": method, "strategy": strategy, "devices": gpus, "optimizer": optimizer}
        config = Config(micro_bsz=1, grad_cp=1, **kind)
        steps[method] = steps.get(method) or step_bytes(arch, config, *run)
        columns.append(sum(memory_parts(arch, config, "gpu", *run, step=steps[method]).values()))
    return f"| RWKV-7 {name} | " + " | ".join(f"{size / GIB:.1f}" for size in columns) + " |"


def row(name: str, n_layer: int, n_embd: int) -> str:
    """Write a model's row: GiB on one GPU with MiSS r=64, one row of 1024 tokens at a time, on a bf16 base
    with layers kept or recomputed, and on an nf4 base."""
    arch = default_arch(7, n_layer, n_embd)
    trainable = model_on_meta(arch, Config().adapter).injection.trainable
    kept, *others = (
        memory_parts(arch, Config(micro_bsz=1, **run), "gpu", "cuda", "bf16", ROW, ROW) for run in RUNS
    )
    adapter = sum(kept[part] for part in ("trained", "gradients", "Adam"))
    columns = [kept["base"], adapter, *(sum(parts.values()) for parts in (kept, *others))]
    return (
        f"| RWKV-7 {name} | {n_layer} x {n_embd} | {trainable:,} | "
        + " | ".join(f"{size / GIB:.1f}" for size in columns)
        + " |"
    )


def cpu_row(name: str, n_layer: int, n_embd: int) -> str:
    """Write a model's row: GiB on a CPU with MiSS r=64 on an fp32 base, one row of 1024 tokens at a time."""
    arch = default_arch(7, n_layer, n_embd)
    columns = [
        sum(memory_parts(arch, Config(micro_bsz=1, **run), "cpu", "cpu", "fp32", ROW, ROW).values())
        for run in RUNS
    ]
    return f"| RWKV-7 {name} | " + " | ".join(f"{size / GIB:.1f}" for size in columns) + " |"


scaling_row, moments_row = (functools.partial(recomputed, runs) for runs in (SCALING, MOMENTS))
TOGETHER = "together | `--layers last:6` | `--grad_cp 2` | `--grad_cp 1` | `--grad_cp 1 --quant nf4` |"
HEADS = {
    row: f"| model | layers x width | MiSS r=64 parameters | base in bf16 | adapter state | {TOGETHER}",
    cpu_row: f"| model | {TOGETHER}",
    moments_row: "| | `adamw` | `adamw8bit` | stage 3 on 8 GPUs, `adamw` | `adamw8bit` |",
    scaling_row: "| | MiSS r=64, one GPU, or stage 1 on any number | stage 3: 2 GPUs | 4 | 8"
    " | `_3_offload`, 1 | `--peft none`: stage 2, 8 GPUs | stage 3: 2 | 4 | 8 | `_3_offload`, 1 |",
}

if __name__ == "__main__":
    main()
