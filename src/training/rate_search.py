"""Search for a learning rate before the first step.

Trials of a few steps train from the run's own start on the run's own first rows, each at one rate. They begin
with three around the first guess and go on until the best rate has a worse one on both sides. Afterwards the
model, its random numbers and the order of the data are as if there had been no search.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import time
from collections.abc import Callable

import numpy as np

from rwkv_miss.errors import UserError
from rwkv_miss.progress import Progress, say

from ..common.files import write_text
from ..common.formatting import counted
from ..config import save
from ..data.examples import Examples
from ..data.held_out import affordable, in_hash_order
from ..distributed.process_group import Processes, processes_of
from ..objectives.kinds import objective_of
from ..planning.defaults import MOST_TRIALS, TRIAL_STEPS, TRIAL_WARM_UP, first_guess
from ..planning.draft import Draft
from ..planning.plan import Plan
from .run_folder import CONFIG, RATE_SEARCH
from .short_runs import Trial, put_back, train, trial_of

BAR = 20  # characters of the longest bar


@dataclasses.dataclass(frozen=True)
class Found:
    """Search that is done."""

    guess: float  # the rate near which it began
    rate: float  # the one with the lowest loss
    at_end: bool  # whether the best rate is the first or the last one that was tried
    before: float | None  # the loss before any training; None where it is not finite
    steps: int  # of each trial
    seconds: float  # of the whole search
    loss_of: str  # "held-out" documents, or "training" rows; for a preference also what is added
    trials: list[Trial]  # in the order of their rates


def enclose(loss_at: Callable[[float], float], first: float, most: int) -> dict[float, float]:
    """Return the losses of at most `most` rates: three around `first`, then beyond the end that is best.

    The rates are 1 and 3 of every decade, the middle one is next to `first`. They end when the best one has a
    worse one on both sides. Both sides are tried, because a loss may fall again above a valley. A loss is
    infinite if the training diverged.
    """
    middle = round(2 * math.log10(first))
    low, high = middle - 1, middle + 1
    tried = {rung(k): loss_at(rung(k)) for k in (middle, low, high)}
    while len(tried) < most:
        best = best_of(tried)
        if best == rung(high):
            high += 1
        elif best == rung(low):
            low -= 1
        else:
            break
        new = rung(high) if rung(high) not in tried else rung(low)
        tried[new] = loss_at(new)
    return dict(sorted(tried.items()))


def rung(k: int) -> float:
    """Return rate number k: 0.001 for -6, 0.003 for -5, 0.01 for -4."""
    decade, half = divmod(k, 2)
    return float(f"{3 if half else 1}e{decade}")


def best_of(tried: dict[float, float]) -> float:
    """Return the rate with the lowest loss, of equal ones the lowest rate."""
    return min(tried, key=lambda rate: (tried[rate], rate))


def found_of(
    tried: dict[float, float],
    done: list[Trial],
    guess: float,
    before: float | None,
    seconds: float,
    loss_of: str,
) -> Found:
    """Make the result of the losses by rate. Raises UserError if every trial diverged."""
    best = best_of(tried)
    if math.isinf(tried[best]):
        raise UserError(
            f"no rate from {min(tried):g} to {max(tried):g} has a finite loss after {TRIAL_STEPS} steps;"
            " check the data and the base, or give a rate as --lr_init"
        )
    trials = sorted(done, key=lambda trial: trial.rate)
    at_end = best in (min(tried), max(tried))
    return Found(guess, best, at_end, before, TRIAL_STEPS, seconds, loss_of, trials)


class RateSearch:
    """Search for a run's rate inside its trainer, when its processes are connected.

    The loss on held-out documents, by judged_by(), decides. If none are held out, it is the loss on the rows
    of the first step after a trial's last one that has a trained token. `draft` has the run's settings, with
    the rate once it is found.
    """

    def __init__(self, plan: Plan):
        self.config, self.draft = plan.settings, Draft(plan.settings)
        self.guess = first_guess(plan.settings, plan.arch)

    def run(self, module) -> float:
        """Return the rate. All ranks take part, and find the same."""
        trainer = module.trainer
        if trainer.strategy.root_device.type == "cuda":
            module.model.to(trainer.strategy.root_device)
        found = self._search(module, processes_of(trainer), trainer.is_global_zero)
        rate = trainer.strategy.broadcast(found.rate)
        self.draft.choose("lr_init", rate, reason(found))
        if trainer.is_global_zero:
            folder = self.config.proj_dir
            lines = search_table(as_json(found))
            write_text(os.path.join(folder, RATE_SEARCH), json.dumps(as_json(found), indent=1))
            save(self.draft.config, os.path.join(folder, CONFIG), lines)
            say("\n".join(lines))
        return rate

    def _search(self, module, processes: Processes, shown: bool) -> Found:
        """Do the trials."""
        model, config = module.model, self.config
        documents, loss_of = self._deciding(module), "held-out" if module.data.evaluated else "training"
        objective = objective_of(config)
        judge = objective.judged_by()
        if judge is not objective:
            loss_of += f" {config.loss} and cross-entropy"
        done: list[Trial] = []
        begun = time.perf_counter()
        with Progress("searching the learning rate", MOST_TRIALS * TRIAL_STEPS, "steps", shown) as bar:

            def loss_at(rate: float) -> float:
                tried = dataclasses.replace(
                    config, lr_init=rate, warmup_steps=TRIAL_WARM_UP, lr_schedule="constant"
                )
                losses = []
                with put_back(model):
                    for loss in train(model, tried, module.data.documents, TRIAL_STEPS, processes):
                        losses.append(loss)
                        bar.update(1, f"rate {rate:g}, loss {loss:.4f}")
                    done.append(trial_of(model, judge, rate, losses, documents, processes))
                if config.verbose and shown:
                    say(trial_text(done[-1], loss_of))
                return math.inf if done[-1].deciding_loss is None else done[-1].deciding_loss

            with put_back(model):
                start = trial_of(model, judge, 0.0, [0.0], documents, processes)
            tried = enclose(loss_at, self.guess, MOST_TRIALS)
        seconds = time.perf_counter() - begun
        before = start.deciding_loss
        return found_of(tried, done, self.guess, before, seconds, loss_of)

    def _deciding(self, module) -> Examples:
        """Choose the documents judged after each trial; reading them takes a tenth of the search."""
        schedule, evaluated = module.schedule, module.data.evaluated
        if not evaluated:
            step = next(filter(schedule.step_targets, itertools.count(TRIAL_STEPS)))
            rows = [schedule.rows[row] for row in schedule.step_rows(step)]
            return module.data.documents.take(np.sort([i for row in rows for i in row]))
        tokens = sum(schedule.step_tokens(step) for step in range(TRIAL_STEPS)) * MOST_TRIALS
        order = in_hash_order(evaluated, self.config.random_seed)
        count = affordable(evaluated, order, tokens, MOST_TRIALS + 1)
        return evaluated.take(np.sort(order[:count]))


def as_json(found: Found) -> dict:
    """Convert the search to its form in the run's folder; a loss that is not finite is null."""
    trials = [
        {
            "rate": trial.rate,
            "losses": [loss if math.isfinite(loss) else None for loss in trial.losses],
            "loss": trial.deciding_loss,
        }
        for trial in found.trials
    ]
    return {**dataclasses.asdict(found), "reason": reason(found), "trials": trials}


