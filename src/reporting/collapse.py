"""Early warnings about a training on rewards.

A model that is lost looks like one that has learnt all: the gradient is 0, as all answers to a question get
the same reward. So the reward decides which of the two it is. All here are functions of the lines of
metrics.jsonl.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ..config import Config
from ..evaluation.rewards import RANGES
from ..objectives.loss_metrics import percent

WINDOW = 10  # steps that are looked at together
EARLY, EARLY_GROUPS = 3, 16  # steps, and groups in them, that show what is plain before
LOST = 0.1  # of the first reward: so little in EARLY steps is no chance
DEAD = 0.9  # from this share of groups on nearly nothing is learnt
NEAR = 0.05  # of the reward's range: so near to its end counts as there
STANDARD_ERRORS = 4.0  # by more than so many a mean has to have moved
LEAST_FALL = 0.1  # and by so much of the reward's range, or of what it was
ENTROPY_LEFT = 0.1  # of what it was at the start
GAINED = 0.5  # of what there was to gain: a run that has so much is not in trouble
LONGER = 2.0  # times as long as at the start
CUT = 0.5  # of the answers
FAILED = 0.1  # of the groups
MOSTLY_FAILED = 0.5  # of those of one step: what is left tells little of the reward
# |ln p of training - ln p of the engine|. In fp32 it is 1e-5 at most; a weight of 1 +- 10 % is still one.
GAP_FP32, GAP = 1e-3, 0.1


class Finding(NamedTuple):
    """What goes wrong, and what to do."""

    kind: str  # each is said once
    known: str
    tries: tuple[str, ...]  # any of them may help
    good: bool = False  # nothing is wrong, but there is something to know

    @property
    def advice(self) -> str:
        return ", or ".join(self.tries)

    def __str__(self) -> str:
        return f"{'note' if self.good else 'WARNING'}: {self.known}.\nTry {self.advice}."


class Window(NamedTuple):
    """Means over successive steps. What no step knows is NaN."""

    steps: tuple[int, int]  # first and last
    reward: float
    error: float  # standard error of the reward
    dead: float
    failed: float  # share of the groups
    length: float
    cut: float
    entropy: float
    gap: float  # of log p, the mean
    gap_max: float

    @classmethod
    def of(cls, lines: Sequence[dict]) -> Window:
        """That of at least one line."""
        rewards = _known(lines, "reward")
        gaps = _known(lines, "engine_gap_max")
        units = _groups(lines)
        return cls(
            (lines[0]["step"], lines[-1]["step"]),
            _mean(rewards),
            _standard_error(rewards),
            _mean(_known(lines, "dead_groups")),
            sum(_known(lines, "failed_groups")) / units if units else 0.0,
            *(_mean(_known(lines, name)) for name in ("length", "cut", "entropy", "engine_gap")),
            max(gaps) if gaps else math.nan,
        )

    @property
    def text(self) -> str:
        first, last = self.steps
        return f"steps {first} to {last}" if first < last else f"step {last}"


@dataclasses.dataclass(frozen=True)
class Course:
    """A run so far: the first draw, the first steps, those with the highest reward, and the last ones."""

    untrained: float  # the reward of the first draw, NaN where it is not known
    start: Window
    top: Window
    now: Window
    constant: int = 0  # how many answers there were, where all of them got the same reward; else 0


def findings(config: Config, course: Course) -> list[Finding]:
    """All that is wrong now; nothing where all is well."""
    found = [
        _cut(config, course),  # before what comes of it
        _dead(config, course),
        _fallen(config, course),
        _entropy(config, course),
        _longer(config, course),
        _gap(config, course.now),
        _failed(course.now),
    ]
    return [finding for finding in found if finding]


def fall(config: Config, course: Course) -> tuple[float, str] | None:
    """(what the reward was, when) where it is lower now by more than chance; else None."""
    top, now, ends = course.top, course.now, bounds(config)
    scale = ends[1] - ends[0] if ends else abs(top.reward)
    if top.reward - now.reward > max(STANDARD_ERRORS * math.hypot(top.error, now.error), LEAST_FALL * scale):
        return top.reward, top.text
    # a collapse within the first window leaves no other trace of what was before; one draw has more chance
    of_one = STANDARD_ERRORS * now.error * math.sqrt(WINDOW)
    if course.untrained - now.reward > max(of_one, 2 * LEAST_FALL * scale):
        return course.untrained, f"step {course.start.steps[0]}"
    return None


def bounds(config: Config) -> tuple[float, float] | None:
    """The lowest and the highest reward there can be; None where a function of --reward_file has a part."""
    ends = [0.0, 0.0]
    for name, weight in config.rewards.items():
        if weight and name not in RANGES:
            return None
        values = sorted(weight * value for value in RANGES.get(name, (0.0, 0.0)))
        ends = [end + value for end, value in zip(ends, values, strict=True)]
    return ends[0], ends[1]


def is_solved(config: Config, window: Window) -> bool:
    """Whether nearly all answers get the highest reward."""
    ends = bounds(config)
    return ends is not None and window.reward >= ends[1] - 2 * NEAR * (ends[1] - ends[0])


def has_gained(config: Config, course: Course) -> bool:
    """Whether the reward has risen by a good part of what could be gained."""
    start, now, ends = course.start, course.now, bounds(config)
    if ends is None:
        return now.reward - start.reward > STANDARD_ERRORS * math.hypot(start.error, now.error)
    return is_solved(config, now) or now.reward - start.reward > GAINED * (ends[1] - start.reward)


def _dead(config: Config, course: Course) -> Finding | None:
    now, ends = course.now, bounds(config)
    if not now.dead > DEAD:
        return None
    seen = f"{percent(now.dead)} of the groups of {now.text} have equal rewards, so that they teach nothing"
    if is_solved(config, now):
        return Finding(
            "solved",
            f"{seen}: nearly all answers are right (reward {now.reward:.3g} of {ends[1]:.3g})",
            ("harder questions", "stop here: this set is learnt"),
            good=True,
        )
    if fell := fall(config, course):
        before, when = fell
        return Finding(
            "collapsed",
            f"{seen}, and the reward fell from {before:.3g} in {when} to {now.reward:.3g}: the model has"
            f" collapsed{_certain(course)}. This is not convergence",
            (again(config), _gentler(config)[1]),
        )
    if ends and max(course.top.reward, now.reward) <= ends[0] + NEAR * (ends[1] - ends[0]):
        return Finding(
            "too hard",
            f"{seen}: nearly all answers are wrong from the start (reward {now.reward:.3g}; the lowest"
            f" possible is {ends[0]:.3g})",
            (
                "easier questions",
                "supervised training on right answers first",
                "a reward that gives a part (partial)",
                f"more answers (--group_size above {config.group_size})",
            ),
        )
    if course.constant:
        names = ", ".join(config.rewards)
        return Finding(
            "constant",
            f"{names} gave {now.reward:.3g} to all of the {course.constant:,} answers so far, which teaches"
            " nothing",
            ("a look at samples.jsonl", "a reward that gives better answers more"),
        )
    gained = has_gained(config, course)
    return Finding(
        "alike",
        f"{seen}, with a reward of {now.reward:.3g}: a question's answers are all right or all wrong"
        f"{_certain(course)}",
        (
            "questions that are answered right now and then",
            f"a larger --group_size than {config.group_size}",
            *(("stop here",) if gained else _gentler(config)),
        ),
        good=gained,
    )


def _fallen(config: Config, course: Course) -> Finding | None:
    if not (fell := fall(config, course)):
        return None
    before, when = fell
    return Finding(
        "fallen",
        f"the reward fell from {before:.3g} in {when} to {course.now.reward:.3g} in {course.now.text}",
        _gentler(config),
    )


def _lost(config: Config, lines: Sequence[dict]) -> Finding | None:
    """What the first steps say of a reward that is gone before there is a WINDOW."""
    first, now, ends = lines[0], Window.of(lines[-EARLY:]), bounds(config)
    if len(lines) <= EARLY or first.get("reward") is None or not first.get("dead_groups", 1) <= DEAD:
        return None
    lowest = ends[0] if ends else 0.0
    least = 2 * LEAST_FALL * (ends[1] - ends[0]) if ends else 0.0
    before = first["reward"] - lowest
    if not (before > least and now.reward - lowest < LOST * before):
        return None
    return Finding(
        "fallen",
        f"the reward fell from {first['reward']:.3g} in step {first['step']} to {now.reward:.3g} in"
        f" {now.text}",
        _gentler(config),
    )


def _entropy(config: Config, course: Course) -> Finding | None:
    start, now = course.start, course.now
    # a model that is right and knows it has none either
    if not now.entropy < ENTROPY_LEFT * start.entropy or has_gained(config, course):
        return None
    return Finding(
        "entropy",
        f"the entropy fell from {start.entropy:.3g} to {now.entropy:.3g} per token in {now.text}: the model"
        f" draws nearly the same answer each time, at a reward of {now.reward:.3g}",
        (*_gentler(config), f"a larger --clip_high than {config.clip_high:g}"),
    )


def _cut(config: Config, course: Course) -> Finding | None:
    now = course.now
    if not now.cut > CUT:
        return None
    seen = (
        f"{percent(now.cut)} of the answers of {now.text} reached --max_tokens {config.max_tokens} before"
        " their end"
    )
    if fall(config, course):
        return Finding("cut", f"{seen}: the model has lost how answers end", _gentler(config))
    return Finding(
        "cut",
        f"{seen}, and count as wrong",
        (
            "a larger --max_tokens",
            "where long answers are not wanted, questions that ask for short ones, or the reward length",
        ),
    )


def _longer(config: Config, course: Course) -> Finding | None:
    start, now = course.start, course.now
    if not now.length > LONGER * start.length or now.cut > CUT:
        return None
    if now.reward - start.reward > STANDARD_ERRORS * math.hypot(start.error, now.error):
        return None  # longer answers, and better ones
    return Finding(
        "longer",
        f"answers have {now.length:.3g} tokens in {now.text}, where they had {start.length:.3g}, and no"
        f" higher reward ({start.reward:.3g} to {now.reward:.3g})",
        (
            f"the reward length (--rewards ...,length=0.5 --reward_length {max(1, round(start.length))})",
            "--grpo_type dr_grpo",
            *_gentler(config),
        ),
    )


def _gap(config: Config, now: Window) -> Finding | None:
    causes = _causes_of_gap(config)
    if not causes and now.gap_max > GAP_FP32:
        return Finding(
            "gap",
            f"log p of the training and of the drawing differ by {now.gap_max:.2g} in {now.text}; in fp32 it"
            " is 1e-5 at most: one of the kernels is wrong here, or the model gives probability to tokens"
            " that its tokenizer does not have, and that are never drawn",
            ("--wkv torch, and tell us (python -m scripts.doctor says what is used)",),
        )
    if causes and now.gap > GAP:
        what, finer = zip(*causes)
        return Finding(
            "gap",
            f"log p of the training and of the drawing differ by {now.gap:.2g} a token in {now.text}, at most"
            f" by {now.gap_max:.2g}, as {' and '.join(what)}: many tokens count for less or more",
            (*finer, "a lower --lr_init"),
        )
    return None


def _causes_of_gap(config: Config) -> list[tuple[str, str]]:
    """(why drawing and training give other probabilities, what helps), for all that is known to do so."""
    found = []
    if config.quant != "none":
        found.append((f"--quant {config.quant} rounds them differently", "a finer --quant"))
    if config.precision != "fp32":
        found.append((f"--precision {config.precision} rounds them differently", "a finer --precision"))
    # answers are drawn without it
    if dropout := config.peft_config.get("dropout"):
        found.append((f"the adapter's dropout of {dropout:g} acts in the training alone", "less dropout"))
    return found


def _failed(now: Window) -> Finding | None:
    if now.failed <= (FAILED if now.steps[0] < now.steps[1] else MOSTLY_FAILED):
        return None
    return Finding(
        "failed",
        f"the rewards of {percent(now.failed)} of the groups of {now.text} failed; they are left out, also of"
        " the mean reward",
        ("mending the reward: each kind of failure was told once, where it first came",),
    )


def _certain(course: Course) -> str:
    """How much is left of the entropy, where that is little."""
    start, now = course.start.entropy, course.now.entropy
    return f" (entropy {start:.2g} to {now:.2g})" if now < ENTROPY_LEFT * start else ""


def again(config: Config) -> str:
    """What helps where a model is lost: which of its states is better, if any, is known at the end alone."""
    return f"starting again in a new --proj_dir with {_gentler(config)[0]} (without it: a first guess)"


def _gentler(config: Config) -> tuple[str, str]:
    """What makes a training on rewards steadier."""
    kl = "--beta 0.04, a KL to the base" if not config.beta else f"a larger --beta than {config.beta:g}"
    return f"a lower --lr_init than {config.lr_init:g}", kl


class CollapseWatch:
    """findings() after every step, each kind said once. `before` are the lines of a run that goes on."""

    def __init__(self, config: Config, before: Iterable[dict]):
        self.config = config
        self.first: list[dict] = []
        self.last: list[dict] = []
        self.top: Window | None = None
        self.answers = 0  # so far, where all had the same reward
        self.is_constant = True
        self.said: set[str] = set()
        for line in before:
            self.after(line)

    @property
    def course(self) -> Course | None:
        """The run so far; None before its first step."""
        if not self.last:
            return None
        untrained, now = self.first[0].get("reward"), Window.of(self.last)
        constant = self.answers if self.is_constant else 0
        start = math.nan if untrained is None else untrained
        return Course(start, Window.of(self.first), self.top or now, now, constant)

    def after(self, line: dict) -> str | None:
        """The warnings, with what to do, that are to be said after this step."""
        if "rolled_back_to" in line:
            return None
        if len(self.first) < WINDOW:
            self.first.append(line)
        self.last = [*self.last, line][-WINDOW:]
        self.answers += (line.get("units") or 0) * self.config.group_size
        first, reward = self.first[0].get("reward"), line.get("reward")
        known = first is not None and reward is not None and line.get("dead_groups") == 1
        self.is_constant &= known and math.isclose(reward, first, abs_tol=1e-9)
        if len(self.last) == WINDOW:
            now = Window.of(self.last)
            if self.top is None or now.reward > self.top.reward:
                self.top = now
        found = findings(self.config, self.course) if len(self.last) == WINDOW else self._early(line)
        new = [finding for finding in found if finding.kind not in self.said]
        self.said |= {finding.kind for finding in found}
        return "\n".join(map(str, new)) or None

    def _early(self, line: dict) -> list[Finding]:
        """What needs no WINDOW of steps."""
        found = [_failed(Window.of([line])), _lost(self.config, self.first)]
        now = Window.of(self.first)
        if now.dead == 1 and len(self.first) >= EARLY and _groups(self.first) >= EARLY_GROUPS:
            found += [_cut(self.config, self.course), _dead(self.config, self.course)]
        return [one for one in found if one]


def course_of(config: Config, metrics: Iterable[dict]) -> Course | None:
    """That of a whole run, also of one that is too short for early warnings."""
    return CollapseWatch(config, metrics).course


def _groups(lines: Sequence[dict]) -> int:
    return sum(line.get("units") or 0 for line in lines)


def _known(lines: Sequence[dict], name: str) -> list[float]:
    return [line[name] for line in lines if line.get(name) is not None]


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _standard_error(values: list[float]) -> float:
    """Of the mean, by how much each step differs from the one before: a steady rise or fall is no noise."""
    if len(values) < 2:
        return math.inf
    squares = math.fsum((after - before) ** 2 for before, after in itertools.pairwise(values))
    return math.sqrt(squares / 2 / (len(values) - 1) / len(values))
