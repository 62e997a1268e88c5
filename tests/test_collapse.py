"""The early warnings about a training on rewards: what goes wrong has them, and what goes well has none."""

import dataclasses
import json
import pathlib
import random

import pytest

from src.config import Config
from src.reporting.collapse import EARLY, WINDOW, CollapseWatch, bounds, course_of, findings

COURSES = pathlib.Path(__file__).parent / "fixtures" / "reward_courses.json"
GRPO = Config(
    load_model="base.pth",
    loss="grpo",
    rewards={"exact": 1.0, "partial": 1.0},
    lr_init=3e-3,
    max_tokens=28,
    precision="fp32",
)
USUAL = {
    "reward": 1.0,
    "dead_groups": 0.4,
    "failed_groups": 0.0,
    "length": 10.0,
    "cut": 0.02,
    "entropy": 0.2,
    "engine_gap": 1e-6,
    "engine_gap_max": 8e-6,
}


def course(count, seed=0, noise=0.03, **ends):
    """Lines of so many steps. A metric with two ends goes from one to the other; rewards have noise."""
    rng, lines = random.Random(seed), []
    for step in range(1, count + 1):
        share = (step - 1) / (count - 1)
        values = dict(USUAL)
        for name, end in ends.items():
            first, last = end if isinstance(end, tuple) else (end, end)
            values[name] = first + share * (last - first)
        values["reward"] += rng.gauss(0, noise)
        lines.append({"step": step, "units": 16, **values})
    return lines


def real(rate):
    """The lines of a run that was made at this rate."""
    columns = json.loads(COURSES.read_text())[rate]
    rows = zip(*columns.values(), strict=True)
    return [
        {**USUAL, "step": step, "units": 16, **dict(zip(columns, row, strict=True))}
        for step, row in enumerate(rows, 1)
    ]


def said(lines, config=GRPO):
    """(step, kind) of all that is said."""
    watch, found = CollapseWatch(config, []), []
    for line in lines:
        before = set(watch.said)
        if watch.after(line):
            found += [(line["step"], kind) for kind in sorted(watch.said - before)]
    return found


def finding(lines, kind, config=GRPO):
    """The last state's finding of a kind."""
    [found] = [one for one in findings(config, course_of(config, lines)) if one.kind == kind]
    return found


def test_real_runs():
    """At a good rate nothing is warned of, also when all is learnt; at ten times that rate it is warned of
    before a quarter of the 60 steps is done.
    """
    good = CollapseWatch(GRPO, [])
    told = [(line["step"], text) for line in real("rate 0.003") if (text := good.after(line))]
    [(step, text)] = told
    assert step == 93 and text.startswith("note: 90 % of the groups of steps 84 to 93 have equal rewards")
    assert said(real("rate 0.03")) == [(13, "fallen"), (23, "cut")]
    # lost before there are ten steps to compare with
    assert said(real("rate 0.03, no warm-up")) == [(6, "fallen"), (15, "cut")]
    known = finding(real("rate 0.03, no warm-up"), "fallen").known
    assert known == "the reward fell from 0.951 in step 1 to 0.0129 in steps 21 to 30"
    last = findings(GRPO, course_of(GRPO, real("rate 0.03")))
    assert not any(one.good for one in last)


def test_a_run_that_learns_is_not_warned_of():
    """It gets sure of what is right, and its groups die as they are solved."""
    for seed in range(10):
        lines = course(200, seed, reward=(0.9, 1.8), dead_groups=(0.05, 0.85), entropy=(0.22, 0.03))
        assert said(lines) == []


def test_all_groups_dead_are_told_apart():
    """By the reward: a gradient of 0 looks alike."""
    dead = {"dead_groups": (0.4, 1.0), "entropy": (0.2, 0.001)}
    solved = course(60, reward=(1.5, 1.99), noise=0.003, **dead)
    assert [kind for _, kind in said(solved)] == ["solved"]
    assert "nearly all answers are right (reward 1.9" in finding(solved, "solved").known
    lost = course(60, reward=(1.2, 0.1), **dead)
    kinds = [kind for _, kind in said(lost)]
    assert kinds == ["fallen", "entropy", "collapsed"] or set(kinds) == {"fallen", "entropy", "collapsed"}
    found = finding(lost, "collapsed")
    assert "the model has collapsed (entropy 0.18 to " in found.known and "not convergence" in found.known
    assert "new --proj_dir" in found.advice and "--lr_init than 0.003" in found.advice
    hard = course(60, reward=0.0, noise=0.0, dead_groups=1.0)
    assert said(hard) == [(EARLY, "too hard")]
    assert "partial" in finding(hard, "too hard").advice
    stuck = course(60, reward=1.2, noise=0.0, dead_groups=0.95)
    assert said(stuck) == [(WINDOW, "alike")]
    assert "all right or all wrong" in finding(stuck, "alike").known


