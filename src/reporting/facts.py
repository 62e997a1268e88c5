"""Facts of a run for its verdict and its warnings, from settings and logs alone."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Collection, Mapping, Sequence

from ..config import Settled
from ..evaluation.rewards import RANGES
from ..losses import loss_of
from ..losses._preference import ACCURACIES
from ..losses.metrics import percent
from ..training.validation_log import any_right, evaluation_at, is_over, is_worse

WINDOW = 10  # steps that are averaged
GROUPS = 16  # groups that tell enough in fewer steps, where none of them is live
STANDARD_ERRORS = 4.0  # a mean must fall by more than this many, else it may be chance
TENTH = 0.1  # share of a reward's range: rewards that differ by less are alike
FEW = 8  # pairs or questions: fewer tell nothing
FEWEST = 5  # questions of which none is right: fewer tell nothing
NATS = 1.0  # log p of a chosen answer must fall by more than this
DEAD, CUT, FAILED = 0.9, 0.5, 0.1  # larger shares of dead groups, cut answers and failed groups are reported
ALIKE, SOLVED = 0.9, 0.9  # shares of answers that are the same, and right
LITTLE = 0.02  # a score that gets better by a smaller share has not got better
LATE = 0.8  # a score that gets better after this part of the run has not stopped
ENOUGH = 200  # steps that are worth trying
FAR = 0.5  # a training loss that ends above the base's by this share has risen
RIGHT_REWARDS = ("exact", "number", "boxed", "math_verify")  # 1 for a right answer, 0 for others
VERY_LARGE = "very large"
# nats per token from another model, and what they do to the perplexity: 1 %, 11 %, 2.7 times
KL_IN_WORDS = {
    0.01: "small",
    0.1: "moderate",
    1.0: "large",
    math.inf: VERY_LARGE,
}


class RunFacts:
    """Facts of a run for the rules, while it goes or after its end, when it recommends the state of `step`.

    `lines` are those of metrics.jsonl; while a run goes they are its first and its last WINDOW. `top` are the
    WINDOW lines with the highest reward. `history` are the evaluations.
    """

    def __init__(
        self,
        config: Settled,
        lines: Sequence[dict],
        top: Sequence[dict] = (),
        step: int | None = None,
        history: Sequence[dict] = (),
    ):
        self.config, self.lines, self.top, self.history = config, lines, top, history
        self.by_loss = loss_of(config).metrics.by_loss
        self.last = lines[-WINDOW:]
        self.steps, self.documents = steps_text(self.last), f"held-out {loss_of(config).words.example}s"
        self.range = None if self.by_loss else bounds(config.rewards)  # lowest and highest possible reward
        self.step = step
        self.is_enough = step is not None or len(lines) >= WINDOW
        ends = evaluation_at(history, 0), evaluation_at(history, step)
        if not all(ends) or not self.by_loss and any(line["reward"] is None for line in ends):
            ends = None, None
        self.before, self.after = ends

    def mean(self, name: str) -> float:
        """Return the mean of a metric over the last steps; NaN where none of them has it."""
        return mean_and_error(values_of(self.last, name))[0]

    # the score, which is the loss or a reward

    @functools.cached_property
    def change(self) -> tuple[float | None, float | None]:
        """The score before and after, held out; without such an evaluation the reward of drawn answers."""
        name = "loss" if self.by_loss else "reward"
        if self.after:
            return self.before[name], self.after[name]
        return (None, None) if self.by_loss else tenths(self.lines, name)

    @functools.cached_property
    def gain(self) -> float:
        """The gain of the score, as a share of its range, or of the score before; NaN if it is not known."""
        before, after = self.change
        if after is None:
            return math.nan
        if before is None:
            return 1.0
        better = before - after if self.by_loss else after - before
        scale = self.range[1] - self.range[0] if self.range else abs(before)
        return better / scale if scale else better

    @property
    def is_better(self) -> bool:
        """True if the score got better, by more than LITTLE and by more than chance."""
        return self.gain >= LITTLE and not self.may_be_chance

    @property
    def may_be_chance(self) -> bool:
        """True if the held-out reward changed by at most two standard errors of the difference."""
        if self.by_loss or not self.after:
            return False
        errors = [line.get("reward_error", 0.0) for line in (self.before, self.after)]
        before, after = self.change
        return None in errors or abs(after - before) <= 2 * math.hypot(*errors)

    @property
    def is_worth_using(self) -> bool:
        """True if more answers are right, or if the score got better and the answers do not deny it."""
        is_righter = self.rights is not None and self.rights[1] > self.rights[0]
        return is_righter or self.is_better and not self.is_no_more_right

    @property
    def score(self) -> str:
        """The score and how it moved, in words."""
        before, after = self.change
        if after is None:
            return f"loss on {self.documents} is not finite"
        if before is None:
            return f"loss on {self.documents} was not finite before the training and is {after:.4f}"
        verb = "rose" if after > before else "fell" if after < before else "went"
        if self.by_loss:
            share = f" by {100 * self.gain:.2f} %," if self.gain > 0 else ""
            return f"loss on {self.documents} {verb}{share} from {before:.4f} to {after:.4f}{self.bits_text}"
        questions = self.documents if self.after else "the training's own questions"
        return f"reward on {questions} {verb} from {before:.4g} to {after:.4g}"

    @property
    def bits(self) -> tuple[float | None, float | None]:
        """The bits a byte of held-out running text before and after."""
        ends = [line.get("bits_per_byte") if line else None for line in (self.before, self.after)]
        return ends[0], ends[1]

    @property
    def bits_text(self) -> str:
        """The bits a byte in brackets, to follow another text; "" if they are not known."""
        return "" if None in self.bits else " ({:.3f} to {:.3f} bits a byte)".format(*self.bits)

    @property
    def is_by_heart(self) -> bool:
        """True if the training loss fell and the last held-out loss is above the base's; or if it stopped far
        above the training loss, and no answers are righter or nothing between tells when it stopped."""
        if not (self.by_loss and self.after and self.learnt >= LITTLE) or self.more_right > 2:
            return False
        if is_worse(self.before, self.history[-1]):
            return True
        is_unseen = self.rights is not None or not self.between
        return is_unseen and self.has_gap and not self.goes_on

    @property
    def has_gap(self) -> bool:
        """True if less than half as much is left of the training loss as of the held-out loss."""
        if not (self.after and self.before["loss"] and self.after["loss"] and self.losses[0]):
            return False
        return self.losses[2] / self.losses[0] < self.after["loss"] / self.before["loss"] / 2

    @property
    def between(self) -> list[dict]:
        """The evaluations after step 0 and before the last part of the run."""
        lines = self.history if self.after else ()
        return [line for line in lines if 0 < line["step"] <= LATE * self.history[-1]["step"]]

    @property
    def score_at_end(self) -> str:
        """score() of the last step, if the recommended step is an earlier one with a lower loss."""
        last = self.history[-1]
        if last is self.after or last["loss"] is None:
            return self.score
        ends = f"from {self.after['loss']:.4f} at step {self.after['step']} to {last['loss']:.4f}"
        return f"loss on {self.documents} rose {ends}; before the training it was {self.before['loss']:.4f}"

    @property
    def is_worse(self) -> bool:
        """True if the score got no better, or the held-out loss is not finite."""
        return self.gain <= 0 or (self.by_loss and bool(self.after) and self.after["loss"] is None)

    @property
    def since_best(self) -> str:
        """The course of the score after the recommended state, in words; "" if that is the last state."""
        if not self.after or self.history[-1] is self.after:
            return ""
        last = self.history[-1]
        moved = "got no better"
        if is_worse(self.after, last):
            moved = "rose" if self.by_loss else "fell"
        elif self.by_loss and right_share(last, ()) != right_share(self.after, ()):
            return f"; most answers were right at step {self.after['step']}, so best.pth is what is offered"
        return f"; it {moved} after step {self.after['step']}, so best.pth is what is offered"

    @property
    def goes_on(self) -> bool:
        """True if the score still got better at the end, by half of LITTLE and by more than chance.

        The last evaluation before the last part of the run tells it, else the training's steps. A run with
        fewer steps than tell it has not stopped.
        """
        if self.after and (self.history[-1] is not self.after or self.after["loss"] is None):
            return False
        if is_over(self.history, self.config.early_stop):
            return False
        name, part = "loss" if self.by_loss else "reward", len(self.lines) // 4
        if self.between and self.between[-1][name] is not None:
            earlier, now, error = self.between[-1][name], self.after[name], 0.0
        elif part < WINDOW // 2:
            return True
        elif self.by_loss and self.has_gap:
            return False
        else:
            windows = self.lines[-2 * part : -part], self.lines[-part:]
            (earlier, one), (now, other) = (mean_and_error(values_of(window, name)) for window in windows)
            error = STANDARD_ERRORS / 2 * math.hypot(one, other)
        better = earlier - now if self.by_loss else now - earlier
        scale = self.range[1] - self.range[0] if self.range else abs(earlier)
        return better > max(error, LITTLE / 2 * scale)

    @property
    def is_short(self) -> bool:
        """True if the run ended with its best state after fewer steps than are worth trying."""
        is_last = not self.history or self.history[-1] is self.after
        ended = is_over(self.history, self.config.early_stop)
        return is_last and not ended and self.lines[-1]["step"] < ENOUGH

    # training losses; their rows differ

    @property
    def is_blind(self) -> bool:
        """True if only training losses tell of the way from the base to the end."""
        return self.by_loss and not self.after

    @property
    def why_blind(self) -> str:
        """The reason why is_blind, in words."""
        return "there is no evaluation before the training" if self.history else "nothing was held out"

    @functools.cached_property
    def losses(self) -> tuple[float, float, float]:
        """The training loss of the first step, of the first tenth of the steps and of the last one."""
        return self.lines[0]["loss"], *tenths(self.lines, "loss")

    @property
    def has_risen(self) -> bool:
        """True if the training loss ends far above both losses of the base.

        One is the loss of the first step, before a weight moved, the other the held-out one. Either may be of
        easier rows.
        """
        begin, _, last = self.losses
        return self.by_loss and last > (1 + FAR) * max(begin, (self.before or {}).get("loss") or 0.0)

    @property
    def learnt(self) -> float:
        """The share by which the training loss fell; 0 if it rose before and only came back."""
        begin, first, last = self.losses
        return (first - last) / first if self.by_loss and first and last < begin else 0.0

    # greedy answers to held-out questions

    @functools.cached_property
    def rights(self) -> tuple[float, float] | None:
        """The shares of right answers before and after; None if they are not known."""
        rewards = () if self.by_loss else self.config.rewards
        ends = [right_share(line, rewards) for line in (self.before, self.after) if line]
        return None if len(ends) < 2 or None in ends else (ends[0], ends[1])

    @property
    def questions(self) -> int:
        """The number of questions that rights() are shares of."""
        return questions_of(self.after)

    @property
    def more_right(self) -> float:
        """The rise of the share of right answers, in standard errors of two shares; 0 if it is not known."""
        if not self.rights:
            return 0.0
        mean, count = sum(self.rights) / 2, self.questions
        error = math.sqrt(2 * mean * (1 - mean) / count)
        return (self.rights[1] - self.rights[0]) / error if error else 0.0

    @property
    def is_unsolved(self) -> bool:
        """True if fewer answers are right than the share that counts as solved."""
        return self.rights is not None and self.rights[1] < SOLVED

    @property
    def is_no_more_right(self) -> bool:
        """True if a run by loss has no more right answers than before, of questions that are not few; or none
        of the fewest that are held out. Where nearly all were right before, more can't be."""
        if not self.by_loss or self.rights is None or min(self.rights) >= SOLVED:
            return False
        fewest = FEW if self.rights[1] else FEWEST
        return self.rights[1] <= self.rights[0] and self.questions >= fewest

    @property
    def right_text(self) -> str:
        """The right answers before and after, in words, to follow another text; "" if they are not known."""
        if not self.rights:
            return ""
        counts = [round(share * self.questions) for share in self.rights]
        return f"; right answers {counts[0]} to {counts[1]} of {self.questions}"

    @functools.cached_property
    def collapse(self) -> str:
        """The fault that most answers have in common, in words; "" for none, and for the base's own."""
        fault = "" if self.rights and self.rights[1] >= CUT else fault_of(self.after)
        return "" if fault_of(self.before) else fault

    # preferences

    @property
    def is_preference(self) -> bool:
        return self.config.on_preferences

    @functools.cached_property
    def accuracy(self) -> float:
        """The share of pairs whose chosen answer wins; NaN where it is not known."""
        return mean_and_error(values_of([self.after] if self.after else self.last, *ACCURACIES))[0]

    @property
    def prefers(self) -> bool:
        """True if the base finds the chosen answer likelier in all pairs, and they are not few."""
        first = self.before or self.lines[0]
        return first.get("raw_accuracy") == 1 and first["units"] >= FEW

    @property
    def chance(self) -> float:
        """Two standard errors of the accuracy that a coin has on the held-out data; -1 without such data."""
        return 1 / math.sqrt(self.after["units"]) if self.after and "units" in self.after else -1.0

    @functools.cached_property
    def chosen_fall(self) -> str:
        """The fall of log p of chosen answers since the start, in words; "" if it has not fallen.

        Without held-out data the rewards of steps show it, if they are sums and the run is its own reference.
        """
        config = self.config
        if self.history:
            ends = values_of([self.before, self.after], "logp_chosen") if self.after else []
            fell = ends[0] - ends[1] if len(ends) == 2 else 0.0
            return f"{fell:.1f} lower on held-out data" if fell > NATS else ""
        if config.loss not in ("dpo", "kto") or config.loss_average != "sum" or config.reference:
            return ""
        mean, error = mean_and_error(values_of(self.last, "reward_chosen"))
        fell = -mean / config.beta
        is_fall = self.is_enough and fell > max(NATS, STANDARD_ERRORS * error / config.beta)
        return f"{fell:.1f} lower in {self.steps}" if is_fall else ""

    @property
    def far_text(self) -> str:
        """A very large KL to the reference on held-out answers, in words; "" if it is smaller or an answer is
        known to be right."""
        kl = self.by_loss and self.after and self.after.get("kl") or 0.0
        if kl < 1 or any(self.rights or ()) or any_right(self.after):
            return ""
        return f"; KL to the reference is {kl:.3g} per token, {kl_in_words(kl)}: read the sample answers"

    # rewards

    @functools.cached_property
    def reward(self) -> float:
        return self.mean("reward")

    @functools.cached_property
    def is_dead(self) -> bool:
        """True if nearly all groups have equal rewards, and there are enough groups to tell."""
        share, groups = self.mean("dead_groups"), sum(values_of(self.last, "units"))
        return share > DEAD and (self.is_enough or share == 1 and groups >= GROUPS)

    @property
    def dead_text(self) -> str:
        share = percent(self.mean("dead_groups"))
        return f"{share} of the groups of {self.steps} have equal rewards, so that they teach nothing"

    @property
    def is_low(self) -> bool:
        """True if nearly all answers are wrong now."""
        return bool(self.range) and self.reward <= self.range[0] + TENTH * (self.range[1] - self.range[0])

    @property
    def near_end(self) -> str:
        """The end of the reward's range, highest or lowest, that all answers are near; "" for neither."""
        if not self.range:
            return ""
        (lowest, highest), top = self.range, mean_and_error(values_of(self.top, "reward"))[0]
        if self.reward >= highest - TENTH * (highest - lowest):
            return "highest"
        return "lowest" if top <= lowest + TENTH * (highest - lowest) else ""

    @functools.cached_property
    def fall(self) -> tuple[float, str] | None:
        """(earlier reward, its steps) if the reward is lower now by more than chance."""
        (now, error), (top, other) = (mean_and_error(values_of(w, "reward")) for w in (self.last, self.top))
        first = self.lines[0].get("reward") if self.lines[0].get("units", 0) >= FEW else None
        least = TENTH * (self.range[1] - self.range[0] if self.range else abs(top))
        if top - now > max(STANDARD_ERRORS * math.hypot(error, other), least):
            return top, steps_text(self.top)
        # a collapse within the first steps leaves no other trace; one step has more chance than WINDOW
        if first is not None and first - now > max(STANDARD_ERRORS * error * math.sqrt(WINDOW), 2 * least):
            return first, f"step {self.lines[0]['step']}"
        return None

    @functools.cached_property
    def rise(self) -> tuple[float, float] | None:
        """(first reward, last reward) of drawn answers, if it rose over a whole run by more than chance."""
        if self.by_loss or self.step is None or len(self.lines) < 2 * WINDOW:
            return None
        first, now = (mean_and_error(values_of(w, "reward")) for w in (self.lines[:WINDOW], self.last))
        least = TENTH * (self.range[1] - self.range[0] if self.range else abs(first[0]))
        is_rise = now[0] - first[0] > max(STANDARD_ERRORS * math.hypot(first[1], now[1]), least)
        return (first[0], now[0]) if is_rise else None

    @property
    def failed_share(self) -> float:
        """The share of groups whose reward failed."""
        return sum(values_of(self.last, "failed_groups")) / max(1, sum(values_of(self.last, "units")))


