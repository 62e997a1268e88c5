"""The verdict on a run, and warnings while it goes: one table of rules.

A rule has a verdict, a condition, words and remedies, functions of RunFacts. RunFacts come from settings
and logs alone. The first rule that holds at the end gives the verdict. docs/training.md explains the table.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from rwkv_miss.files.hub_names import recorded

from ..config import Settled
from ..config.schema import CHOSEN, PUBLISHED
from ..losses import loss_of
from ..losses.metrics import percent
from ..training.validation_log import base_wins
from .facts import CUT, ENOUGH, FAILED, FEW, LITTLE, SOLVED, WINDOW, RunFacts, highest, steps_text

LEARNT, STILL, BY_HEART = "learnt", "still learning", "learnt by heart"
COLLAPSED, WORSE, NOTHING = "answers collapsed", "made worse", "nothing learnt"
NOT_JUDGED = "not judged"
OFFERED = (LEARNT, STILL, NOT_JUDGED)  # verdicts after which the trained file is worth using


class Rule(NamedTuple):
    """Rule about a run: the verdict that it gives at the end, where it is the first of the table that holds,
    or a warning while the run goes."""

    name: str  # a rule of a name warns once in a run
    verdict: str
    when: Callable[[RunFacts], bool]
    words: Callable[[RunFacts], str]
    remedies: Callable[[RunFacts], list[str]] = lambda f: []  # each remedy alone may help
    early: bool = False  # whether the rule also warns while the run goes
    is_note: bool = False  # print "note" instead of "WARNING"


RULES = (
    Rule(
        "solved before",
        NOTHING,
        lambda f: f.rights is not None and min(f.rights) >= SOLVED and f.questions >= FEW and not f.is_better,
        lambda f: f"the {f.score}{f.right_text}: the base knew the task already",
        lambda f: ["rows that the base does not answer right"],
    ),
    Rule(
        "answers learnt",
        LEARNT,
        lambda f: f.more_right > 2 and f.rights[1] >= SOLVED,
        lambda f: f"the {f.score}{f.right_text}{f.since_best}",
    ),
    Rule(
        "collapsed",
        COLLAPSED,
        lambda f: bool(f.collapse),
        lambda f: f"{f.collapse}; the {f.score}{f.right_text}",
        lambda f: [mended(f)],
    ),
    Rule(
        "answers lost",
        WORSE,
        lambda f: f.more_right < -2,
        lambda f: f"the {f.score}{f.right_text}",
        lambda f: [kept_answers(f)],
    ),
    Rule(
        "failed",
        NOT_JUDGED,
        lambda f: f.failed_share > FAILED,
        lambda f: (
            f"the rewards of {percent(f.failed_share)} of the groups of {f.steps} failed; they are left out,"
            " also of the mean reward"
        ),
        lambda f: ["mending the reward: each kind of failure was told once, where it first came"],
        early=True,
    ),
    Rule(
        "lost",
        WORSE,
        lambda f: bool(f.chosen_fall) and f.accuracy > 0.5 and f.more_right <= 0,
        lambda f: (
            f"log p of a chosen answer is {f.chosen_fall} than before the training, while the accuracy is"
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
        lambda f: f.is_by_heart,
        lambda f: f"the training loss fell by {percent(f.learnt)}, and the {f.score_at_end}{f.right_text}",
        lambda f: ["more rows"],
    ),
    Rule(
        "still learning",
        STILL,
        lambda f: (
            f.is_better
            and (f.goes_on or f.is_short and f.is_unsolved)
            and not (f.far_text and f.is_no_more_right)
        ),
        lambda f: (
            f"the {f.score}"
            + (", and had not stopped at the end" if f.goes_on else f" in only {f.lines[-1]['step']} steps")
            + f.right_text
            + f.far_text
        ),
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
    Rule(
        "no right answers",
        NOTHING,
        lambda f: f.gain >= LITTLE and f.is_no_more_right,
        lambda f: f"the {f.score}, but no more answers are right{f.right_text}{f.far_text}",
        lambda f: [mended(f)],
    ),
    Rule(
        "learnt",
        LEARNT,
        lambda f: f.is_better or f.more_right > 2,
        lambda f: f"the {f.score}{f.since_best}{f.right_text}{f.far_text}",
    ),
    Rule(
        "reward rose",
        LEARNT,
        lambda f: f.rise is not None and f.mean("cut") <= CUT,
        lambda f: (
            f"the reward of drawn answers rose from {f.rise[0]:.3g} in {steps_text(f.lines[:WINDOW])} to"
            f" {f.rise[1]:.3g} in {f.steps}; the {f.score}{f.right_text}"
        ),
    ),
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
        lambda f: f.is_dead and f.near_end == "highest",
        lambda f: f"{f.dead_text}: nearly all answers are right (reward {f.reward:.3g} of {f.range[1]:.3g})",
        lambda f: ["harder questions", "stop here: this set is learnt"],
        early=True,
        is_note=True,
    ),
    Rule(
        "too hard",
        NOTHING,
        lambda f: f.is_dead and f.near_end == "lowest",
        lambda f: (
            f"{f.dead_text}: nearly all answers are wrong from the start (reward {f.reward:.3g}; the lowest"
            f" possible is {f.range[0]:.3g})"
        ),
        lambda f: easier(f),
        early=True,
    ),
    Rule(
        "dead",
        NOTHING,
        lambda f: f.is_dead and not f.near_end and not f.fall,
        lambda f: f"{f.dead_text}, with a reward of {f.reward:.3g}",
        lambda f: (
            easier(f)
            if f.is_low
            else [
                "questions that are answered right now and then",
                f"a larger --group_size than {f.config.group_size}",
                "a reward that gives better answers more (samples.jsonl has some)",
            ]
        ),
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
        "few questions",
        NOT_JUDGED,
        lambda f: f.may_be_chance and abs(f.gain) >= LITTLE,
        lambda f: f"the {f.score}, which may be chance{f.right_text}",
        lambda f: [f"an --eval_file with more than {f.questions} questions"],
    ),
    Rule(
        "lower reward",
        WORSE,
        lambda f: not f.by_loss and f.gain <= -LITTLE,
        lambda f: f"the {f.score}",
        lambda f: [lower_rate(f)],
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
            f" which may be by heart: {f.why_blind}"
        ),
        lambda f: (
            ["more rows, as of 20 or more some are held out"]
            if f.config.origin_of("eval_split").startswith(CHOSEN)
            else ["--eval_split 0.1, which holds documents out"]
        ),
    ),
    Rule(
        "nothing",
        NOTHING,
        lambda f: True,
        lambda f: f"the {f.score}{f.right_text}",
        lambda f: [other_settings(f)],
    ),
)


class Verdict(NamedTuple):
    """Verdict on a run that has ended."""

    name: str  # LEARNT, STILL, BY_HEART, COLLAPSED, WORSE, NOTHING or NOT_JUDGED
    reason: str  # the measurement behind the verdict
    remedy: str  # "": nothing is to be done
    offered: bool  # whether the trained file is worth using
    rule: str = ""  # the name of the rule that held
    numbers: Mapping[str, Any] = MappingProxyType({})  # measured values, before and after the training

    def as_object(self) -> dict[str, Any]:
        """Return the verdict for run.json, from which a page can say it in another language."""
        return {**self._asdict(), "numbers": dict(self.numbers), "sentence": self.sentence}

    @property
    def sentence(self) -> str:
        return f"{self.name}: {self.reason}" + (f"; try {self.remedy}" if self.remedy else "")


def verdict(config: Settled, metrics: list[dict], step: int, history: list[dict]) -> Verdict:
    """Judge a run that has ended, by the first rule that holds. The arguments are those of RunFacts."""
    lines = [line for line in metrics if "rolled_back_to" not in line] or metrics
    windows = []
    if not loss_of(config).metrics.by_loss:
        windows = [lines[i : i + WINDOW] for i in range(len(lines) - WINDOW + 1)]
    facts = RunFacts(config, lines, highest(lines[-WINDOW:], *windows), step, history)
    rule = next(rule for rule in RULES if rule.when(facts))
    offered = facts.is_worth_using if rule.verdict == BY_HEART else rule.verdict in OFFERED
    return Verdict(
        rule.verdict, rule.words(facts), advice(rule, facts), offered, rule.name, numbers_of(facts)
    )


def numbers_of(facts: RunFacts) -> dict[str, Any]:
    """Collect the numbers behind a verdict; None for one that is not known."""
    pairs = {
        "loss" if facts.by_loss else "reward": facts.change,
        "training_loss": facts.losses[::2],
        "right_answers": facts.rights or (None, None),
        "bits_per_byte": facts.bits,
    }
    finite = {
        name: [None if value is None or not math.isfinite(value) else value for value in pair]
        for name, pair in pairs.items()
    }
    return {**finite, "steps": facts.lines[-1]["step"]}


class Warnings:
    """Warnings after every step, each given once. `before` are the earlier lines of a resumed run."""

    def __init__(self, config: Settled, before: Iterable[dict]):
        self.config, self.lines, self.top, self.said = config, [], [], set()
        for line in before:
            self(line)

    def __call__(self, line: dict) -> str:
        """Return the new warnings after this step, with remedies; "" for none."""
        if "rolled_back_to" in line or self.config.is_supervised:
            return ""
        self.lines.append(line)
        del self.lines[WINDOW:-WINDOW]
        self.top = highest(self.lines[-WINDOW:], self.top)
        facts = RunFacts(self.config, self.lines, self.top)
        new = [rule for rule in RULES if rule.early and rule.name not in self.said and rule.when(facts)]
        self.said |= {rule.name for rule in new}
        return "\n".join(
            f"{'note' if rule.is_note else 'WARNING'}: {rule.words(facts)}.\nTry {advice(rule, facts)}."
            for rule in new
        )


def advice(rule: Rule, facts: RunFacts) -> str:
    """Join the remedies of a rule."""
    return ", or ".join(rule.remedies(facts))


def lower_rate(f: RunFacts) -> str:
    """Advise a lower rate; if no state of a run on rewards was better than its base, also a new start."""
    rate = f"a third of the rate: --lr_init {f.config.lr_init / 3:.2g}"
    if f.by_loss or not base_wins(f.history):
        return rate
    return f"starting again in a new --proj_dir with {rate} (without it: the chosen one)"


def larger_beta(f: RunFacts) -> str:
    """Advise a larger weight of the KL to the base, or to have one."""
    beta = f.config.beta
    return f"a larger --beta than {beta:g}" if beta else "--beta 0.04, a KL to the base"


def usual_weight(config: Settled) -> float:
    """Return the weight of the chosen answers' cross entropy that keeps them likely."""
    if config.loss == "orpo":
        return 0.0
    return 1 / config.beta if config.loss == "ipo" else 1.0


