"""The diagnosis: each rule of its table holds for a run that it is about, and not for one that is near it."""

import dataclasses
import json
import pathlib
import random

import pytest
import torch

from src.config import Config
from src.config.schema import CHOSEN, PUBLISHED
from src.reporting import run_end
from src.reporting.diagnosis import GROUPS, RULES, WINDOW, Facts, Warnings, advice, bounds, diagnosis

from . import program
from .conftest import make_arch, random_tensors
from .program import succeed

SFT = Config(load_model="base.pth", lr_init=1e-4, epoch_count=2, peft_config={"r": 8})
DPO = Config(load_model="base.pth", loss="dpo", beta=0.1, sft_weight=1.0, lr_init=2e-3)
GRPO = Config(
    beta=0.0,
    load_model="base.pth",
    loss="grpo",
    rewards={"exact": 1.0, "partial": 1.0},
    lr_init=3e-3,
    max_tokens=28,
    precision="fp32",
)
OWN = dataclasses.replace(GRPO, rewards={"exact": 1.0, "own": 0.1})
GIVEN = "command line"
NAMED = {rule.name: rule for rule in RULES}


def sft(*losses, before=("a",), after=("b",), right="4", steps=(3.0, 3.0), config=SFT, **beside):
    """A run with these held-out losses, sample answers before and after, and training losses."""
    history = []
    for step, loss in enumerate(losses):
        answers = after if step else before
        samples = [{"prompt": "2+2?", "answer": answer, "right": right} for answer in answers]
        history.append({"step": step, "loss": loss, "samples": samples, **(beside if step else {})})
    lines = [{"step": step, "loss": loss} for step, loss in enumerate(steps, 1)]
    return Facts(config, lines, (), len(history) - 1, history)


def dpo(accuracy=0.9, units=100, logp=-30.0, kl=0.1, right=False, config=DPO, **beside):
    """A run on preferences that ended with this evaluation; log p of a chosen answer was -30."""
    facts = sft(
        0.7,
        0.3,
        after=("4" if right else "b",),
        config=config,
        **{"reward_accuracy": accuracy, "units": units, "logp_chosen": logp, "kl": kl},
        **beside,
    )
    facts.before["logp_chosen"] = -30.0
    return facts


