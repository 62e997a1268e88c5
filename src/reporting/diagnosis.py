"""The verdict on a run, and warnings while it goes: one table of rules.

A rule has a verdict, a condition, words and remedies, which are functions of Facts. Facts come from settings
and logs alone. The first rule that holds at the end gives the verdict. docs/training.md explains the table.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from ..config import Config
from ..config.schema import CHOSEN, PUBLISHED
from ..evaluation.rewards import RANGES
from ..objectives.kinds import objective_of
from ..objectives.loss_metrics import percent
from ..objectives.preferences.metrics import ACCURACIES
from ..training.validation_log import all_right, base_wins, evaluation_at, is_worse

LEARNT, STILL, BY_HEART = "learnt", "still learning", "learnt by heart"
COLLAPSED, WORSE, NOTHING = "answers collapsed", "made worse", "nothing learnt"
NOT_JUDGED = "not judged"
WINDOW = 10  # steps that are averaged
GROUPS = 16  # groups that tell enough in fewer steps, where none of them is live
STANDARD_ERRORS = 4.0  # a mean must fall by more than this many, else it may be chance
TENTH = 0.1  # share of a reward's range: rewards that differ by less are alike
FEW = 8  # pairs: a coin prefers all of fewer ones now and then
NATS = 1.0  # by which log p of a chosen answer must fall
DEAD, CUT, FAILED = 0.9, 0.5, 0.1  # larger shares of groups, answers and groups are told
LITTLE = 0.02  # a score that gets better by a smaller share has not got better
LATE = 0.8  # a score that gets better after this part of the run has not stopped
ENOUGH = 200  # steps that are worth trying
FAR = 0.5  # a training loss that ends above the base's by this share has risen
# nats per token from another model, and what they do to the perplexity: 1 %, 11 %, 2.7 times
KL_IN_WORDS = {
    0.01: "small",
    0.1: "moderate",
    1.0: "large",
    math.inf: "very large: little of the base is left",
}


class Facts:
    """Facts of a run for the rules, while it goes or after its end, when it recommends the state of `step`.

    `lines` are those of metrics.jsonl; while a run goes they are its first and its last WINDOW. `top` are the
    WINDOW lines with the highest reward. `history` are the evaluations. `searched`: whether the run searched
    for its learning rate.
    """

    def __init__(
        self,
        config: Config,
        lines: Sequence[dict],
        top: Sequence[dict] = (),
        step: int | None = None,
        history: Sequence[dict] = (),
        searched: bool = False,
    ):
        self.config, self.lines, self.top, self.history = config, lines, top, history
        self.searched, self.by_loss = searched, objective_of(config).metrics.by_loss
        self.last = lines[-WINDOW:]
        self.steps, self.documents = steps_text(self.last), f"held-out {objective_of(config).word}s"
        self.range = None if self.by_loss else bounds(config.rewards)  # of a reward
        self.is_enough = step is not None or len(lines) >= WINDOW
        ends = evaluation_at(history, 0), evaluation_at(history, step)
        if not all(ends) or not self.by_loss and any(line["reward"] is None for line in ends):
            ends = None, None
        self.before, self.after = ends

    def mean(self, name: str) -> float:
        """Return the mean of a metric over the last steps; NaN where none of them has it."""
        return mean_and_error(known(self.last, name))[0]

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
        """The share of itself, or of its range, by which the score got better; NaN where it is not known."""
        if None in self.change:
            return math.nan
        before, after = self.change
        better = before - after if self.by_loss else after - before
        scale = self.range[1] - self.range[0] if self.range else abs(before)
        return better / scale if scale else better

    @property
    def score(self) -> str:
        """The score and how it moved, in words."""
        before, after = self.change
        if after is None:
            return f"loss on {self.documents} is not finite"
        verb = "rose" if after > before else "fell" if after < before else "went"
        if self.by_loss:
            share = f" by {100 * self.gain:.2f} %," if self.gain > 0 else ""
            return f"loss on {self.documents} {verb}{share} from {before:.4f} to {after:.4f}"
        asked = self.documents if self.after else "the training's own questions"
        return f"reward on {asked} {verb} from {before:.4g} to {after:.4g}"

    @property
    def last_score(self) -> str:
        """The same of the last state, where the one that is judged is better."""
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
    def then(self) -> str:
        """The way of the score after the state that is judged, in words; "" if that is the last one."""
        if not self.history or self.history[-1] is self.after:
            return ""
        moved = "rose" if self.by_loss else "fell"
        return f"; it {moved} after step {self.after['step']}, so best.pth is what is offered"

    @property
    def goes_on(self) -> bool:
        """True if the score still got better at the end, by more than LITTLE and than chance.

        The last evaluation before the last part of the run tells it, else the training's steps. A run with
        fewer steps than tell it has not stopped.
        """
        if self.after and self.history[-1] is not self.after:
            return False
        name, part = "loss" if self.by_loss else "reward", len(self.lines) // 4
        between = [line for line in self.history if 0 < line["step"] <= LATE * self.history[-1]["step"]]
        if between and between[-1][name] is not None:
            earlier, now, error = between[-1][name], self.after[name], 0.0
        elif part < WINDOW // 2:
            return True
        else:
            windows = self.lines[-2 * part : -part], self.lines[-part:]
            (earlier, one), (now, other) = (mean_and_error(known(window, name)) for window in windows)
            error = STANDARD_ERRORS / 2 * math.hypot(one, other)
        better = earlier - now if self.by_loss else now - earlier
        scale = self.range[1] - self.range[0] if self.range else abs(earlier)
        return better > max(error, LITTLE * scale)

    # training losses; their rows differ

    @property
    def is_blind(self) -> bool:
        """True if only training losses are known."""
        return self.by_loss and not self.history

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

    # preferences

    @functools.cached_property
    def accuracy(self) -> float:
        """The share of pairs whose chosen answer wins; NaN where it is not known."""
        return mean_and_error(known([self.after] if self.after else self.last, *ACCURACIES))[0]

    @property
    def prefers(self) -> bool:
        """True if the base finds the chosen answer likelier in all pairs, and they are not few."""
        first = self.before or self.lines[0]
        return first.get("raw_accuracy") == 1 and first["units"] >= FEW

    @property
    def chance(self) -> float:
        """Two standard errors of the accuracy of a coin on the held-out data; -1 without that."""
        return 1 / math.sqrt(self.after["units"]) if self.after and "units" in self.after else -1.0

    @functools.cached_property
    def lost(self) -> str:
        """The fall of log p of chosen answers since the start, in words; "" if it has not fallen.

        Without held-out data the rewards of steps show it, if they are sums and the run is its own reference.
        """
        config = self.config
        if self.history:
            ends = known([self.before, self.after], "logp_chosen") if self.after else []
            fell = ends[0] - ends[1] if len(ends) == 2 else 0.0
            return f"{fell:.1f} lower on held-out data" if fell > NATS else ""
        if config.loss not in ("dpo", "kto") or config.loss_average != "sum" or config.reference:
            return ""
        mean, error = mean_and_error(known(self.last, "reward_chosen"))
        fell = -mean / config.beta
        is_fall = self.is_enough and fell > max(NATS, STANDARD_ERRORS * error / config.beta)
        return f"{fell:.1f} lower in {self.steps}" if is_fall else ""

    @property
    def kl(self) -> float:
        """KL to the reference on held-out answers, per token; 0 where it is not known."""
        return self.by_loss and self.after and self.after.get("kl") or 0.0

    # rewards

    @functools.cached_property
    def reward(self) -> float:
        return self.mean("reward")

    @functools.cached_property
    def is_dead(self) -> bool:
        """True if nearly all groups have equal rewards, and there are enough groups to tell."""
        share, groups = self.mean("dead_groups"), sum(known(self.last, "units"))
        return share > DEAD and (self.is_enough or share == 1 and groups >= GROUPS)

    @property
    def dead(self) -> str:
        share = percent(self.mean("dead_groups"))
        return f"{share} of the groups of {self.steps} have equal rewards, so that they teach nothing"

    @property
    def near(self) -> str:
        """The end of the reward's range, highest or lowest, that all answers are near; "" for neither."""
        if not self.range:
            return ""
        (lowest, highest), top = self.range, mean_and_error(known(self.top, "reward"))[0]
        if self.reward >= highest - TENTH * (highest - lowest):
            return "highest"
        return "lowest" if top <= lowest + TENTH * (highest - lowest) else ""

    @functools.cached_property
    def fall(self) -> tuple[float, str] | None:
        """(earlier reward, its steps) if the reward is lower now by more than chance."""
        (now, error), (top, other) = (mean_and_error(known(w, "reward")) for w in (self.last, self.top))
        first = self.lines[0].get("reward")
        least = TENTH * (self.range[1] - self.range[0] if self.range else abs(top))
        if top - now > max(STANDARD_ERRORS * math.hypot(error, other), least):
            return top, steps_text(self.top)
        # a collapse within the first steps leaves no other trace; one step has more chance than WINDOW
        if first is not None and first - now > max(STANDARD_ERRORS * error * math.sqrt(WINDOW), 2 * least):
            return first, f"step {self.lines[0]['step']}"
        return None

    @property
    def failed(self) -> float:
        """The share of groups whose reward failed."""
        return sum(known(self.last, "failed_groups")) / max(1, sum(known(self.last, "units")))