def likelier(f: RunFacts) -> str:
    """Advise what keeps chosen answers likely: their cross entropy, and where they have it a lower rate."""
    config = f.config
    if config.loss == "orpo":
        return f"--orpo_lambda below {config.orpo_lambda:g}"
    usual = usual_weight(config)
    return f"--sft_weight {usual:.3g}" if config.sft_weight < usual else lower_rate(f)


def kept_answers(f: RunFacts) -> str:
    """Advise what keeps the answers that were right."""
    if f.is_preference:
        return likelier(f)
    if untried_rate(f) or f.has_risen or not f.by_loss:
        return lower_rate(f)
    return "rows that teach what the held-out questions ask"


def mended(f: RunFacts) -> str:
    """Advise, where the loss fell and the answers are no better, what the facts point to."""
    if not f.by_loss:
        return lower_rate(f)
    if f.is_preference and f.config.sft_weight < usual_weight(f.config):
        return likelier(f)
    if f.far_text:
        return (
            "supervised training on the chosen answers first (--loss sft --sft_field PROMPT,chosen, with the"
            " name of the prompts' column)"
        )
    if tried := untried_rate(f):
        return tried
    if f.goes_on or f.is_short:
        return longer(f)
    if f.collapse:
        return lower_rate(f)
    adapter = f.config.adapter
    is_chosen = f.config.origin_of("peft_config").startswith(CHOSEN)
    if f.has_gap or not (adapter and adapter.gives_rank and is_chosen):
        return "more rows"  # a rank that was given may have been the last run's advice
    return "a larger rank (--peft_config)"


