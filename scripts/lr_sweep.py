"""Find the learning rate that suits a method and your data, by short trainings.

    python -m scripts.lr_sweep --load_model base.pth --data_file data.jsonl --proj_dir out/run
        [--rates 1e-5,1e-4,1e-3] [--steps 600] [any other flag of train.py]

Every rate trains the same model from the same start, with the same batches and its own whole schedule. Then
its loss on held-out documents is measured. Table and curves go to lr_sweep.json and lr_sweep.png in
--proj_dir (default: out); a run in that folder is not changed. The last line is the command that trains at
the best rate.

Exit code 0: there is a best rate. 1: no rate is better than not training. 2: the settings are wrong.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import sys
from collections.abc import Iterator

if not __package__:  # started as a file, so that Python does not find src
    raise SystemExit("error: run this from the repository's folder as python -m scripts.lr_sweep")

from src.common.startup import importing, naming_missing_packages

with importing():
    import torch
    from matplotlib.figure import Figure

    from rwkv_miss.errors import UserError, one_line_errors
    from rwkv_miss.flags import add_flags, flag, options, options_of
    from src.common.device import PRECISIONS
    from src.common.files import write_bytes, write_text
    from src.common.formatting import counted
    from src.config import Config, command, settle, validate
    from src.config.parse import flag_parser, read_flags
    from src.data.examples import Examples
    from src.data.fetch import fetch_inputs
    from src.model import RWKV
    from src.planning.base_model import build_model
    from src.planning.defaults import warm_up
    from src.planning.plan import Plan
    from src.reporting import data_text, plan_text
    from src.run import prepare
    from src.sources.base import Source
    from src.training.run_folder import CHECKPOINTS, list_checkpoints, output_path, require_folder
    from src.training.short_runs import Trial, held_out_loss, judge_of, trials, with_reference
    from src.training.validation_log import BEST

SETTINGS = ("lr_init", "state_lr")
STEPS = 600  # shorter trainings prefer rates that are too high for a run
FACTORS = (0.03, 0.1, 0.3, 1, 3, 10, 30)  # rates of the sweep, times --lr_init or the chosen rate
RESULTS, CURVES = "lr_sweep.json", "lr_sweep.png"


@options
class Own:
    """Flags of this program alone."""

    rates: str = flag(
        "",
        "learning rates to try [0.03 to 30 times --lr_init, or the chosen rate]",
        metavar="R,R,...",
    )
    steps: int = flag(0, f"optimizer steps of each training [the run's steps, at most {STEPS}]", low=0)
    setting: str = flag(SETTINGS[0], "the setting that --rates are values of [lr_init]", choices=SETTINGS)


def parse(argv: list[str]) -> tuple[Own, Config]:
    """Parse (this program's own flags, the run's settings)."""
    parser = flag_parser("python -m scripts.lr_sweep", __doc__.partition("\n\n")[0])
    add_flags(parser.add_argument_group("of the sweep alone"), Own)
    given = read_flags(parser, argv)
    ours, config = options_of(Own, given), settle(given)
    validate(config)
    check(ours, config)
    return ours, config


def check(ours: Own, config: Config) -> None:
    """Check the rules for a sweep, in addition to a run's."""
    read_rates(ours.rates)
    if ours.setting == "state_lr" and config.state_learning_rate is None:
        raise UserError(
            "--setting state_lr is for --train_parts state, an initial state with an adapter; all else"
            " learns at lr_init"
        )
    if config.world > 1:
        raise UserError(
            f"--devices {config.devices} and --num_nodes {config.num_nodes}: the sweep is one process on one"
            " device; leave them out, and give --global_bsz for the rows that a step of the run will have"
        )
    if config.init_only:
        raise UserError("--init_only trains nothing; drop it")
    if config.draws_answers:
        raise UserError(
            f"--loss {config.loss} has no sweep: its trainings make no rollouts. Run train.py at two or three"
            " rates (--lr_init) and compare what they measure on held-out questions"
        )


def read_rates(text: str) -> list[float]:
    """Read rising rates from "1e-4,1e-5"; [] for none."""
    try:
        rates = sorted({float(part) for part in text.split(",")}) if text else []
    except ValueError:
        rates = [math.nan]
    if not all(0 < rate <= 1e30 for rate in rates):
        raise UserError(
            f"--rates {text}: expected learning rates above 0 with commas between them, such as"
            " 1e-5,1e-4,1e-3"
        )
    return rates


def grid(centre: float) -> list[float]:
    """Return the rates of a sweep without --rates."""
    return [float(f"{factor * centre:.2g}") for factor in FACTORS]


def main() -> None:
    with one_line_errors(), naming_missing_packages():
        sys.exit(sweep(*parse(sys.argv[1:])))


