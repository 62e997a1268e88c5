"""The verdict: each rule of its table holds for a run that it is about, and not for one that is near it."""

import dataclasses
import json
import pathlib
import random
import re

import pytest

from src.config import Config
from src.config.parse import recorded_settings
from src.config.schema import CHOSEN, PUBLISHED
from src.reporting import run_end
from src.reporting.diagnosis import (
    BY_HEART,
    COLLAPSED,
    LEARNT,
    NOT_JUDGED,
    NOTHING,
    RULES,
    STILL,
    WORSE,
    Warnings,
    advice,
    verdict,
)
from src.reporting.facts import FEW, FEWEST, GROUPS, WINDOW, RunFacts, bounds

from . import program
from .conftest import save_base, write_rows
from .program import succeed

SFT = Config(load_model="base.pth", lr_init=1e-4, epoch_count=2, peft_config={"r": 8}).settled()
DPO = Config(
    load_model="base.pth", loss="dpo", beta=0.1, sft_weight=1.0, lr_init=2e-3, epoch_count=1
).settled()
GRPO = Config(
    beta=0.0,
    load_model="base.pth",
    loss="grpo",
    data_file="q.jsonl",
    proj_dir="out/rewards",
    rewards={"exact": 1.0, "partial": 1.0},
    lr_init=3e-3,
    epoch_count=1,
    max_tokens=28,
    precision="fp32",
).settled()
OWN = dataclasses.replace(GRPO, rewards={"exact": 1.0, "own": 0.1})
GIVEN = "command line"
NAMED = {rule.name: rule for rule in RULES}


def sft(*losses, before=("a",), after=("b",), right="4", steps=(3.0, 3.0), config=SFT, **fields):
    """A run with these held-out losses, sample answers before and after, and training losses."""
    history = []
    for step, loss in enumerate(losses):
        answers = after if step else before
        samples = [{"prompt": "2+2?", "answer": answer, "right": right} for answer in answers]
        history.append({"step": step, "loss": loss, "samples": samples, **(fields if step else {})})
    lines = [{"step": step, "loss": loss} for step, loss in enumerate(steps, 1)]
    return RunFacts(config, lines, (), len(history) - 1, history)


def answered(before, after, *losses, asked=40, config=SFT, steps=None, **found):
    """A run of 400 steps that was asked questions: these shares of answers were right, of them `asked`.

    `found` is what its last answers have in common.
    """
    facts = sft(*losses or (4.0, 3.0), config=config, steps=steps or [4.0] * 100 + [2.9, 3.0] * 150)
    plain = {"empty": 0, "endless": 0, "same": 2, "common": "b", "same_right": 2}
    for line in facts.history:
        share, answers = (after, plain | found) if line["step"] else (before, plain)
        line |= {"asked": asked, "right_answers": share, "answers": answers}
    return facts


def dpo(accuracy=0.9, units=100, logp=-30.0, kl=0.1, right=False, config=DPO, **fields):
    """A run on preferences that ended with this evaluation; log p of a chosen answer was -30."""
    facts = sft(
        0.7,
        0.3,
        after=("4" if right else "b",),
        config=config,
        steps=[0.7] * 20 + [0.3, 0.31] * 10,
        **{"reward_accuracy": accuracy, "units": units, "logp_chosen": logp, "kl": kl},
        **fields,
    )
    facts.before["logp_chosen"] = -30.0
    return facts


def pairs_answered(before, after, asked=40, **fields):
    """A run on preferences that was asked questions, too."""
    facts = dpo(**fields)
    for line, share in zip(facts.history, (before, after), strict=True):
        line |= {"asked": asked, "right_answers": share}
    return facts


def falling(nats, accuracy=0.98, count=100, seed=0):
    """Steps of preferences whose chosen answers move by `nats`, noisily, at a rising accuracy."""
    noise = random.Random(seed)
    return [
        {
            "step": step,
            "units": 16,
            "loss": 1.0,
            "reward_chosen": 0.1 * (nats * step / count + noise.gauss(0, 0.3)),
            "reward_accuracy": 0.5 + (accuracy - 0.5) * step / count,
        }
        for step in range(1, count + 1)
    ]


def course(count=40, seed=0, noise=0.03, **ends):
    """Steps on rewards. A metric with two ends goes from one to the other; rewards have noise."""
    usual = dict(loss=0.0, reward=1.0, dead_groups=0.4, failed_groups=0.0, length=10.0, cut=0.02)
    rng, lines = random.Random(seed), []
    for step in range(1, count + 1):
        values = {"step": step, "units": 16, **usual}
        for name, end in ends.items():
            first, last = end if isinstance(end, tuple) else (end, end)
            values[name] = first + (step - 1) / max(1, count - 1) * (last - first)
        values["reward"] += rng.gauss(0, noise)
        lines.append(values)
    return lines