def easier(f: RunFacts) -> list[str]:
    """Advise what lets some answers of a group be right."""
    config = f.config
    flags = {"load_model": config.load_model, "data_file": config.data_file, "peft": config.peft}
    flags |= {"proj_dir": f"{config.proj_dir}-sft", "loss": "sft"}
    words = [word for name, value in flags.items() for word in (f"--{name}", recorded(value))]
    command = shlex.join(["python", "train.py", *words])
    advised = [
        "easier questions",
        "supervised training on the reference answers first"
        f" ({command}; then --load_model with its merged model)",
    ]
    if "partial" not in config.rewards:
        advised.append("a reward that gives a part (--rewards exact=1,partial=1)")
    return [*advised, f"more answers (--group_size above {config.group_size})"]


def longer(f: RunFacts) -> str:
    """Advise twice the length, or what makes ENOUGH steps."""
    config, steps = f.config, f.lines[-1]["step"]
    factor = max(2, math.ceil(ENOUGH / steps))
    if config.epoch_steps and config.epoch_count == 1:
        return f"more steps: --epoch_steps {factor * config.epoch_steps}"
    return f"more passes: --epoch_count {factor * config.epoch_count}"


def untried_rate(f: RunFacts) -> str:
    """Advise to leave the rate to the program; "" where it was left to it."""
    config, origin = f.config, f.config.origin_of("lr_init")
    if origin.startswith(CHOSEN):
        return ""
    why = f"the published one of --peft {config.peft}" if PUBLISHED in origin else "given"
    return f"--lr_init auto, which chooses the learning rate; {config.lr_init:g} was {why}"


def other_settings(f: RunFacts) -> str:
    """Advise, for a run that has learnt nothing, what it has not tried."""
    if not f.by_loss:
        return ", or ".join(easier(f)) if f.is_low or f.mean("dead_groups") > CUT else longer(f)
    if tried := untried_rate(f):
        return tried
    why = f"{f.config.lr_init:g} was {f.config.origin_of('lr_init')}"
    if f.is_worse:
        return f"another --lr_init, which python -m scripts.lr_sweep finds; {why}"
    return f"{longer(f)}; {why}"