def test_a_reward_of_the_users_own_has_no_known_end():
    assert bounds(GRPO) == (0.0, 2.0)
    mixed = dataclasses.replace(GRPO, rewards={"exact": 2.0, "length": 0.5, "regex": -1.0, "own": 0.0})
    assert bounds(mixed) == (-1.5, 2.0)
    own = dataclasses.replace(GRPO, rewards={"exact": 1.0, "own": 0.1})
    assert bounds(own) is None
    dead = course(40, reward=5.0, noise=0.0, dead_groups=1.0)
    assert said(dead, own) == [(EARLY, "constant")]
    told = finding(dead, "constant", own).known
    assert f"exact, own gave 5 to all of the {40 * 16 * own.group_size:,} answers so far" in told
    once = [dead[0] | {"reward": 4.0, "dead_groups": 0.9}, *dead[1:]]
    assert said(once, own) == [(WINDOW, "alike")]
    fallen = course(40, reward=(5.0, 1.0), dead_groups=(0.5, 1.0))
    assert {kind for _, kind in said(fallen, own)} == {"fallen", "collapsed"}


def test_answers_that_grow_or_do_not_end():
    longer = course(80, length=(8.0, 27.0), cut=(0.0, 0.4))
    [(step, kind)] = said(longer)
    assert kind == "longer" and step < 60
    assert "where they had 9.08, and no higher reward" in finding(longer, "longer").known
    assert "--reward_length 9" in finding(longer, "longer").advice
    cut = course(80, length=(8.0, 27.0), cut=(0.0, 0.9))
    assert [kind for _, kind in said(cut)][-1] == "cut"
    assert "84.9 % of the answers of steps 71 to 80 reached --max_tokens 28" in finding(cut, "cut").known
    assert "a larger --max_tokens" in finding(cut, "cut").advice
    lost = course(80, length=(8.0, 27.0), cut=(0.0, 0.9), reward=(1.2, 0.1))
    assert "the model has lost how answers end" in finding(lost, "cut").known
    # longer ones that are better are what is wanted of a model that reasons
    assert said(course(80, length=(8.0, 27.0), reward=(0.8, 1.5))) == []


def test_a_gap_to_the_engine_and_failed_groups():
    wrong = course(20, engine_gap_max=0.01)
    assert said(wrong) == [(WINDOW, "gap")]
    assert "one of the kernels is wrong" in finding(wrong, "gap").known
    bf16 = dataclasses.replace(GRPO, precision="bf16")
    assert said(wrong, bf16) == []
    far = course(20, engine_gap=0.2, engine_gap_max=1.5)
    assert "--precision bf16 rounds them differently" in finding(far, "gap", bf16).known
    nf4 = dataclasses.replace(bf16, quant="nf4")
    assert "--quant nf4" in finding(far, "gap", nf4).known
    # answers are drawn without the adapter's dropout: no kernel is wrong
    dropout = dataclasses.replace(GRPO, peft="lora", peft_config={"rank": 8, "dropout": 0.1})
    assert said(wrong, dropout) == []
    assert "dropout of 0.1 acts in the training alone" in finding(far, "gap", dropout).known
    failed = course(20, failed_groups=4.0)
    assert said(failed) == [(WINDOW, "failed")]
    assert "25 % of the groups of steps 11 to 20 failed" in finding(failed, "failed").known
    # at once where little is left to tell the reward by
    assert said(course(20, failed_groups=8.0)) == [(WINDOW, "failed")]
    assert said(course(20, failed_groups=9.0)) == [(1, "failed")]


def test_a_warning_is_said_once_also_over_a_resume_and_undone_steps_do_not_count():
    lines = course(60, reward=(1.2, 0.1), dead_groups=(0.4, 1.0))
    whole = said(lines)
    for split in (whole[0][0] - 1, whole[0][0], 40):
        watch, found = CollapseWatch(GRPO, lines[:split]), []
        for line in lines[split:]:
            before = set(watch.said)
            watch.after(line)
            found += [(line["step"], kind) for kind in sorted(watch.said - before)]
        assert found == [(step, kind) for step, kind in whole if step > split]
    undone = [line | {"rolled_back_to": 0} for line in lines]
    assert said(undone) == [] and course_of(GRPO, undone) is None
    missing = [{"step": step, "units": 16, "reward": None} for step in range(1, 30)]
    assert said(missing) == [], "a step of which all groups failed knows nothing"


def test_a_reward_that_is_gone_at_once_is_told_before_ten_steps():
    gone = [
        line | {"reward": reward} for line, reward in zip(course(9), [1.0, 0.12] + [0.01] * 7, strict=True)
    ]
    assert said(gone) == [(4, "fallen")]
    text = [CollapseWatch(GRPO, gone[:3]).after(gone[3])]
    assert text[0].startswith("WARNING: the reward fell from 1 in step 1 to 0.0467 in steps 2 to 4.")
    # so little is a right answer more or less
    rare = [line | {"reward": 0.05 if line["step"] == 1 else 0.0} for line in gone]
    assert said(rare) == []


def test_a_short_run_without_a_live_group_and_too_few_tokens_is_told_what_to_do_first():
    dead = course(4, reward=0.0, noise=0.0, dead_groups=1.0, cut=0.99)
    assert said(dead) == [(EARLY, "cut"), (EARLY, "too hard")]
    found = findings(GRPO, course_of(GRPO, dead))
    assert [one.kind for one in found] == ["cut", "too hard"] and found[0].tries[0] == "a larger --max_tokens"
    assert "the lowest possible is 0" in found[1].known


@pytest.mark.parametrize("seed", range(5))
def test_noise_is_no_fall(seed):
    assert said(course(9, seed, noise=0.2)) == []
    assert said(course(300, seed, noise=0.1)) == []