def real(rate):
    """The steps of a run on rewards at this rate."""
    columns = json.loads((pathlib.Path(__file__).parent / "fixtures/reward_courses.json").read_text())[rate]
    rows = zip(*columns.values(), strict=True)
    return [{"step": step, "units": 16, **dict(zip(columns, row))} for step, row in enumerate(rows, 1)]


def so_far(lines, config=None):
    """A run that has come to the last of these steps."""
    config = config or (DPO if "reward_chosen" in lines[0] else GRPO)
    watch = Warnings(config, lines)
    return RunFacts(config, watch.lines, watch.top)


def said(lines, config=GRPO, before=()):
    """(step, name) of all that is said while a run goes."""
    watch, found = Warnings(config, before), []
    for line in lines:
        known = set(watch.said)
        if watch(line):
            found += [(line["step"], name) for name in sorted(watch.said - known)]
    return found


DEAD = {"dead_groups": (0.4, 1.0)}
FLAT = [3.0, 3.1] * 20  # training losses that tell that nothing moves
FELL = [4.0] * 20 + [1.0] * 20


def rewarded(*rewards, lines=None, step=10, error=0.0):
    """A run on rewards with these held-out ones of 5 questions, ten steps apart, and the state of `step` to
    judge. `error` is the standard error of each."""
    known = {"units": 5, "reward_error": error, "samples": []}
    history = [
        {"step": 10 * i, "loss": -reward, "reward": reward, **known} for i, reward in enumerate(rewards)
    ]
    return RunFacts(GRPO, lines or course(20), (), step, history)


