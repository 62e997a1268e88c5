"""Table 5, Fig. 3 left: tokens a second and peak memory of training RWKV-6 with MiSS, LoRA, PiSSA and DoRA of
as many parameters.

The paper trained RWKV6-3B on one RTX 4090, one row of 512 tokens, bf16. On a CPU the default is RWKV-6 12 x
768 with random weights in fp32; on a GPU `--model rwkv6-3b` is the paper's. A step is forward, loss, backward
and AdamW, with this project's model and kernels for all methods, so that only the adapters differ. `peft
lora` is HF peft's LoRA in the same step.

On a CPU the methods take turns, and a time is the CPU time of one thread in the fastest round; on a GPU they
run one after the other, because they would not fit together. Speeds are compared round by round: the median
ratio and its 95 % interval.

Memory is the highest in two steps of a fresh process, with the weights; the largest of three processes.
"""

from __future__ import annotations

import copy
import dataclasses
import multiprocessing
import statistics
import time
from collections.abc import Callable

import torch

import rwkv_miss
from rwkv_miss.target_checks import find_targets
from src import ops
from src.common.freed_memory import release_freed
from src.model import RWKV

from ..common import peak_above_start, timed
from ..step import add_peft, random_base, training_step
from .methods import systems
from .metrics import median_and_interval
from .results import Claim, PaperResult, Table, require_package
from .settings import option

MODELS = {
    "rwkv6-tiny": (6, 2, 64, 97),
    "rwkv6-12x768": (6, 12, 768, 65536),
    "rwkv7-12x768": (7, 12, 768, 65536),
    "rwkv6-3b": (6, 32, 2560, 65536),
}
PAPER = {"lora": (3.62e3, 12074), "miss": (3.99e3, 11052)}  # Table 5: tokens/s and MB
PEFT = "peft lora"
AGREES = 0.5  # the share of the paper's gain that must be found here


@dataclasses.dataclass(frozen=True)
class Settings:
    model: str = option("rwkv6-12x768", f"of {', '.join(MODELS)}")
    methods: tuple[str, ...] = option(("miss", "lora", "pissa", "dora", PEFT), "what is compared")
    rank: int = option(
        32,
        "LoRA's rank; the others have as many parameters, MiSS twice the rank (the paper: 55.1 M on"
        " RWKV6-3B)",
    )
    ctx_len: int = option(512, "tokens of a step")
    device: str = option("cpu", "cpu, one thread in fp32, or cuda, in bf16")
    rounds: int = option(15, "steps that are timed")


FULL = Settings()
TINY = Settings(model="rwkv6-tiny", methods=("miss", "lora"), rank=4, ctx_len=24, rounds=1)


def make_base(settings: Settings) -> RWKV:
    """Make a frozen random model on the device, in the dtype that it trains in there."""
    version, n_layer, n_embd, vocab_size = MODELS[settings.model]
    torch.manual_seed(0)
    kernel, _ = ops.choose("auto", settings.device)
    with torch.device(settings.device):
        model = random_base(version, n_layer, n_embd, vocab_size, kernel)
    return model.to(torch.float32 if settings.device == "cpu" else torch.bfloat16)


def adapt(model: RWKV, label: str, rank: int) -> RWKV:
    """Put an adapter into the model, in place."""
    if label == PEFT:
        add_peft(model, PEFT, 2 * rank)
    else:
        method, options = systems(rank)[label]
        rwkv_miss.inject(model, method, **options)
    return model


def copy_of(base: RWKV) -> RWKV:
    """Copy a base, with new memory for the weights to adapt, which a method may change."""
    own = {id(linear.weight) for linear in find_targets(base, None).values()}
    return copy.deepcopy(base, {id(p): p for p in base.parameters() if id(p) not in own})


def make_step(model: RWKV, settings: Settings) -> Callable[[], None]:
    ids = torch.randint(model.arch.vocab_size, (1, settings.ctx_len + 1), device=settings.device)
    step = training_step(model, ids, torch.arange(settings.ctx_len, device=settings.device))
    return step if settings.device == "cpu" else lambda: (step(), torch.cuda.synchronize())