class Rule(NamedTuple):
    """Rule about a run: the verdict that it gives at the end, where it is the first of the table that holds,
    or a warning while the run goes."""

    name: str  # while a run goes each is said once
    verdict: str
    when: Callable[[Facts], bool]
    words: Callable[[Facts], str]
    remedies: Callable[[Facts], list[str]] = lambda f: []  # any of them may help
    early: bool = False  # while the run goes, too
    is_note: bool = False  # no reason for a warning


RULES = (
    Rule(
        "failed",
        NOT_JUDGED,
        lambda f: f.failed > FAILED,
        lambda f: (
            f"the rewards of {percent(f.failed)} of the groups of {f.steps} failed; they are left out, also"
            " of the mean reward"
        ),
        lambda f: ["mending the reward: each kind of failure was told once, where it first came"],
        early=True,
    ),
    Rule(
        "damaged",
        WORSE,
        lambda f: f.kl >= 1 and not any(sample["answer"] == sample["right"] for sample in f.after["samples"]),
        lambda f: (
            f"KL to the reference is {f.kl:.3g} per token, {kl_in_words(f.kl)}, and no sample answer is right"
        ),
        lambda f: ["supervised training on the chosen answers first (--loss sft --sft_field prompt,chosen)"],
    ),
    Rule(
        "lost",
        WORSE,
        lambda f: bool(f.lost) and f.accuracy > 0.5,
        lambda f: (
            f"log p of a chosen answer is {f.lost} than before the training, while the accuracy is"
            f" {percent(f.accuracy)}: the right answers get lost with the wrong ones"
        ),
        lambda f: [likelier(f)],
        early=True,
    ),
    Rule(
        "too fast",
        WORSE,
        lambda f: f.has_risen and (f.is_blind or f.is_worse),
        lambda f: f"the training loss rose from {f.losses[0]:.4f} in the first step to {f.losses[2]:.4f}",
        lambda f: [lower_rate(f)],
    ),
    Rule(
        "by heart",
        BY_HEART,
        lambda f: f.by_loss and f.learnt >= LITTLE and bool(f.after) and is_worse(f.before, f.history[-1]),
        lambda f: f"the training loss fell by {percent(f.learnt)}, but the {f.last_score}",
        lambda f: ["more rows"],
    ),
    Rule(
        "still learning",
        STILL,
        lambda f: f.gain >= LITTLE and f.goes_on,
        lambda f: f"the {f.score}, and had not stopped at the end",
        lambda f: [longer(f)],
    ),
    Rule(
        "chance",
        NOTHING,
        lambda f: f.accuracy <= 0.5 + f.chance,
        lambda f: (
            f"the accuracy on {f.after['units']:,} {f.documents} is {percent(f.accuracy)}, which"
            f" {'may be' if f.accuracy > 0.5 - f.chance else 'is less than'} chance"
        ),
        lambda f: [other_settings(f)],
    ),
    Rule("learnt", LEARNT, lambda f: f.gain >= LITTLE, lambda f: f"the {f.score}{f.then}"),
    Rule(
        "cut",  # before what comes of it
        COLLAPSED,
        lambda f: f.mean("cut") > CUT and (f.is_enough or f.is_dead),
        lambda f: (
            f"{percent(f.mean('cut'))} of the answers of {f.steps} reached --max_tokens"
            f" {f.config.max_tokens} before their end, and count as wrong"
        ),
        lambda f: [lower_rate(f) if f.fall else "a larger --max_tokens"],
        early=True,
    ),
    Rule(
        "solved",
        NOTHING,
        lambda f: f.is_dead and f.near == "highest",
        lambda f: f"{f.dead}: nearly all answers are right (reward {f.reward:.3g} of {f.range[1]:.3g})",
        lambda f: ["harder questions", "stop here: this set is learnt"],
        early=True,
        is_note=True,
    ),
    Rule(
        "too hard",
        NOTHING,
        lambda f: f.is_dead and f.near == "lowest",
        lambda f: (
            f"{f.dead}: nearly all answers are wrong from the start (reward {f.reward:.3g}; the lowest"
            f" possible is {f.range[0]:.3g})"
        ),
        lambda f: easier(f),
        early=True,
    ),
    Rule(
        "dead",
        NOTHING,
        lambda f: f.is_dead and not f.near and not f.fall,
        lambda f: f"{f.dead}, with a reward of {f.reward:.3g}",
        lambda f: [
            "questions that are answered right now and then",
            f"a larger --group_size than {f.config.group_size}",
            "a reward that gives better answers more (samples.jsonl has some)",
        ],
        early=True,
        is_note=True,
    ),
    Rule(
        "fallen",
        WORSE,
        lambda f: f.is_enough and f.fall is not None,
        lambda f: f"the reward fell from {f.fall[0]:.3g} in {f.fall[1]} to {f.reward:.3g} in {f.steps}",
        lambda f: [lower_rate(f), larger_beta(f)],
        early=True,
    ),
    Rule(
        "lower reward",
        WORSE,
        lambda f: not f.by_loss and f.gain <= -LITTLE,
        lambda f: f"the {f.score}",
        lambda f: [lower_rate(f)],
    ),
    Rule(
        "known before",
        NOTHING,
        lambda f: f.by_loss and bool(f.before) and all_right(f.before),
        lambda f: f"the {f.score}, and the sample answers were right before the training",
        lambda f: ["rows that the base does not answer right already"],
    ),
    Rule(
        "preferred before",
        NOTHING,
        lambda f: f.prefers and not f.gain >= LITTLE,
        lambda f: "the base found every chosen answer likelier than the rejected one before the training",
        lambda f: ["pairs whose rejected answer is one that the model gives"],
        early=True,
        is_note=True,
    ),
    Rule(
        "blind",
        NOTHING,
        lambda f: f.is_blind and f.learnt < LITTLE,
        lambda f: f"the training loss went from {f.losses[1]:.4f} to {f.losses[2]:.4f}",
        lambda f: [other_settings(f)],
    ),
    Rule(
        "nothing held out",
        NOT_JUDGED,
        lambda f: f.is_blind,
        lambda f: (
            f"the training loss fell by {percent(f.learnt)}, from {f.losses[1]:.4f} to {f.losses[2]:.4f},"
            " which may be by heart: nothing was held out"
        ),
        lambda f: ["--eval_split 0.1, which holds documents out"],
    ),
    Rule("nothing", NOTHING, lambda f: True, lambda f: f"the {f.score}", lambda f: [other_settings(f)]),
)