UNTRIED = "--lr_init auto, which chooses the learning rate; 0.0001 was given"
# name of a rule -> its verdict, a run that it holds for, its words, its advice, and runs near by that it does
# not hold for
CASES = {
    "solved before": (
        NOTHING,
        answered(0.975, 1.0, 0.05, 0.05),
        "from 0.0500 to 0.0500; right answers 39 to 40 of 40: the base knew the task already",
        "rows that the base does not answer right",
        # ten right answers may be luck, and the loss says that the base did not know it
        [
            answered(0.975, 1.0, 0.05, 0.04),
            answered(0.5, 1.0),
            answered(0.975, 0.5),
            answered(1.0, 1.0, asked=7),
            sft(0.05, 0.04),
        ],
    ),
    "answers learnt": (
        LEARNT,
        answered(0.0, 0.975, 4.0, 0.1, steps=[4.0 / step for step in range(1, 401)]),
        "the loss on held-out documents fell by 97.50 %, from 4.0000 to 0.1000; right answers 0 to 39 of 40",
        "",
        [answered(0.0, 0.5), answered(0.0, 1.0, asked=1)],
    ),
    "collapsed": (
        # one weekday as the answer for every date
        COLLAPSED,
        answered(0.0, 0.125, same=40, common="Tam", same_right=8),
        "40 of 40 answers are 'Tam'; the loss on held-out documents fell by 25.00 %, from 4.0000 to 3.0000;"
        " right answers 0 to 5 of 40",
        UNTRIED,
        [
            answered(0.0, 0.125, same=30, same_right=8),
            answered(0.0, 0.4, same=40, same_right=38),  # the right answers are alike too
            answered(0.0, 0.5, same=40, same_right=20),
            answered(0.0, 0.0, empty=20, endless=20),
            answered(0.0, 0.0, asked=3, same=3, same_right=2),
        ],
    ),
    "answers lost": (
        WORSE,
        answered(0.6, 0.1),
        "from 4.0000 to 3.0000; right answers 24 to 4 of 40",
        "a third of the rate: --lr_init 3.3e-05",
        [answered(0.6, 0.5), answered(0.6, 0.1, asked=4)],
    ),
    "failed": (
        NOT_JUDGED,
        so_far(course(failed_groups=4.0)),
        "the rewards of 25 % of the groups of steps 31 to 40 failed",
        "mending the reward",
        [so_far(course(failed_groups=1.0))],
    ),
    "lost": (
        WORSE,
        dpo(logp=-37.5),
        "log p of a chosen answer is 7.5 lower on held-out data than before the training, while the accuracy"
        " is 90 %",
        "a third of the rate: --lr_init 0.00067",
        [dpo(logp=-30.5), dpo(logp=-37.5, accuracy=0.5), pairs_answered(0.0, 0.1, logp=-37.5)]
        + [so_far(falling(*case)) for case in ((4.0,), (-12.0, 0.5), (-0.5,), (-50.0, 0.98, 9))],
    ),
    "too fast": (
        # the loss falls by 18 % after the first step, in which the base had 0.08
        WORSE,
        sft(0.0816, 2.775, steps=[0.08] + [3.0] * 10 + [2.46] * 9),
        "the training loss rose from 0.0800 in the first step to 2.4600",
        "a third of the rate: --lr_init 3.3e-05",
        # other runs: the held-out rows are easier, or their loss fell
        [sft(0.5, 0.6, steps=(3.0, 3.1, 3.2)), sft(4.0, 3.0, steps=(0.1, 2.0))],
    ),
    "by heart": (
        BY_HEART,
        sft(4.0, 4.2, steps=(4.0, 1.0)),
        "the training loss fell by 75 %, and the loss on held-out documents rose from 4.0000 to 4.2000",
        "more rows",
        # other runs: the loss only comes back from a rise; the run helps; the run is not worse than its base
        [
            sft(0.5, 0.6, steps=(2.9, 3.1, 3.0)),
            sft(4.0, 3.0, steps=[4.0] * 20 + [2.0] * 20),
            sft(4.0, 3.5, 3.0, steps=FELL),
            answered(0.0, 0.5, 4.0, 4.2, steps=FELL),
        ],
    ),
    "still learning": (
        STILL,
        sft(4.0, *[3.9 - i / 10 for i in range(10)], steps=FELL * 4),
        "the loss on held-out documents fell by 25.00 %, from 4.0000 to 3.0000, and had not stopped",
        "more passes: --epoch_count 4",
        [
            sft(4.0, *[3.0] * 10, steps=FELL * 4),
            sft(4.0, 3.0, steps=[4.0] * 10 + [3.0, 3.1] * 15),
            sft(4.0, 3.99),
            answered(0.0, 0.0),
            rewarded(0.5, 0.6, lines=course(40)),
            rewarded(0.5, 1.0, lines=course(40, reward=(0.0, 2.0)), error=0.2),
        ],
    ),
    "chance": (
        NOTHING,
        dpo(accuracy=0.59),
        "the accuracy on 100 held-out pairs is 59 %, which may be chance",
        "--lr_init auto, which chooses the learning rate; 0.002 was given",
        [dpo(accuracy=0.59, units=1000), dpo(accuracy=0.7), sft(4.0, 3.0)],
    ),
    "no right answers": (
        NOTHING,
        answered(0.1, 0.1),
        "from 4.0000 to 3.0000, but no more answers are right; right answers 4 to 4 of 40",
        UNTRIED,
        [
            answered(0.0, 0.1),
            answered(0.0, 0.0, asked=FEWEST - 1),
            answered(0.2, 0.2, asked=FEW - 1),
            answered(0.0, 0.0, 4.0, 3.99),
        ],
    ),
    "learnt": (
        LEARNT,
        sft(4.0, 3.0, steps=[4.0] * 10 + [3.0, 3.1] * 15),
        "the loss on held-out documents fell by 25.00 %, from 4.0000 to 3.0000",
        "",
        [sft(4.0, 3.95), sft(4.0, 4.2), rewarded(0.5, 0.51), rewarded(0.5, 0.8, error=0.2)],
    ),
    "reward rose": (
        LEARNT,
        rewarded(0.0, 0.2, lines=course(40, reward=(0.06, 0.5), dead_groups=(0.4, 1.0)), error=0.2),
        "the reward of drawn answers rose from 0.0999 in steps 1 to 10 to 0.443 in steps 31 to 40",
        "",
        [
            rewarded(0.0, 0.2, lines=course(40, reward=(0.06, 0.2)), error=0.2),
            rewarded(0.0, 0.2, lines=course(15, reward=(0.06, 0.5)), error=0.2),
            rewarded(0.0, 0.2, lines=course(40, reward=(0.06, 0.5), cut=1.0), error=0.2),
            so_far(course(40, reward=(0.06, 0.5))),
        ],
    ),
    "cut": (
        COLLAPSED,
        so_far(course(cut=(0.0, 0.9))),
        "% of the answers of steps 31 to 40 reached --max_tokens 28 before their end, and count as wrong",
        "a larger --max_tokens",
        [so_far(course(cut=(0.0, 0.4))), so_far(course(5, cut=0.9))],
    ),
    "solved": (
        NOTHING,
        so_far(course(reward=(1.97, 1.99), noise=0.003, dead_groups=1.0)),
        "equal rewards, so that they teach nothing: nearly all answers are right (reward 1.9",
        "harder questions, or stop here: this set is learnt",
        [so_far(course(reward=1.7, noise=0.0, **DEAD)), so_far(course(reward=1.99, noise=0.0))],
    ),
    "too hard": (
        NOTHING,
        so_far(course(1, reward=0.0, noise=0.0, dead_groups=1.0)),
        "100 % of the groups of step 1 have equal rewards, so that they teach nothing: nearly all answers are"
        " wrong from the start (reward 0; the lowest possible is 0)",
        "easier questions, or supervised training on the reference answers first",
        [
            so_far(course(reward=(1.2, 0.0), dead_groups=1.0)),
            so_far([{**line, "units": GROUPS - 1} for line in course(1, reward=0.0, dead_groups=1.0)]),
            so_far(course(1, reward=0.0, dead_groups=0.95)),
        ],
    ),
    "dead": (
        NOTHING,
        so_far(course(reward=1.2, noise=0.0, dead_groups=0.95)),
        "of steps 31 to 40 have equal rewards, so that they teach nothing, with a reward of 1.2",
        "questions that are answered right now and then",
        [so_far(course(reward=1.2, dead_groups=0.85)), so_far(course(reward=(1.9, 0.9), dead_groups=1.0))],
    ),
    "fallen": (
        WORSE,
        so_far(course(reward=(1.2, 0.1))),
        "the reward fell from 1.0",
        "a third of the rate: --lr_init 0.001, or --beta 0.04, a KL to the base",
        [so_far(course(9, seed, noise=0.2)) for seed in range(5)]
        + [so_far(course(300, seed, noise=0.1)) for seed in range(5)]
        + [so_far(course(reward=(1.0, 0.95), noise=0.0)), so_far(course(9, reward=(1.2, 0.1)))],
    ),
    "few questions": (
        # one of five more is right
        NOT_JUDGED,
        rewarded(0.2, 0.4, error=0.2),
        "the reward on held-out questions rose from 0.2 to 0.4, which may be chance",
        "an --eval_file with more than 5 questions",
        [
            rewarded(0.2, 1.2, error=0.2),
            rewarded(0.4, 0.2, error=0.01),
            rewarded(0.4, 0.41, error=0.2),
            sft(4.0, 3.0),
        ],
    ),
    "lower reward": (
        WORSE,
        rewarded(0.5, 0.25),
        "the reward on held-out questions fell from 0.5 to 0.25",
        "starting again in a new --proj_dir with a third of the rate: --lr_init 0.001",
        [rewarded(0.5, 0.49), sft(4.0, 5.0)],
    ),
    "preferred before": (
        NOTHING,
        so_far([{**line, "raw_accuracy": 1.0} for line in falling(0.0)]),
        "the base found every chosen answer likelier than the rejected one before the training",
        "pairs whose rejected answer is one that the model gives",
        [so_far([{**line, "raw_accuracy": share} for line in falling(0.0)]) for share in (0.9, None)]
        + [so_far([{**line, "raw_accuracy": 1.0, "units": 7} for line in falling(0.0)])],
    ),
    "blind": (
        NOTHING,
        sft(steps=FLAT),
        "the training loss went from 3.0500 to 3.0500",
        UNTRIED,
        [sft(steps=FELL), sft(4.0, 3.0, steps=FLAT)],
    ),
    "nothing held out": (
        NOT_JUDGED,
        sft(steps=FELL),
        "the training loss fell by 75 %, from 4.0000 to 1.0000, which may be by heart: nothing was held out",
        "--eval_split 0.1, which holds documents out",
        [sft(4.0, 4.2)],
    ),
    "nothing": (
        NOTHING,
        sft(4.0, 3.998),
        "the loss on held-out documents fell by 0.05 %, from 4.0000 to 3.9980",
        UNTRIED,
        [],  # the last rule holds for all
    ),
}