def peak(settings: Settings, label: str) -> tuple[int, int]:
    """Return (bytes of the model with its buffers, most bytes above it in two steps); to be called in a fresh
    process.
    """
    torch.set_num_threads(1)
    model = adapt(make_base(settings), label, settings.rank)
    step = make_step(model, settings)
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    if settings.device == "cpu":
        release_freed()
        return held, peak_above_start(lambda: (step(), step()))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    step()
    return held, torch.cuda.max_memory_allocated() - before


def in_fresh_process(function: Callable, *args):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def seconds(settings: Settings) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Measure seconds of every timed step, and trained parameters, by label."""
    base = make_base(settings)
    together = settings.device == "cpu"
    found: dict[str, list[float]] = {label: [] for label in settings.methods}
    parameters = {}
    for group in [settings.methods] if together else [[label] for label in settings.methods]:
        models = {label: adapt(copy_of(base), label, settings.rank) for label in group}
        parameters |= {
            label: sum(p.numel() for p in model.parameters() if p.requires_grad)
            for label, model in models.items()
        }
        steps = {label: make_step(model, settings) for label, model in models.items()}
        for turn in range(settings.rounds + 2):  # the first two rounds warm up
            for label, step in steps.items():
                taken = timed(step) if together else wall(step)
                found[label] += [taken] if turn > 1 else []
        del models, steps
    return found, parameters


def wall(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@dataclasses.dataclass(frozen=True)
class Row:
    """One method: trained parameters, seconds of a step, bytes of the model, most bytes above the model."""

    parameters: int
    seconds: float
    held: int
    above: int

    @property
    def total(self) -> int:
        return self.held + self.above


Interval = tuple[float, float, float]  # a median, and the ends of its 95 % interval


def table(rows: dict[str, Row], speeds: dict[str, Interval], ctx_len: int) -> Table:
    """Make a row for each method. `speeds`: multiples of LoRA's speed."""
    lora = rows["lora"]
    columns = "method|parameters|step s|tokens/s|speed / lora|95 % interval|the paper's|peak MB".split("|")
    columns += ["above weights MB", "peak / lora", "the paper's peak / lora", "above / lora"]
    cells = []
    for label, row in rows.items():
        speed, memory = (
            (ours / theirs for ours, theirs in zip(PAPER[label], PAPER["lora"]))
            if label in PAPER
            else (None, None)
        )
        ratio, low, high = speeds[label]
        cells.append(
            (
                label,
                row.parameters,
                row.seconds,
                ctx_len / row.seconds,
                ratio,
                f"{low:.3f} to {high:.3f}",
                speed,
                row.total / 1e6,
                row.above / 1e6,
                row.total / lora.total,
                memory,
                row.above / lora.above,
            )
        )
    return Table("Training steps on one row", columns, cells)


def above(interval: Interval, asked: float) -> bool | None:
    """Tell whether a measured ratio is at least `asked`; None if `asked` is inside the interval."""
    _, low, high = interval
    if low < asked <= high:
        return None
    return low >= asked


def described(interval: Interval) -> str:
    ratio, low, high = interval
    return f"{ratio:.3f} times (95 % interval {low:.3f} to {high:.3f})"


def claims(rows: dict[str, Row], speeds: dict[str, Interval], settings: Settings) -> list[Claim]:
    """Compare with the paper. `speeds`: MiSS's speed over LoRA's and, if measured, over peft's LoRA's."""
    miss, lora = rows["miss"], rows["lora"]
    memory = miss.total / lora.total
    paper_speed, paper_memory = (ours / theirs for ours, theirs in zip(PAPER["miss"], PAPER["lora"]))
    asked = 1 + AGREES * (paper_speed - 1)
    agrees = above(speeds["lora"], asked)
    found = [
        Claim(
            "MiSS trains 1.10 times as many tokens a second as LoRA (Table 5)",
            f"{described(speeds['lora'])}, {settings.model} on {settings.device}; "
            f"half of the gain is {asked:.3f}{', inside the interval: open' if agrees is None else ''}",
            agrees,
        ),
        Claim(
            "MiSS takes 0.915 of LoRA's memory (Table 5)",
            f"{memory:.3f}, and {miss.above / lora.above:.3f} of what is above the weights",
            1 - memory >= AGREES * (1 - paper_memory),
        ),
    ]
    if PEFT in rows:
        found.append(
            Claim(
                "(its LoRA may be another)",
                f"against HF peft's LoRA: {described(speeds[PEFT])} the tokens a second, "
                f"{miss.total / rows[PEFT].total:.3f} of the memory",
            )
        )
    return found


