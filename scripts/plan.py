"""Print a run's memory and time, before anything is loaded.

    python -m scripts.plan --load_model base.pth --data_file data.jsonl --accelerator gpu --memory 24GB

All flags of train.py are accepted. Sizes come from the checkpoint's header. The data is tokenised, and a
training step is counted on tensors without memory. With --json the last line is JSON.

Exit code 0: the run fits. 1: it does not fit, and the cheapest change that makes it fit is named. 2: the
settings are wrong.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys

if not __package__:  # started as a file, so that Python does not find src
    raise SystemExit("error: run this from the repository's folder as python -m scripts.plan")

from src.common.startup import Start, importing, naming_missing_packages

with importing():
    from rwkv_miss.errors import UserError, one_line_errors
    from rwkv_miss.files.hub_names import recorded
    from rwkv_miss.flags import add_flags, flag, options, options_of
    from rwkv_miss.progress import Progress, duration_text
    from src import ops
    from src.common.available_memory import parse_size
    from src.common.formatting import counted, size_text
    from src.config import Config, settle
    from src.config.launcher import starts_others
    from src.config.parse import flag_parser, read_flags
    from src.config.schema import CHOSEN, FIELDS
    from src.model import RWKV
    from src.planning.defaults import cheapest_fix
    from src.planning.launches import slow_line
    from src.planning.memory import USABLE, needed
    from src.planning.plan import Cost, Device, Plan, device_here, estimate, run_cost
    from src.planning.step_memory import model_on_meta
    from src.planning.throughput import speed_here
    from src.reporting import data_text, plan_text
    from src.run import prepare
    from src.sources import source_of
    from src.sources.estimates import Speed


@options
class Own:
    """Flags of this program alone, and its start."""

    memory: str = flag(
        "",
        "memory of one device, such as 24GB [the free memory of this machine's device]; with it,"
        " --accelerator gpu describes a GPU that need not be here",
        metavar="SIZE",
    )
    tokens_per_second: float = flag(0.0, "speed of the whole run, from which its time is estimated", low=0)
    metrics: str = flag(
        "",
        "metrics.jsonl of an earlier run like this one, from which its speed is taken",
        metavar="FILE",
    )
    json: bool = flag(False, "print a last line for machines")
    start: Start = dataclasses.field(default_factory=Start.of_process)


def parse(argv: list[str]) -> tuple[Own, Config]:
    """Parse the command line; returns (this program's own flags, the run's settings)."""
    parser = flag_parser("python -m scripts.plan", __doc__.partition("\n\n")[0])
    add_flags(parser.add_argument_group("of the plan alone"), Own)
    given = read_flags(parser, argv)
    return options_of(Own, given), settle(given)


def main() -> None:
    with one_line_errors(), naming_missing_packages():
        sys.exit(plan(*parse(sys.argv[1:])))


def plan(ours: Own, config: Config) -> int:
    """Print the plan; returns 0 if the run fits, else 1."""
    counted_plan = count(ours, config)
    lines = shown(counted_plan)
    print(*lines, sep="\n")
    if ours.json:
        print(json.dumps({**for_machines(counted_plan), "lines": lines}))
    return 0 if counted_plan.fix == {} else 1


@dataclasses.dataclass(frozen=True)
class Needs:
    """Needs of a run. `fix`: the flags that make it fit; {} if it fits already, None if no fix is known."""

    plan: Plan
    model: RWKV  # on the meta device
    memory: dict[str, int]
    fix: dict[str, object] | None
    speed: Speed
    cost: Cost


def count(ours: Own, typed: Config) -> Needs:
    """Plan a run, and count its needs."""

    def device_of(config: Config, head_size: int) -> Device:
        return planned_device(ours.memory, config, head_size)

    with Progress("reading the base and the data"):
        plan = prepare(typed, for_run=False, device=device_of)
    config, arch, device, schedule = plan.settings, plan.arch, plan.device, plan.schedule

    def memory_of(settings: Config) -> dict[str, float]:
        return estimate(settings, arch, schedule, plan.data.documents)

    def fits(changed: Config) -> bool:
        return needed(memory_of(changed), changed.devices, device.accelerator) <= USABLE * device.memory

    with Progress("counting the memory of a step"):
        fix = cheapest_fix(config, config.precision, max(schedule.lengths), fits)
    if fix and "chunk_ctx" in fix and typed.is_automatic("ctx_len"):
        fix["ctx_len"] = config.ctx_len  # with chunks an automatic ctx_len would be longer, without a bound
    with Progress("timing this machine"):
        speed = find_speed(ours, plan)
        model, cost = model_on_meta(arch, config.adapter), run_cost(plan, speed)
    if not (
        ours.tokens_per_second or ours.metrics
    ):  # a given speed may be another machine's, whose loading time is not known
        cost = cost.with_loading(ours.start.loading(starts_others(config)))
    return Needs(plan, model, memory_of(config), fix, speed, cost)


def shown(found: Needs) -> list[str]:
    """Write the lines of the plan."""
    plan, cost = found.plan, found.cost
    config, device, data = plan.settings, plan.device, plan.data
    source = source_of(config)
    warnings = [
        *data.found.warnings(),
        *data_text.cut_warnings(data.documents, config.ctx_len),
        *source.warnings(data.documents, plan.tokenizer),
    ]
    bound = "estimated, at most" if cost.provided else "estimated"
    slow = slow_line(plan)
    return [
        *([slow] if slow else []),
        plan_text.base(plan, found.memory["base"]),
        f"trained    {plan_text.trained(config.peft, found.model)}",
        data_text.documents_line(plan),
        *data_text.sources(plan),
        plan_text.steps(plan),
        *source.lines(data.documents, plan.schedule, plan.arch),
        plan_text.evaluation(plan, cost),
        f"device     {device.accelerator}, {device.precision}, wkv kernel {device.kernel}, strategy"
        f" {config.strategy}",
        *plan_text.chosen(plan),
        *(f"warning    {line}" for line in warnings),
        f"memory     of one {'process' if device.accelerator == 'cpu' else 'GPU'}, {bound}",
        # without parts of less than a byte, which are rounding errors
        *(f"           {name:<12} {size_text(size):>10}" for name, size in found.memory.items() if size >= 1),
        f"           together     {size_text(cost.memory):>10}; there are {size_text(device.memory)}, of"
        f" which {USABLE:.0%} count",
        f"time       {describe_time(cost, found.speed)}",
        *plan_text.advice(plan, cost),
        f"verdict    {describe_fix(found.fix, config)}",
    ]


def for_machines(found: Needs) -> dict[str, object]:
    """Return the plan for --json."""
    parameters = list(found.model.parameters())
    total = sum(p.numel() for p in parameters)
    config = found.plan.settings
    reasons = {name: config.origin_of(name).partition(": ") for name in FIELDS}
    return {
        "parameters": total,
        "base_parameters": total if config.peft == "none" else found.model.injection.total,
        "trained_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "memory": {name: int(size) for name, size in found.memory.items()},
        "memory_together": int(found.cost.memory),
        "memory_there": found.plan.device.memory,
        "fits": found.fix == {},
        "fix": found.fix,
        "documents": len(found.plan.data.documents),
        "tokens": int(found.cost.tokens),
        "steps": found.plan.steps,
        "tokens_per_second": found.speed.tokens,
        "seconds": found.cost.seconds or None,
        "evaluation_seconds": found.cost.evaluation_seconds or None,
        "reference_seconds": found.cost.reference_seconds or None,
        "drawing_seconds": found.cost.drawing_seconds or None,
        "loading_seconds": found.cost.loading_seconds or None,
        "evaluated_documents": len(found.plan.evaluated),
        "speed_from": found.speed.source,
        "chosen": {
            name: {"value": recorded(config.written(name)), "why": why}
            for name, (kind, _, why) in reasons.items()
            if kind == CHOSEN
        },
    }


def planned_device(memory: str, config: Config, head_size: int) -> Device:
    """Return the device at hand, or the one that --memory and --accelerator gpu describe: a GPU with bf16
    and tensor cores."""
    size = parse_size(memory) if memory else 0
    if not size or config.accelerator != "gpu":
        return dataclasses.replace(device_here(config, head_size), memory=size)
    kernel = config.wkv
    if kernel == "auto":
        kernel = "torch" if ops.head_size_problem(head_size) else "cuda"
    precision = "bf16" if config.precision == "auto" else config.precision
    return Device("gpu", precision, "a GPU of today", kernel, "the fastest kernel", size, here=False)


def find_speed(ours: Own, plan: Plan) -> Speed:
    """Find the speed of the whole run: given by a flag, recorded in --metrics, or measured."""
    if ours.tokens_per_second > 0:
        return Speed(ours.tokens_per_second, source="as given")
    if ours.metrics:
        return Speed(recorded_speed(ours.metrics), source=f"the median of {ours.metrics}")
    if not plan.device.here:
        return Speed(0.0, source="the device is not here")
    return speed_here(plan)


def recorded_speed(path: str) -> float:
    """Read the median speed of a run's steps, without the first, which is slower."""
    try:
        with open(path, encoding="utf-8") as file:
            return statistics.median([json.loads(line)["tokens_per_second"] for line in file][1:])
    except (OSError, ValueError, KeyError, TypeError):  # an empty list is a ValueError
        raise UserError(
            f"--metrics {path}: expected the metrics.jsonl of a run of at least 2 steps"
        ) from None


def describe_time(cost: Cost, speed: Speed) -> str:
    if not speed.tokens:
        return f"not known, {speed.source}; give --tokens_per_second, or the --metrics of an earlier run"
    parts = "".join(f", {time} of {part}" for part, time in cost.parts.items())
    return (
        f"about {duration_text(cost.seconds)} for {counted(round(cost.tokens), 'token')} at"
        f" {speed.tokens:,.0f} tokens/s{parts} ({'; '.join(filter(None, (speed.source, cost.provided)))})"
    )


def describe_fix(fix: dict[str, object] | None, config: Config) -> str:
    if fix == {}:
        return "it fits"
    if fix is None:
        more = "a lower rank" if config.peft != "none" else "--peft miss, which trains few parameters"
        return (
            "it does not fit, nor with fewer rows at once, recomputing, chunks, bf16, nf4 or stage 3: take"
            f" {more}, another model or device"
        )
    flags = " ".join(
        f"--{name} {int(value) if isinstance(value, bool) else value}" for name, value in fix.items()
    )
    return f"it does not fit; add {flags}"


if __name__ == "__main__":
    main()