def test_the_table_has_a_case_for_each_rule():
    assert [*CASES] == [*NAMED]


@pytest.mark.parametrize("name", NAMED)
def test_a_rule_holds_for_its_run_and_for_none_near_by(name):
    """Also, it is the first that holds for that run."""
    given, run, words, tries, others = CASES[name]
    rule = NAMED[name]
    assert rule.when(run) and words in rule.words(run)
    assert advice(rule, run).startswith(tries) and bool(advice(rule, run)) == bool(tries)
    for number, other in enumerate(others):
        assert not rule.when(other), f"case {number}"
    found = next(rule for rule in RULES if rule.when(run))
    assert (found.name, found.verdict) == (name, given)


def judged(run, config=SFT, origin=GIVEN, step=None):
    """The verdict on a run that has ended."""
    step = run.history[-1]["step"] if step is None and run.history else step or 0
    origins = {"peft_config": f"{CHOSEN}: a rank", **config.origins, "lr_init": origin}
    with_origins = dataclasses.replace(config, origins=origins)
    return verdict(with_origins, run.lines, step, run.history)


def test_it_is_the_recommended_state_that_is_judged():
    steps = [4.0] * 10 + [3.0, 3.1] * 15
    found = judged(sft(4.0, 3.0, 3.5, steps=steps), step=1)
    assert found.name == LEARNT and found.reason.endswith(
        "from 4.0000 to 3.0000; it rose after step 1, so best.pth is what is offered"
    )
    # the last state is worse than the base
    found = judged(sft(4.0, 3.0, 4.5, steps=FELL), step=1)
    assert found.name == BY_HEART and found.reason.endswith(
        "loss on held-out documents rose from 3.0000 at step 1 to 4.5000; before the training it was 4.0000"
    )
    assert judged(sft(4.0, 3.0, 4.5, steps=steps), step=2).name == BY_HEART
    assert judged(dpo(), DPO).name == LEARNT
    assert judged(sft(4.0, 3.0)).name == STILL, "two steps tell of no end"
    assert judged(sft(None, 3.0)).reason.startswith(
        "the loss on held-out documents was not finite before the training and is 3.0000"
    )
    late = sft(4.0, 3.0, steps=FELL)
    del late.history[0]
    assert judged(late).name == NOT_JUDGED and "no evaluation before the training" in judged(late).reason
    assert judged(sft(4.0, None)).reason == "the loss on held-out documents is not finite"
    assert judged(sft(4.0, 4.0)).sentence == (
        "nothing learnt: the loss on held-out documents went from 4.0000 to 4.0000; try --lr_init auto, which"
        " chooses the learning rate; 0.0001 was given"
    )