def right_share(line: dict, rewards: Collection[str]) -> float | None:
    """Return the share of right answers in an evaluation; None if it was not measured."""
    names = ["right_answers", *(f"reward_{name}" for name in RIGHT_REWARDS if name in rewards)]
    return next((line[name] for name in names if line.get(name) is not None), None)


def questions_of(line: dict) -> int:
    """Count the questions of an evaluation, which are its examples in a run on rewards."""
    return line.get("asked") or line["units"]


def fault_of(line: dict | None) -> str:
    """Tell what nearly all answers of an evaluation have in common, if they should not; "" for nothing."""
    if not line or "answers" not in line:
        return ""
    counts, count = line["answers"], line["asked"]
    if counts["empty"] > CUT * count:
        return f"{counts['empty']} of {count} answers are empty"
    if counts["endless"] > CUT * count:
        return f"{counts['endless']} of {count} answers do not end"
    usual = counts["same_right"] / count
    chance = 2 * math.sqrt(usual * (1 - usual) / count)
    if counts["same"] >= ALIKE * count and counts["same"] / count > usual + chance:
        return f"{counts['same']} of {count} answers are {counts['common']!r}"
    return ""


def kl_in_words(kl: float) -> str:
    """Say how large a KL is, in nats per token."""
    return next(words for end, words in KL_IN_WORDS.items() if kl < end)