class Verdict(NamedTuple):
    """Verdict on a run that has ended."""

    name: str  # LEARNT, STILL, BY_HEART, COLLAPSED, WORSE, NOTHING or NOT_JUDGED
    reason: str  # what was measured
    remedy: str  # "": nothing is to be done

    @property
    def sentence(self) -> str:
        return f"{self.name}: {self.reason}" + (f"; try {self.remedy}" if self.remedy else "")


def verdict(config: Config, metrics: list[dict], step: int, history: list[dict], searched: bool) -> Verdict:
    """Judge a run that has ended, by the first rule that holds. The arguments are those of Facts."""
    lines = [line for line in metrics if "rolled_back_to" not in line] or metrics
    windows = []
    if not objective_of(config).metrics.by_loss:
        windows = [lines[i : i + WINDOW] for i in range(len(lines) - WINDOW + 1)]
    facts = Facts(config, lines, highest(lines[-WINDOW:], *windows), step, history, searched)
    rule = next(rule for rule in RULES if rule.when(facts))
    return Verdict(rule.verdict, rule.words(facts), advice(rule, facts))


class Warnings:
    """Warnings after every step, each given once. `before` are the earlier lines of a resumed run."""

    def __init__(self, config: Config, before: Iterable[dict]):
        self.config, self.lines, self.top, self.said = config, [], [], set()
        for line in before:
            self(line)

    def __call__(self, line: dict) -> str:
        """Return the new warnings after this step, with remedies; "" for none."""
        if "rolled_back_to" in line or self.config.loss == "sft":
            return ""
        self.lines.append(line)
        del self.lines[WINDOW:-WINDOW]
        self.top = highest(self.lines[-WINDOW:], self.top)
        facts = Facts(self.config, self.lines, self.top)
        new = [rule for rule in RULES if rule.early and rule.name not in self.said and rule.when(facts)]
        self.said |= {rule.name for rule in new}
        return "\n".join(
            f"{'note' if rule.is_note else 'WARNING'}: {rule.words(facts)}.\nTry {advice(rule, facts)}."
            for rule in new
        )