BY_METHOD = f"{CHOSEN}: from method"


@pytest.mark.parametrize(
    "origin, settings, words",
    [
        ("", {}, "--lr_init auto, which chooses the learning rate; 0.0001 was given"),
        (PUBLISHED, {}, "--lr_init auto, which chooses the learning rate; 0.0001 was the published one"),
        (f"{CHOSEN}: a guess", {}, "more passes: --epoch_count 200; 0.0001 was chosen: a guess"),
    ],
)
def test_what_to_try_is_what_was_not_tried(origin, settings, words):
    assert judged(sft(4.0, 3.99), dataclasses.replace(SFT, **settings), origin).remedy.startswith(words)


def test_answers_that_are_lost_at_a_chosen_rate_point_to_the_rows():
    found = judged(answered(0.6, 0.1, 4.0, 4.2), SFT, BY_METHOD)
    assert found.name == WORSE and found.remedy == "rows that teach what the held-out questions ask"


def test_ten_right_answers_before_do_not_say_that_nothing_was_learnt():
    """200 other questions rose from 85 to 100 %, where 10 of 10 were right before and after."""
    steps = [max(4.0 / step, 0.7) for step in range(1, 401)]
    found = judged(answered(1.0, 1.0, 4.0, 0.7, asked=10, steps=steps))
    assert found.name == LEARNT and found.offered and "by 82.50 %" in found.reason


def test_of_few_rows_none_are_held_out():
    config = dataclasses.replace(SFT, origins={"eval_split": f"{CHOSEN}: 15 documents, too few"})
    assert advice(NAMED["nothing held out"], sft(steps=FELL, config=config)).startswith(
        "more rows, as of 20 or"
    )


def test_a_larger_rank_is_not_advised_to_who_has_given_one():
    """48 instead of the chosen 12 was the advice, gave no right answer, and the advice was the same."""
    for origin, remedy in (
        (f"{CHOSEN}: an eighth", "a larger rank (--peft_config)"),
        ("command line", "more rows"),
    ):
        config = dataclasses.replace(SFT, origins={"peft_config": origin})
        assert judged(answered(0.0, 0.0, config=config), config, BY_METHOD).remedy == remedy


def test_more_passes_are_no_advice_where_they_did_harm():
    found = judged(sft(4.0, 4.5), SFT, f"{CHOSEN}: a guess")
    assert found.remedy.startswith("another --lr_init, which python -m scripts.lr_sweep finds; 0.0001 was")


@pytest.mark.parametrize(
    "run, config, origin, words",
    [
        (answered(0.0, 0.0), SFT, GIVEN, UNTRIED),
        (answered(0.0, 0.0), SFT, BY_METHOD, "a larger rank (--peft_config)"),
        (answered(0.0, 0.0, same=40), SFT, BY_METHOD, "a third of the rate: --lr_init 3.3e-05"),
        (answered(0.0, 0.0, steps=[4.0] * 100 + [1.0, 1.1] * 150), SFT, BY_METHOD, "more rows"),
        (
            answered(0.0, 0.0, steps=[4.0] * 20 + [2.9, 3.0] * 10),
            SFT,
            BY_METHOD,
            "more passes: --epoch_count 10",
        ),
        (answered(0.0, 0.0, endless=40), dataclasses.replace(DPO, sft_weight=0.0), GIVEN, "--sft_weight 1"),
    ],
)
def test_what_the_facts_point_to_where_the_loss_fell_and_no_answer_is_right(run, config, origin, words):
    assert judged(run, config, origin).remedy == words


def test_none_right_of_the_fewest_questions_is_nothing_learnt():
    """Eight questions tell it where some were right before: one of fewer may be right by chance."""
    assert (FEWEST, FEW) == (5, 8)
    for run in (answered(0.0, 0.0, asked=FEWEST), answered(0.25, 0.25, asked=FEW)):
        assert judged(run).name == NOTHING and not judged(run).offered
    assert judged(answered(0.0, 0.0, asked=FEWEST - 1)).name == LEARNT
    assert judged(answered(0.25, 0.25, asked=FEW - 1)).name == LEARNT