def falling(nats, accuracy=0.98, count=100, seed=0):
    """Steps of preferences whose chosen answers move by `nats`, noisily, at a rising accuracy."""
    noise = random.Random(seed)
    return [
        {
            "step": step,
            "units": 16,
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
    return Facts(config, watch.lines, watch.top)


def said(lines, config=GRPO, before=()):
    """(step, name) of all that is said while a run goes."""
    watch, found = Warnings(config, before), []
    for line in lines:
        known = set(watch.said)
        if watch(line):
            found += [(line["step"], name) for name in sorted(watch.said - known)]
    return found


DEAD = {"dead_groups": (0.4, 1.0)}
# name of a rule -> a run that it holds for, its words, its advice, and runs near by that it does not hold for
CASES = {
    "worse": (
        sft(4.0, 4.2),
        "the run has not learnt: the loss on held-out documents rose from 4.0000 to 4.2000",
        "--lr_init auto, which searches for the learning rate; 0.0001 was given",
        [sft(4.0, 3.9), sft(None, 3.0), sft(steps=(3.0, 3.0))],
    ),
    "next to nothing": (
        sft(4.0, 3.998),
        "learnt next to nothing: the loss on held-out documents fell by 0.05 %, from 4.0000 to 3.9980",
        "--lr_init auto",
        [sft(4.0, 3.91), sft(4.0, 4.1)],
    ),
    "blind": (
        sft(steps=[3.0, 3.1] * 10),
        "the run may have learnt nothing: the training loss went from 3.0500 to 3.0500",
        "--lr_init auto",
        [sft(steps=[4.0] * 10 + [3.9] * 10), sft(4.0, 3.0, steps=[3.0, 3.1] * 10)],
    ),
    "too fast": (
        # its loss falls by 18 % after the first step, in which the base had 0.08
        sft(0.0816, 2.775, steps=[0.08] + [3.0] * 10 + [2.46] * 9),
        "the training loss rose from 0.0800 in the first step to 2.4600",
        "a lower --lr_init than 0.0001",
        # of easier rows, and a loss that fell
        [sft(0.5, 0.6, steps=(3.0, 3.1, 3.2)), sft(4.0, 3.0, steps=(0.1, 2.0))],
    ),
    "nothing held out": (
        sft(steps=(2.0, 3.0)),
        "no documents were held out, so no more is known",
        "--eval_split 0.1, which holds documents out",
        [sft(4.0, 4.2)],
    ),
    "by heart": (
        sft(4.0, 4.2, steps=(4.0, 1.0)),
        "only the training loss fell, by 75.00 %: what was learnt does not help elsewhere",
        "--lr_init auto",
        # it only comes back from what it rose to, and one that helps
        [sft(0.5, 0.6, steps=(2.9, 3.1, 3.0)), sft(4.0, 3.0, steps=(4.0, 1.0))],
    ),
    "chance": (
        dpo(accuracy=0.59),
        "the accuracy on 100 held-out pairs is 59 %, which may be chance",
        "--lr_init auto",
        [dpo(accuracy=0.59, units=1000), dpo(accuracy=0.7), sft(4.0, 3.0)],
    ),
    "same answers": (
        sft(4.0, 3.0, after=("a",)),
        "the sample answers are those of before the training, although the loss on held-out documents fell by"
        " 25.00 %",
        "--lr_init auto",
        [sft(4.0, 3.0, before="4", after="4"), sft(4.0, 3.0, before=(), after=()), sft(4.0, 3.0)],
    ),
    "known before": (
        sft(0.05, 0.06, before="4", after="4"),
        "the sample answers were right before the training, so the base may know the task already",
        "--lr_init auto",
        [sft(4.0, 3.0, before="4", after="4"), sft(4.0, 4.1)],
    ),
    "lost": (
        dpo(logp=-37.5),
        "log p of a chosen answer is 7.5 lower on held-out data than before the training, while the accuracy"
        " is 90 %",
        "--sft_weight above 1, or a larger --beta than 0.1, or a lower --lr_init than 0.002",
        [dpo(logp=-30.5), dpo(logp=-37.5, accuracy=0.5)]
        + [so_far(falling(*case)) for case in ((4.0,), (-12.0, 0.5), (-0.5,), (-50.0, 0.98, 9))],
    ),
    "damaged": (
        # dpo without cross entropy on 50 pairs: accuracy 83 %, no right answer
        dpo(kl=5.88, accuracy=0.83, logp=-20.0),
        "KL to the reference is 5.88 per token, very large: little of the base is left, and no sample answer",
        "supervised training on the chosen answers first",
        [dpo(kl=5.88, right=True), dpo(kl=0.9), sft(4.0, 3.0)],
    ),
    "cut": (
        so_far(course(cut=(0.0, 0.9))),
        "% of the answers of steps 31 to 40 reached --max_tokens 28 before their end, and count as wrong",
        "a larger --max_tokens",
        [so_far(course(cut=(0.0, 0.4))), so_far(course(5, cut=0.9))],
    ),
    "solved": (
        so_far(course(reward=(1.5, 1.99), noise=0.003, **DEAD)),
        "equal rewards, so that they teach nothing: nearly all answers are right (reward 1.9",
        "harder questions, or stop here: this set is learnt",
        [so_far(course(reward=1.7, noise=0.0, **DEAD)), so_far(course(reward=1.99, noise=0.0))],
    ),
    "too hard": (
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
        so_far(course(reward=1.2, noise=0.0, dead_groups=0.95)),
        "of steps 31 to 40 have equal rewards, so that they teach nothing, with a reward of 1.2",
        "questions that are answered right now and then",
        [so_far(course(reward=1.2, dead_groups=0.85)), so_far(course(reward=(1.9, 0.9), dead_groups=1.0))],
    ),
    "fallen": (
        so_far(course(reward=(1.2, 0.1))),
        "the reward fell from 1.0",
        "a lower --lr_init than 0.003, or --beta 0.04, a KL to the base",
        [so_far(course(9, seed, noise=0.2)) for seed in range(5)]
        + [so_far(course(300, seed, noise=0.1)) for seed in range(5)]
        + [so_far(course(reward=(1.0, 0.95), noise=0.0)), so_far(course(9, reward=(1.2, 0.1)))],
    ),
    "failed": (
        so_far(course(failed_groups=4.0)),
        "the rewards of 25 % of the groups of steps 31 to 40 failed",
        "mending the reward",
        [so_far(course(failed_groups=1.0))],
    ),
}


@pytest.mark.parametrize("name", NAMED)
def test_a_rule_holds_for_its_run_and_for_none_near_by(name):
    run, words, tries, others = CASES[name]
    assert NAMED[name].when(run) and words in NAMED[name].words(run)
    assert advice([NAMED[name]], run).startswith(tries)
    for number, other in enumerate(others):
        assert not NAMED[name].when(other), f"case {number}"
    assert others


def judged(run, config=SFT, origin=GIVEN, searched=False, step=None):
    """The diagnosis of a run that has ended."""
    step = run.history[-1]["step"] if step is None and run.history else step or 0
    told = dataclasses.replace(config, origins={"lr_init": origin})
    return diagnosis(told, run.lines, step, run.history, searched)


def test_a_run_that_has_learnt_has_no_doubt_and_it_is_the_recommended_state_that_is_judged():
    """A note alone, as of nothing held out, is none."""
    for run in (sft(4.0, 3.91), sft(4.0, 3.0, before="4", after="4"), sft(steps=[4.0] * 10 + [3.9] * 10)):
        assert judged(run) is None
    best_is_first = sft(4.0, 3.0, 4.5)
    assert judged(best_is_first, step=1) is None and judged(best_is_first, step=2)
    assert judged(dpo(), DPO) is None
    assert judged(dpo(accuracy=0.15), DPO).known == [
        "the accuracy on 100 held-out pairs is 15 %, which is less than chance"
    ]
    assert judged(sft(4.0, None)).known[0].endswith("the loss on held-out documents is not finite")


def test_sentences_of_several_rules_stand_together_with_what_they_advise_once():
    assert judged(sft(4.0, 4.0, after=("a",))).known == [
        "the run has not learnt: the loss on held-out documents went from 4.0000 to 4.0000",
        "the sample answers are those of before the training",
    ]
    found = judged(sft(steps=[0.29, 5.1, 6.3] + [2.8] * 20))
    assert found.known == [
        "the training loss rose from 0.2900 in the first step to 2.8000",
        "no documents were held out, so no more is known",
    ]
    assert found.advice == "a lower --lr_init than 0.0001, or --eval_split 0.1, which holds documents out"


PASSES, SEARCHED = "more passes (--epoch_count above 2), or ", "; the learning rate was searched for already"
BASE = "or a base that knows more of the task"


@pytest.mark.parametrize(
    "origin, settings, words",
    [
        ("", {}, "--lr_init auto, which searches for the learning rate; 0.0001 was given"),
        (PUBLISHED, {}, "--lr_init auto, which searches for the learning rate; 0.0001 is the published one"),
        (
            f"{CHOSEN}: a guess",
            {},
            f"{PASSES}another --lr_init, which python -m scripts.lr_sweep finds; 0.0001 was chosen: a guess",
        ),
        (
            SEARCHED,
            {},
            f"{PASSES}more data, or another rank (--peft_config) or method (--peft), {BASE}{SEARCHED}",
        ),
        (
            SEARCHED,
            {"peft": "state", "peft_config": {}},
            f"{PASSES}more data, or another method (--peft), {BASE}{SEARCHED}",
        ),
        (
            SEARCHED,
            {"peft": "none", "peft_config": {}, "load_model": ""},
            f"{PASSES}more data, or an adapter (--peft miss){SEARCHED}",
        ),
    ],
)
def test_what_to_try_next_is_what_was_not_tried(origin, settings, words):
    config, searched = dataclasses.replace(SFT, **settings), origin == SEARCHED
    assert judged(sft(4.0, 3.99), config, origin, searched).advice.startswith(words)
    # more passes are no advice where the last ones did harm
    for run, step in ((sft(4.0, 3.99, 4.5), 1), (sft(4.0, 4.5), 1)):
        assert judged(run, config, origin, searched, step).advice.startswith(words.removeprefix(PASSES))


def rewarded(*rewards, lines=None):
    """A run on rewards with these held-out ones, ten steps apart."""
    history = [
        {"step": 10 * i, "loss": -reward, "reward": reward, "samples": []} for i, reward in enumerate(rewards)
    ]
    return Facts(GRPO, lines or course(20), (), 10, history)


def test_a_run_on_rewards_is_judged_by_its_held_out_reward():
    known = "the run has learnt next to nothing: the reward on held-out questions rose from 0.5 to 0.51"
    found = judged(rewarded(0.5, 0.51), GRPO)
    assert found.known == [known] and "another --lr_init than 0.003" in found.advice
    assert judged(rewarded(0.5, 0.6), GRPO) is None
    own = judged(rewarded(lines=course(20, noise=0.0)), GRPO)
    assert own.known == [
        "the run has not learnt: the reward on the training's own questions went from 1 to 1"
    ]
    lost = judged(rewarded(0.5, 0.25), GRPO)
    assert lost.known == ["the run has not learnt: the reward on held-out questions fell from 0.5 to 0.25"]
    assert lost.advice.startswith("starting again in a new --proj_dir with a lower --lr_init than 0.003")
    # with what to do about dead groups in the place of a lower rate
    hard = judged(rewarded(0.0, 0.0, lines=course(20, reward=0.0, noise=0.0, dead_groups=1.0)), GRPO)
    assert len(hard.known) == 2 and hard.advice.startswith("easier questions, or supervised training")


def test_the_range_of_a_reward_is_known_unless_a_function_of_the_user_has_a_part():
    assert bounds(GRPO.rewards) == (0.0, 2.0) and bounds(OWN.rewards) is None
    weights = {"exact": 2.0, "length": 0.5, "regex": -1.0, "own": 0.0}
    assert bounds(weights) == (-1.5, 2.0)
    dead = course(reward=5.0, noise=0.0, dead_groups=1.0)
    assert said(dead, OWN) == [(1, "dead")]
    assert (WINDOW + 1 < said(course(reward=(5.0, 1.0)), OWN)[0][0] < 30) and bounds(OWN.rewards) is None


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
    assert said(lines, DPO) == [(17, "lost")]  # of 60


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
    assert "\nTry --sft_weight above 1, or" in text


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"sft_weight": 0.0}, "--sft_weight 1, or a larger --beta than 0.1, or a lower"),
        ({"sft_weight": 0.0, "loss": "ipo"}, "--sft_weight 10, or a larger --beta than 0.1"),
        ({"loss": "orpo"}, "--orpo_lambda below 0.1, or a lower"),
    ],
)
def test_what_keeps_chosen_answers_likely(settings, words):
    run = dpo(logp=-37.5, config=dataclasses.replace(DPO, **settings))
    assert advice([NAMED["lost"]], run).startswith(words)