def sweep(ours: Own, given: Config) -> int:
    """Train at every rate, print and write the results; returns 0 if a rate beats no training, else 1."""
    given = fetch_inputs(given)  # so that the printed command names the commits of the hub's files
    require_folder(given.proj_dir)
    # one process from a new start, whatever the run will use
    alone = dataclasses.replace(given, strategy="auto", resume="none")
    plan = prepare(alone, for_run=False)
    if not plan.data.held_out:
        raise UserError(
            "rates are compared by the loss on held-out documents, and there are none"
            f" ({plan.settings.origin_of('eval_split')}); give --eval_file, or --eval_split 0.05"
        )
    steps, config = steps_of_a_training(ours, given, plan.steps), plan.settings
    if given.is_automatic("warmup_steps"):  # a chosen warm-up is a share of each training, not of the run
        config = dataclasses.replace(config, warmup_steps=warm_up(steps))
    centre = config.state_learning_rate if ours.setting == "state_lr" else config.lr_init
    rates = read_rates(ours.rates) or grid(centre)
    torch.manual_seed(config.random_seed)
    model = build_model(config, plan.arch, plan.device.kernel, PRECISIONS[config.precision]).to(
        "cuda" if plan.device.accelerator == "gpu" else "cpu"
    )
    show_plan(plan, model)
    print(
        f"sweep      {ours.setting} at {counted(len(rates), 'rate')}, {counted(steps, 'step')} of"
        f" {counted(plan.schedule.rows_per_step, 'row')} each"
    )
    data, schedule, source = plan.data, plan.schedule, plan.source.having(config)
    documents, held_out = with_reference(model, source, data.documents, data.held_out, schedule, steps)
    before = loss_before(model, judge_of(source), held_out)
    show_header(ours.setting, source, before)
    done = []
    for trial in trials(model, source, documents, held_out, steps, ours.setting, rates):
        done.append(trial)
        print(line(trial, before), flush=True)
    shortened = given.epoch_steps if not ours.steps and plan.steps <= STEPS else 0
    if shortened:
        given = dataclasses.replace(given, epoch_steps=0)
    return conclude(ours.setting, given, before, done, steps, shortened)


def steps_of_a_training(ours: Own, config: Config, of_run: int) -> int:
    """Count the steps at every rate. Raises UserError if the warm-up takes all of them."""
    steps = ours.steps or min(of_run, STEPS)
    if config.settled().warmup_steps >= steps:
        raise UserError(
            f"--warmup_steps {config.warmup_steps} leaves a training of {counted(steps, 'step')} no step at"
            " its full rate; raise --steps, or drop the warm-up"
        )
    return steps


def show_plan(plan: Plan, model: RWKV) -> None:
    config, data, device = plan.settings, plan.data, plan.device
    print(plan_text.base(plan, plan_text.frozen_bytes(model)))
    print(f"trained    {plan_text.trained(config.peft, model)}")
    print(data_text.documents_line(plan), *data_text.sources(plan), sep="\n")
    for warning in data_text.cut_warnings(data.documents, config.ctx_len):
        print(f"warning    {warning}")
    print(
        f"held out   {counted(len(data.held_out), plan.source.loss.words.example)}, loss on"
        f" {counted(data.held_out.targets, 'token')}"
    )
    print(f"device     {device.accelerator}, {device.precision}, wkv kernel {device.kernel}")


def loss_before(model: RWKV, source: Source, held_out: Examples) -> float:
    """Compute the held-out loss before any training. Raises UserError if it is not finite."""
    before = held_out_loss(model, source, held_out)
    if not math.isfinite(before):
        raise UserError(
            f"the loss on the held-out documents is {before} before any training; the base, or --precision"
            f" {source.config.precision}, gives numbers that are not finite"
        )
    return before


def show_header(setting: str, source: Source, before: float) -> None:
    per = source.loss.metrics.loss_of
    print(
        f"{setting:>10} {'first':>9} {'last':>9} {'held out':>9}    loss, per {per}; last: mean of"
        " the last tenth of the steps"
    )
    if judge_of(source).loss is not source.loss:
        print(f"{'':>40}    held out: with the cross entropy of the chosen answers, which is not trained")
    print(f"{'none':>10} {'':>9} {'':>9} {before:9.4f}", flush=True)


def line(trial: Trial, before: float) -> str:
    """Write a row of the table."""
    held = f"{trial.deciding_loss:9.4f}" if trial.deciding_loss is not None else f"{'-':>9}"
    numbers = f"{trial.rate:>10g} {trial.losses[0]:9.4f} {trial.last:9.4f} {held}"
    return f"{numbers}    {verdict(trial, before)}".rstrip()