def test_a_large_kl_alone_condemns_no_run():
    """KL is told where no answer is known to be right. Without a right answer the run is not offered."""
    far = "; KL to the reference is 5.88 per token, very large: read the sample answers"
    found = judged(pairs_answered(0.0, 0.1, asked=10, kl=5.88, accuracy=1.0), DPO)
    assert found.name == STILL and found.offered and "KL" not in found.reason
    found = judged(dpo(kl=5.88, accuracy=1.0), DPO)
    assert found.name == LEARNT and found.offered and found.reason.endswith(far)
    assert "KL" not in judged(dpo(kl=5.88, right=True), DPO).reason + judged(dpo(kl=0.9), DPO).reason
    none = pairs_answered(0.0, 0.0, kl=5.88, accuracy=0.83, logp=-20.0)
    for lines in (none.lines, none.lines[:4]):
        none.lines = lines
        found = judged(none, DPO)
        assert found.name == NOTHING and not found.offered and found.reason.endswith(far)
        assert found.remedy.startswith("supervised training on the chosen answers first (--loss sft")


def test_what_is_known_by_heart_is_offered_if_it_helps():
    """More right answers, or a lower loss if the answers do not deny it."""

    def offered(*losses, right=None, asked=6):
        run = sft(*losses, steps=FELL)
        for line in run.history if right else ():
            line |= {"asked": asked, "right_answers": right[line["step"] > 0]}
        found = judged(run, step=1)
        assert found.name == BY_HEART
        return found.offered

    assert offered(4.0, 3.0, 4.2) and offered(4.0, 3.0, 4.2, right=(0.0, 1 / 6))
    assert offered(4.0, 4.1, 4.2, right=(0.0, 1 / 6)), "best.pth goes by right answers"
    assert not offered(4.0, 3.99, 4.2)
    assert not offered(4.0, 3.0, 4.2, right=(0.0, 0.0)) and not offered(4.0, 3.99, 4.2, right=(0.0, 0.0))
    assert not offered(4.0, 4.2, 4.3)


def test_few_steps_with_few_right_answers_still_learn():
    """By the loss alone they have stopped."""
    steps = [12.0] * 10 + [3.5, 3.6] * 23
    found = judged(answered(0.0, 0.25, 12.0, 3.5, steps=steps))
    assert found.name == STILL and found.reason.endswith("in only 56 steps; right answers 0 to 10 of 40")
    assert found.remedy == "more passes: --epoch_count 8"
    assert judged(answered(0.0, 0.95, 12.0, 3.5, steps=steps)).name == LEARNT
    assert judged(answered(0.0, 0.25, 12.0, 3.5, 3.6, steps=steps), step=1).name == LEARNT


def test_a_training_loss_far_below_the_held_out_loss_is_by_heart():
    """If no evaluation between tells when it stopped, or if no more answers are right."""
    [words] = {
        judged(run, step=1).reason for run in (sft(4.0, 3.5, steps=FELL), sft(4.0, 3.5, steps=FELL * 2))
    }
    assert words.startswith(
        "the training loss fell by 75 %, and the loss on held-out documents fell by 12.50 %"
    )
    assert judged(sft(4.0, 3.5, steps=FELL)).name == BY_HEART
    assert judged(sft(4.0, 3.5, 3.6, steps=FELL), step=1).name == LEARNT
    assert judged(answered(0.0, 0.0, 4.0, 3.5, 3.6, steps=FELL * 6), step=1).name == BY_HEART


def test_what_the_base_has_in_common_already_is_no_collapse():
    run = answered(0.0, 0.0, 4.0, 3.99, steps=FLAT, empty=40)
    assert judged(run).name == COLLAPSED
    run.before["answers"] = run.after["answers"]
    assert judged(run).name == NOTHING