def advice(rule: Rule, facts: Facts) -> str:
    """Join the remedies of a rule."""
    return ", or ".join(rule.remedies(facts))


def lower_rate(f: Facts) -> str:
    """Advise a lower rate; if no state of a run on rewards was better than its base, also a new start."""
    rate = f"a lower --lr_init than {f.config.lr_init:g}"
    if f.by_loss or not base_wins(f.history):
        return rate
    return f"starting again in a new --proj_dir with {rate} (without it: a first guess)"


def larger_beta(f: Facts) -> str:
    beta = f.config.beta
    return f"a larger --beta than {beta:g}" if beta else "--beta 0.04, a KL to the base"


def likelier(f: Facts) -> str:
    """Advise what keeps chosen answers likely: their cross entropy, and where they have it a lower rate."""
    config = f.config
    if config.loss == "orpo":
        return f"--orpo_lambda below {config.orpo_lambda:g}"
    usual = 1 / config.beta if config.loss == "ipo" else 1.0
    return f"--sft_weight {usual:.3g}" if config.sft_weight < usual else lower_rate(f)


def easier(f: Facts) -> list[str]:
    """Advise what lets some answers of a group be right."""
    return [
        "easier questions",
        "supervised training on the reference answers first",
        "a reward that gives a part (partial)",
        f"more answers (--group_size above {f.config.group_size})",
    ]