def recorded_search(folder: str) -> dict | None:
    """Read the search of the run in a folder; None for a run without a search.

    Raises UserError for a file that is damaged.
    """
    path = os.path.join(folder, RATE_SEARCH)
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); remove it, as only the run card needs it") from None


def reason(found: Found) -> str:
    """Say why this rate is taken."""
    trials = counted(len(found.trials), "trial")
    end = "; the best is the last rate that was tried, and one beyond may be better" if found.at_end else ""
    return f"the lowest loss of {trials} before step 1{end}"


def search_table(search: dict | None) -> list[str]:
    """Write the trials as lines with bars that show how far the loss fell; [] without a search."""
    if search is None:
        return []
    before, trials = search["before"], search["trials"]
    losses = [trial["loss"] for trial in trials]
    start = "not finite" if before is None else f"{before:.4f}"
    after = f"after {counted(search['steps'], 'step')} at each rate:"
    what = search["loss_of"].capitalize()
    lines = [f"lr {search['rate']:g}: {search['reason']}. {what} loss {start} before, and {after}"]
    fallen = [before - loss for loss in losses if None not in (before, loss)]
    most = max(fallen, default=0.0)
    for trial, loss in zip(trials, losses, strict=True):
        line = f"{trial['rate']:>10g}  {'diverged' if loss is None else f'{loss:.4f}'}"
        if most > 0 and loss is not None:
            line += f"  {'#' * round(BAR * max(before - loss, 0.0) / most)}"
        lines.append(line.rstrip())
    return lines


def trial_text(trial: Trial, loss_of: str) -> str:
    """Write a trial with the loss of each step, for --verbose."""
    steps = " ".join(f"{loss:.4f}" for loss in trial.losses)
    end = "diverged" if trial.deciding_loss is None else f"{loss_of} loss {trial.deciding_loss:.4f}"
    return f"trial      rate {trial.rate:g}: {steps}; {end}"