def test_a_run_on_rewards_is_judged_by_its_held_out_reward():
    found = judged(rewarded(0.5, 0.51), GRPO)
    assert found.name == NOTHING and found.remedy == "more passes: --epoch_count 10"
    assert found.reason == "the reward on held-out questions rose from 0.5 to 0.51"
    assert judged(rewarded(0.5, 0.6, lines=course(40)), GRPO).name == LEARNT
    assert judged(rewarded(0.5, 0.25, error=0.1), GRPO).name == NOT_JUDGED, "chance comes first"
    one = rewarded(0.0, 1.0, error=None)
    assert judged(one, GRPO).name == NOT_JUDGED, "a mean of one question has no error"
    own = judged(rewarded(lines=course(20, noise=0.0)), GRPO)
    assert own.reason == "the reward on the training's own questions went from 1 to 1"
    # the remedy for dead groups, in the place of a lower rate
    for dead in (1.0, 0.8):
        hard = judged(rewarded(0.0, 0.0, lines=course(20, reward=0.0, noise=0.0, dead_groups=dead)), GRPO)
        assert hard.name == NOTHING and hard.remedy == (
            "easier questions, or supervised training on the reference answers first (python train.py"
            " --load_model base.pth --data_file q.jsonl --peft miss --proj_dir out/rewards-sft --loss sft;"
            " then --load_model with its merged model), or more answers (--group_size above 8)"
        )
    # answers that do not end any more
    run = rewarded(0.5, 0.0)
    for line, endless in zip(run.history, (0, 9)):
        common = {"empty": 0, "endless": endless, "same": 1, "common": "a", "same_right": 1}
        line |= {"asked": 10, "answers": common}
    found = judged(run, GRPO)
    assert found.name == COLLAPSED and found.reason.startswith("9 of 10 answers do not end; the reward on")
    assert found.remedy.startswith(
        "starting again in a new --proj_dir with a third of the rate: --lr_init 0.001"
    )
    # a reward that fell late, where an earlier state is offered
    lines = course(20, reward=0.5, noise=0.0) + course(20, reward=0.0, cut=1.0, noise=0.0)
    lines = [{**line, "step": step} for step, line in enumerate(lines, 1)]
    found = judged(rewarded(0.5, 0.9, 0.0, lines=lines), GRPO, step=10)
    assert found.name == LEARNT and found.reason.endswith(
        "it fell after step 10, so best.pth is what is offered"
    )


def test_the_range_of_a_reward_is_known_unless_a_function_of_the_user_has_a_part():
    assert bounds(GRPO.rewards) == (0.0, 2.0) and bounds(OWN.rewards) is None
    weights = {"exact": 2.0, "length": 0.5, "regex": -1.0, "own": 0.0}
    assert bounds(weights) == (-1.5, 2.0)
    dead = course(reward=5.0, noise=0.0, dead_groups=1.0)
    assert said(dead, OWN) == [(1, "dead")]
    assert (WINDOW + 1 < said(course(reward=(5.0, 1.0)), OWN)[0][0] < 30) and bounds(OWN.rewards) is None


def random_run(rng, config):
    """Steps and evaluations of any numbers, some of them not finite or not there, and the state to judge."""
    count, share = rng.choice([1, 2, 12, 40]), rng.random
    number = lambda: rng.choice([None, 0.0, share(), 5 * share()])  # noqa: E731
    names = {"dpo": ("raw_accuracy", "reward_accuracy", "logp_chosen", "kl"), "grpo": ("reward",)}
    metrics = dict.fromkeys(names.get(config.loss, ()), number)
    lines = [
        {
            "step": step,
            "loss": rng.choice([0.0, share()]),
            "units": 8,
            "reward_chosen": number(),
            "cut": share(),
        }
        | {"dead_groups": rng.choice([0.0, 1.0]), "failed_groups": 0}
        | {name: value() for name, value in metrics.items()}
        for step in range(1, count + 1)
    ]
    steps = sorted({0, count, rng.randint(0, count)})[rng.random() < 0.1 :]
    history = []
    for step in steps * (rng.random() < 0.9):
        asked = rng.choice([1, 40])
        fault = {name: rng.randint(0, asked) for name in ("empty", "endless", "same", "same_right")}
        line = {"step": step, "loss": number(), "units": 9, "samples": [], "asked": asked}
        line |= {"answers": fault | {"common": "a"}} | {name: value() for name, value in metrics.items()}
        line |= {"right_answers": share()} if rng.random() < 0.5 else {}
        history.append(line | ({"loss": line["reward"] and -line["reward"]} if config.loss == "grpo" else {}))
    return lines, rng.choice([line["step"] for line in history] or [count]), history


def test_every_run_has_a_verdict():
    rng = random.Random(0)
    for _ in range(500):
        config = rng.choice([SFT, DPO, GRPO, OWN])
        assert verdict(config, *random_run(rng, config)).reason


# while a run goes


def test_real_runs():
    """On rewards nothing is warned of at a good rate, also when all is learnt; at ten times that rate it is
    before a quarter of the 60 steps is done. Plain DPO on pairs of sorted and reversed letters loses its
    chosen answers after they rose.
    """
    good = Warnings(GRPO, [])
    [(step, text)] = [(line["step"], text) for line in real("rate 0.003") if (text := good(line))]
    assert step == 93 and text.startswith("note: 90 % of the groups of steps 84 to 93 have equal rewards")
    assert said(real("rate 0.03")) == [(13, "fallen"), (23, "cut")]
    lost = real("rate 0.03, no warm-up")  # lost before there is a window to compare with
    assert said(lost) == [(WINDOW, "fallen"), (15, "cut")]
    assert "fell from 0.951 in step 1 to 0.0129 in steps 21 to 30" in NAMED["fallen"].words(so_far(lost))
    rewards = "0 18 34 27 58 64 53 29 8 26 5 -43 -55 -53 -31 -65 -86 -149 -71 -104 -101 -153 -176 -106"
    lines = [
        {"step": step, "reward_chosen": int(reward) / 100, "reward_accuracy": float(step > 1)}
        for step, reward in enumerate(rewards.split(), 1)
    ]
    assert said(lines, DPO) == [(17, "lost")]  # step 17 of 60