def verdict(trial: Trial, before: float) -> str:
    """Say whether a training diverged, or only made the held-out loss worse; "" for neither."""
    if trial.deciding_loss is None:
        return f"diverged: not finite after {counted(len(trial.losses), 'step')}"
    if trial.deciding_loss < before:
        return ""
    return "diverged: both losses rose" if trial.last > trial.losses[0] else "worse than before"


def conclude(
    setting: str, given: Config, before: float, done: list[Trial], steps: int, shortened: int = 0
) -> int:
    """Write the files, and print the best rate with the command of a run over the whole data. `shortened`:
    the --epoch_steps that made the sweep short, else 0."""
    best = min(
        (trial for trial in done if not verdict(trial, before)),
        key=lambda trial: trial.deciding_loss,
        default=None,
    )
    best_command = command(dataclasses.replace(given, **{setting: best.rate})) if best else None
    results = {
        "setting": setting,
        "steps": steps,
        "held_out_before": before,
        "best": best.rate if best else None,
        "command": best_command,
        "trials": [
            {
                "rate": trial.rate,
                "first": trial.losses[0],
                "last": trial.last,
                "held_out": trial.deciding_loss,
                "diverged": verdict(trial, before).startswith("diverged"),
                "losses": trial.losses,
            }
            for trial in done
        ],
    }
    os.makedirs(given.proj_dir, exist_ok=True)
    write_text(path := os.path.join(given.proj_dir, RESULTS), json.dumps(finite(results), indent=1))
    draw(setting, before, done, image := os.path.join(given.proj_dir, CURVES))
    print(f"wrote      {path}, {image}")
    if best is None:
        print(f"no rate is better than not training; try lower ones: --rates {further(done[0].rate, -1)}")
        return 1
    print(f"best       {setting} {best.rate:g}: held-out loss {before:.4f} to {best.deciding_loss:.4f}")
    for note in notes(best, given, done, shortened):
        print(f"note       {note}")
    print(best_command)
    return 0


def notes(best: Trial, given: Config, done: list[Trial], shortened: int) -> Iterator[str]:
    """Yield caveats: the best rate is at the edge, the trainings were shortened, the folder holds a run."""
    for end, step, word in ((done[0], -1, "lowest"), (done[-1], 1, "highest")):
        if best is end:
            beyond = further(best.rate, step)
            yield f"it is the {word} rate tried; one beyond may be better: --rates {beyond}"
    if shortened:
        yield f"--epoch_steps {shortened} made the sweep short; the command has a run over the whole data"
    if holds_run(given):
        yield (
            f"{given.proj_dir} holds a run already, which stays as it is; give the command another --proj_dir"
        )


def holds_run(config: Config) -> bool:
    """Tell whether train.py would refuse to start a run in the folder."""
    files = (output_path(config.proj_dir, config.peft), os.path.join(config.proj_dir, BEST))
    return any(map(os.path.exists, files)) or bool(
        list_checkpoints(os.path.join(config.proj_dir, CHECKPOINTS))
    )


def finite(value):
    """Replace NaN and infinity, which JSON lacks, by None, also inside dicts and lists."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def further(rate: float, direction: int) -> str:
    """List the rate and three rates beyond it, in the spacing of FACTORS."""
    return ",".join(f"{rate * 10 ** (direction * i / 2):.2g}" for i in range(4))


def draw(setting: str, before: float, done: list[Trial], path: str) -> None:
    """Draw a PNG: the final losses over the rates, and every training's running mean over its steps."""
    figure = Figure(figsize=(11, 4))
    left, right = figure.subplots(1, 2)
    ended = [trial for trial in done if trial.deciding_loss is not None]
    left.plot(
        [trial.rate for trial in ended], [trial.deciding_loss for trial in ended], "o-", label="held out"
    )
    left.plot(
        [trial.rate for trial in ended],
        [trial.last for trial in ended],
        "s--",
        alpha=0.6,
        label="training, last tenth",
    )
    left.axhline(before, color="grey", linestyle=":", label="held out, before")
    top = max(before, *(trial.losses[0] for trial in done))
    left.set(
        xscale="log",
        xlim=(done[0].rate / 2, done[-1].rate * 2),
        ylim=(None, 1.2 * top),
        xlabel=setting,
        ylabel="loss (nats per token)",
    )
    for trial in done:
        losses = [min(loss, 2 * top) for loss in trial.losses if math.isfinite(loss)]
        window = max(1, len(losses) // 20)
        mean = [sum(losses[max(0, i - window) : i]) / min(i, window) for i in range(1, len(losses) + 1)]
        right.plot(range(1, len(mean) + 1), mean, label=f"{trial.rate:g}")
    right.set(xlabel="optimizer step", ylim=(None, 1.2 * top))
    left.legend()
    right.legend(title=setting, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120, bbox_inches="tight")
    write_bytes(path, image.getvalue())


if __name__ == "__main__":
    main()