# runs


def test_a_run_that_does_not_learn_says_so_and_its_card_too(tmp_path, capsys):
    """A run that was stopped is not judged."""
    torch.save(random_tensors(make_arch(7, vocab_size=256)), tmp_path / "base.pth")
    for name, count in (("rows", 24), ("held", 5)):
        texts = ["ab c" * random.Random(i).randint(1, 4) for i in range(count)]
        rows = [{"prompt": f"{name} {i}", "completion": text} for i, text in enumerate(texts)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = (
        f"--load_model {tmp_path}/base.pth --data_file {tmp_path}/rows.jsonl"
        f" --eval_file {tmp_path}/held.jsonl --epoch_count 1 --tokenizer bytes --accelerator cpu"
        " --micro_bsz 2 --packing 0"
    )

    def trained(name, rate):
        run = f"{flags} --proj_dir {tmp_path}/{name} --lr_init {rate}"
        return succeed(program.run(run.split())), (tmp_path / name / "run_card.md").read_text()

    output, card = trained("still", "1e-9")
    for words in (
        "the run has learnt next to nothing: the loss on held-out documents fell by 0.00 %",
        "the sample answers are those of before the training",
    ):
        assert f"\nnote:      {words}" in output and f"\n- {words}" in card
    words = "--lr_init auto, which searches for the learning rate; 1e-09 was given"
    assert f"\ntry next:  {words}" in output and f"\n- try next: {words}" in card
    for text in trained("moved", "1e-2"):
        assert "learnt next" not in text and "of before the training" not in text and "try next" not in text
    config = Config(load_model="base.pth", proj_dir=str(tmp_path / "still"), early_stop=0)
    run_end.finish(config, [], 4, 12)
    stopped = capsys.readouterr().out
    assert stopped.startswith("stopped, go on with --resume auto") and "note:" not in stopped