def bounds(rewards: Mapping[str, float]) -> tuple[float, float] | None:
    """Return the lowest and the highest possible reward; None if a function of --reward_file has a part."""
    weights = {name: weight for name, weight in rewards.items() if weight}
    if not weights.keys() <= RANGES.keys():
        return None
    ends = [sorted(weight * end for end in RANGES[name]) for name, weight in weights.items()]
    return sum(low for low, _ in ends), sum(high for _, high in ends)


def highest(now: Sequence[dict], *windows: Sequence[dict]) -> Sequence[dict]:
    """Return the window of WINDOW steps with the highest mean reward; `now` if none has rewards."""
    whole = [window for window in (now, *windows) if len(window) == WINDOW and values_of(window, "reward")]
    return max(whole, key=lambda window: mean_and_error(values_of(window, "reward"))[0], default=now)


def steps_text(lines: Sequence[dict]) -> str:
    """Name the steps of these lines: "steps 1 to 10", "step 3"."""
    first, last = lines[0]["step"], lines[-1]["step"]
    return f"steps {first} to {last}" if first < last else f"step {last}"


def tenths(lines: Sequence[dict], name: str) -> tuple[float, float]:
    """Return the mean of a metric over the first tenth of the steps, and over the last."""
    part = max(1, len(lines) // 10)
    return mean_and_error(values_of(lines[:part], name))[0], mean_and_error(values_of(lines[-part:], name))[0]


def values_of(lines: Sequence[dict], *names: str) -> list[float]:
    """Return from each line the first of these metrics that it has."""
    found = ([line[name] for name in names if line.get(name) is not None] for line in lines)
    return [values[0] for values in found if values]


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error, from the differences of neighbouring values.

    So a steady rise or fall does not count as noise.
    """
    if len(values) < 2:
        return (values[0] if values else math.nan), math.inf
    squares = math.fsum((after - before) ** 2 for before, after in itertools.pairwise(values))
    return math.fsum(values) / len(values), math.sqrt(squares / 2 / (len(values) - 1) / len(values))