def test_a_run_that_learns_is_not_warned_of():
    for seed in range(10):
        assert said(course(200, seed, reward=(0.9, 1.8), dead_groups=(0.05, 0.85))) == []


def test_each_warning_is_said_once_also_over_a_resume_and_undone_steps_do_not_count():
    lines = course(60, reward=(1.2, 0.1), cut=(0.0, 1.0))
    whole = said(lines)
    assert {name for _, name in whole} == {"fallen", "cut"}
    for split in (whole[0][0] - 1, whole[0][0], 40):
        assert said(lines[split:], before=lines[:split]) == [one for one in whole if one[0] > split]
    assert said([line | {"rolled_back_to": 0} for line in lines]) == []
    unknown = [{"step": step, "units": 16, "reward": None} for step in range(1, 30)]
    assert said(unknown) == [], "a step of which all groups failed knows nothing"
    [(step, name)] = said(falling(-12.0), DPO)
    assert WINDOW <= step < 40 and name == "lost", "while the run can still be stopped"
    text = Warnings(DPO, falling(-12.0)[: step - 1])(falling(-12.0)[step - 1])
    assert text.startswith("WARNING: log p of a chosen answer is ")
    assert "\nTry a third of the rate: --lr_init 0.00067" in text


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"sft_weight": 0.0}, "--sft_weight 1"),
        ({"sft_weight": 0.0, "loss": "ipo"}, "--sft_weight 10"),
        ({"loss": "orpo"}, "--orpo_lambda below 0.1"),
    ],
)
def test_what_keeps_chosen_answers_likely(settings, words):
    run = dpo(logp=-37.5, config=dataclasses.replace(DPO, **settings))
    assert advice(NAMED["lost"], run) == words


# runs


def test_a_run_that_does_not_learn_says_so_and_its_card_too(tmp_path, capsys):
    """A run that was stopped is not judged."""
    save_base(tmp_path / "base.pth")
    for name, count in (("rows", 24), ("held", 5)):
        texts = ["ab c" * random.Random(i).randint(1, 4) for i in range(count)]
        rows = [{"prompt": f"{name} {i}", "completion": text} for i, text in enumerate(texts)]
        write_rows(tmp_path / f"{name}.jsonl", rows)
    flags = (
        f"--load_model {tmp_path}/base.pth --data_file {tmp_path}/rows.jsonl"
        f" --eval_file {tmp_path}/held.jsonl --epoch_count 1 --tokenizer bytes --accelerator cpu"
        " --micro_bsz 2 --packing 0"
    )

    def trained(name, rate):
        run = f"{flags} --proj_dir {tmp_path}/{name} --lr_init {rate}"
        return succeed(program.run(run.split())), (tmp_path / name / "run_card.md").read_text()

    output, card = trained("still", "1e-9")
    words = "nothing learnt: the loss on held-out documents fell by 0.00 %"
    assert f"\nverdict:   {words}" in output and f"| verdict | {words}" in card
    assert "merge it:" not in output and "\nkeep:      the base; " in output
    kept = json.loads((tmp_path / "still" / "run.json").read_text())["verdict"]
    assert kept["name"] == NOTHING and kept["remedy"].startswith("--lr_init auto")
    assert kept["rule"] == "nothing" and kept["sentence"] in card and kept["forgotten"] is None
    before, after = kept["numbers"]["loss"]
    assert f"from {before:.4f} to {after:.4f}" in kept["reason"] and kept["numbers"]["steps"] == 12
    output, card = trained("moved", "1e-2")
    assert "\nverdict:   still learning: the loss on held-out documents fell by " in output
    assert "\nmerge it:  " in output and "; try more passes: --epoch_count " in card
    config = Config(load_model="base.pth", proj_dir=str(tmp_path / "still"), epoch_count=1, early_stop=0)
    config = config.settled()
    done = recorded_settings(str(tmp_path / "still" / "config.yaml")).settings
    run_end.finish(done, [], 12, 12, {"forgetting": {"all": 4.7}})
    assert json.loads((tmp_path / "still" / "run.json").read_text())["verdict"]["forgotten"] == 4.7
    said = capsys.readouterr().out
    assert re.search(
        "\nverdict: .*\nforgotten: .*KL 4.7 per token.*; to keep more, mix rows of that into", said
    )
    card = (tmp_path / "still" / "run_card.md").read_text()
    assert "besides may be lost; to keep more, mix rows of that into the data" in card
    run_end.finish(config, [], 4, 12)
    stopped = capsys.readouterr().out
    assert stopped.startswith("stopped, go on with --resume auto") and "verdict" not in stopped