def longer(f: Facts) -> str:
    """Advise twice the length, or what makes ENOUGH steps."""
    config, steps = f.config, f.lines[-1]["step"]
    factor = max(2, math.ceil(ENOUGH / steps))
    if config.epoch_steps and config.epoch_count == 1:
        return f"more steps: --epoch_steps {factor * config.epoch_steps}"
    return f"more passes: --epoch_count {factor * config.epoch_count}"


def other_settings(f: Facts) -> str:
    """Advise, for a run that has learnt nothing, what it has not tried."""
    config, rate = f.config, f"{f.config.lr_init:g}"
    if not f.by_loss:
        return ", or ".join(easier(f)) if f.mean("dead_groups") > CUT else longer(f)
    search, origin = "--lr_init auto, which searches for the learning rate", config.origin_of("lr_init")
    if f.searched:
        base = "a base that knows more of the task" if config.load_model else "more rows"
        return f"{base}; the learning rate was searched for already"
    if PUBLISHED in origin:
        return f"{search}; {rate} is the published one of --peft {config.peft}, and small models need more"
    if origin.startswith(CHOSEN):
        why = f"{rate} was chosen: {origin.removeprefix(f'{CHOSEN}: ')}"
        if f.is_worse:
            return f"another --lr_init, which python -m scripts.lr_sweep finds; {why}"
        return f"{longer(f)}; {why}"
    return f"{search}; {rate} was given"


def kl_in_words(kl: float) -> str:
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
    whole = [window for window in (now, *windows) if len(window) == WINDOW and known(window, "reward")]
    return max(whole, key=lambda window: mean_and_error(known(window, "reward"))[0], default=now)


def steps_text(lines: Sequence[dict]) -> str:
    first, last = lines[0]["step"], lines[-1]["step"]
    return f"steps {first} to {last}" if first < last else f"step {last}"


def tenths(lines: Sequence[dict], name: str) -> tuple[float, float]:
    """Return the mean of a metric over the first tenth of the steps, and over the last."""
    part = max(1, len(lines) // 10)
    return mean_and_error(known(lines[:part], name))[0], mean_and_error(known(lines[-part:], name))[0]


def known(lines: Sequence[dict], *names: str) -> list[float]:
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