def draw(rows: dict[str, Row], ctx_len: int, figure) -> None:
    speed, memory = figure.subplots(1, 2, sharey=True)
    names = list(rows)
    speed.barh(names, [ctx_len / row.seconds for row in rows.values()], color="#4c78a8")
    speed.set_title("tokens a second")
    memory.barh(names, [row.held / 1e6 for row in rows.values()], color="#bab0ac", label="weights")
    memory.barh(
        names,
        [row.above / 1e6 for row in rows.values()],
        left=[row.held / 1e6 for row in rows.values()],
        color="#f58518",
        label="above them",
    )
    memory.set_title("peak memory, MB")
    memory.legend()
    speed.invert_yaxis()


def check(settings: Settings) -> None:
    """Raise UserError for settings that can't run, before anything is built."""
    labels = [*systems(1), PEFT]
    unknown = [label for label in settings.methods if label not in labels]
    if unknown or not {"miss", "lora"} <= set(settings.methods):
        raise rwkv_miss.UserError(
            f"--methods takes miss, lora and any of: {'; '.join(labels)}; got {' '.join(settings.methods)}"
        )
    if PEFT in settings.methods:
        require_package("peft", PEFT)
    if settings.model not in MODELS:
        raise rwkv_miss.UserError(f"--model {settings.model} is unknown; choose one of: {', '.join(MODELS)}")
    if settings.device not in ("cpu", "cuda") or settings.device == "cuda" and not torch.cuda.is_available():
        raise rwkv_miss.UserError(
            f"--device {settings.device} can't be used here; cpu can"
            + (", cuda, too" if torch.cuda.is_available() else "")
        )


def run(settings: Settings) -> PaperResult:
    check(settings)
    torch.set_num_threads(1)
    # the maximum, because sampling can miss a short peak on a busy machine, but never shows too much
    peaks = {
        label: max(in_fresh_process(peak, settings, label) for _ in range(min(settings.rounds, 3)))
        for label in settings.methods
    }
    taken, parameters = seconds(settings)
    of_one = min if settings.device == "cpu" else statistics.median
    rows = {label: Row(parameters[label], of_one(taken[label]), *peaks[label]) for label in settings.methods}

    def speed(label: str, other: str) -> Interval:
        return median_and_interval([b / a for a, b in zip(taken[label], taken[other], strict=True)])

    of_lora = {label: speed(label, "lora") for label in rows}
    of_miss = {label: speed("miss", label) for label in rows}
    clock = (
        "CPU time of one thread, fp32, the fastest step"
        if settings.device == "cpu"
        else "wall time, bf16, the median step"
    )
    return PaperResult(
        "Resources: tokens a second and peak memory (Table 5, Fig. 3 left)",
        f"{settings.model} with random weights on {settings.device}, one row of {settings.ctx_len} tokens,"
        f" {clock} of {settings.rounds}. Memory is the most that was seen in two steps, of three processes,"
        " weights included. All rows have the same model, loss and kernels: the paper measured whole"
        " programs, RWKV6-3B in bf16 on one RTX 4090. `peft lora` is HF peft's LoRA in the same step. Speeds"
        " are medians of the ratios of steps that ran one after the other, with 95 % intervals. Agrees: at"
        " least half of the paper's gain was found, by the whole interval.",
        claims(rows, of_miss, settings),
        [table(rows, of_lora, settings.ctx_len)],
        lambda figure: draw(rows, settings.ctx_len, figure),
        {"seconds": taken},
    )
