"""A run that has not learnt says so at its end, from what is known, with what to try next."""

import functools
import json
import random

import pytest
import torch

from src.config import Config, parse
from src.planning.defaults import GUESSED
from src.planning.draft import CHOSEN
from src.reporting.verdict import doubt
from src.training.rate_search import found_of, reason
from src.training.short_runs import Trial
from src.training.validation_log import answers_as_before

from . import program
from .conftest import make_arch, random_tensors
from .program import at_file, interrupt, succeed

GIVEN = "command line"
_, ORIGINS = parse(["--load_model", "base.pth", "--data_file", "x", "--lr_init", "paper"])
PAPER = ORIGINS["lr_init"]
GUESS = f"{CHOSEN}: {GUESSED}; no search: 60 steps are too few to try rates in"
TRIALS = [Trial(rate, [3.0], loss) for rate, loss in ((1e-3, 3.0), (3e-3, 1.0), (1e-2, 2.0))]
FOUND = found_of({one.rate: one.deciding_loss for one in TRIALS}, TRIALS, 3e-3, 0.7, 3.0, 10, 5.0, "held-out")
SEARCHED = f"{CHOSEN}: {reason(FOUND)}"
MISS = {"load_model": "base.pth", "peft_config": {"r": 8}}


def evaluation(step, loss, answers=("same",), right="4"):
    samples = [{"prompt": "2+2?", "answer": answer, "right": right} for answer in answers]
    return {"step": step, "loss": loss, "samples": samples}


def evaluations(*losses):
    """One every step, with an answer that changes."""
    return [evaluation(step, loss, (str(step),)) for step, loss in enumerate(losses)]


def steps(*losses):
    return [{"step": step, "loss": loss} for step, loss in enumerate(losses, 1)]


def doubted(history, step=None, metrics=None, origin=GIVEN, **settings):
    config = Config(**{"lr_init": 1e-4, "epoch_count": 2, **MISS, **settings})
    step = history[-1]["step"] if step is None and history else step
    return doubt(config, origin, origin == SEARCHED, step or 0, metrics or steps(3.0, 3.0), history)


def test_answers_that_are_those_of_before_are_noticed_unless_they_are_right():
    def line(*answers):
        return evaluation(0, 1.0, answers)

    assert answers_as_before(line("a", "4"), line("a", "4"))
    for before, after in ((line("a", "b"), line("a", "c")), (line(), line()), (line("4"), line("4"))):
        assert not answers_as_before(before, after)


@pytest.mark.parametrize(
    "last, words",
    [
        (
            3.998,
            "learnt next to nothing: the loss on held-out documents fell by 0.05 %, from 4.0000 to 3.9980",
        ),
        (4.0, "fell by 0.00 %"),
        (3.93, "fell by 1.75 %"),
        (4.2, "the run has not learnt: the loss on held-out documents rose from 4.0000 to 4.2000"),
        (None, "the run has not learnt: the loss on held-out documents is not finite"),
    ],
)
def test_a_held_out_loss_that_does_not_fall_is_told(last, words):
    [sentence] = doubted(evaluations(4.0, last)).known
    assert words in sentence


def test_a_run_that_has_learnt_gets_no_such_words():
    assert doubted(evaluations(4.0, 3.91)) is None
    assert doubted([evaluation(0, 4.0, ("4",)), evaluation(5, 3.0, ("4",))]) is None, "right from the start"
    assert doubted([], metrics=steps(*[4.0] * 10, *[3.9] * 10)) is None
    assert doubted(evaluations(None, 3.0)) is None, "nothing to compare with"


def test_it_is_the_state_that_is_recommended_which_is_judged():
    """best.pth of step 1 has learnt, and what came after it has not."""
    history = evaluations(4.0, 3.0, 4.5)
    assert doubted(history, step=1) is None
    assert doubted(history, step=2)


def test_sample_answers_of_before_are_told_beside_a_loss_that_fell():
    history = [evaluation(0, 4.0), evaluation(5, 3.0)]
    assert doubted(history).known == [
        "the sample answers are those of before the training, although the loss on held-out documents fell by"
        " 25.00 %"
    ]
    both = doubted([evaluation(0, 4.0), evaluation(5, 4.0)]).known
    assert len(both) == 2 and both[1] == "the sample answers are those of before the training"


def test_a_base_that_knows_the_task_is_told():
    history = [evaluation(0, 0.05, ("4",)), evaluation(5, 0.06, ("4",))]
    _, sentence = doubted(history).known
    assert "right before the training, so the base may know the task already" in sentence
    assert len(doubted([evaluation(0, 4.0, ()), evaluation(5, 4.0, ())]).known) == 1, "no samples, no word"


def test_rows_that_were_learnt_by_heart_are_told():
    known = doubted(evaluations(4.0, 4.2), metrics=steps(4.0, 1.0)).known
    assert known[1].startswith("only the training loss fell, by 75.00 %")


def test_a_training_that_only_recovers_from_its_own_harm_is_not_praised():
    """Its loss falls by 18 % after the first step, in which the base had 0.08."""
    found = doubted(evaluations(0.0816, 2.775, 2.534), metrics=steps(0.08, *[3.0] * 10, *[2.46] * 9))
    assert found.known == [
        "the run has not learnt: the loss on held-out documents rose from 0.0816 to 2.5340",
        "the training loss rose, too: from 0.0800 in the first step to 2.4600 in the last",
    ]
    assert found.advice == "a lower --lr_init than 0.0001"
    # neither fallen nor clearly risen, and harder rows than those that are held out
    for losses in ((2.9, 3.1, 3.0), (3.0, 1.5, 1.4)):
        known = doubted(evaluations(0.5, 0.6), metrics=steps(*losses)).known
        assert not any("rose, too" in sentence for sentence in known)
        assert len(known) == (1 if losses[0] < losses[-1] else 2)


def test_without_held_out_documents_only_the_training_loss_is_known():
    found = doubted([], metrics=steps(*[3.0, 3.1] * 10))
    assert found.known == [
        "the run may have learnt nothing: the training loss fell by 0.00 %, from 3.0500 in the first 2 steps"
        " to 3.0500 in the last; no documents were held out, so no more is known"
    ]
    assert "--eval_split 0.1 holds documents out" in found.advice
    assert (
        "rose by 50.00 %, from 2.0000 in the first step to 3.0000"
        in doubted([], metrics=steps(2, 3)).known[0]
    )
    # the first tenth has the explosion in it, so that the losses seem to fall
    worse = doubted([], metrics=steps(0.29, 5.1, 6.3, *[2.8] * 20))
    assert worse.known == [
        "the run has made the model worse: the training loss rose from 0.2900 in the first step to 2.8000 in"
        " the last"
    ]
    assert worse.advice.startswith("a lower --lr_init than 0.0001; --eval_split 0.1")
    assert doubted([], metrics=steps(3.0)).known == ["one step is too few to tell whether the run has learnt"]


@pytest.mark.parametrize(
    "origin, settings, advice",
    [
        (GIVEN, {}, "--lr_init auto, which searches for the learning rate; 0.0001 was given"),
        (
            PAPER,
            {"lr_init": 2e-5},
            "--lr_init auto, which searches for the learning rate; 2e-05 is the published one of --peft miss,"
            " and small models need more",
        ),
        (
            GUESS,
            {},
            "more passes (--epoch_count above 2), or another --lr_init, which python -m scripts.lr_sweep"
            f" finds; 0.0001 was {GUESS}",
        ),
        (
            SEARCHED,
            {},
            "more passes (--epoch_count above 2), or more data, or another rank (--peft_config) or method"
            " (--peft), or a base that knows more of the task; the learning rate was searched for already",
        ),
        (
            SEARCHED,
            {"peft": "state", "peft_config": {}},
            "more passes (--epoch_count above 2), or more data, or another method (--peft), or a base that"
            " knows more of the task; the learning rate was searched for already",
        ),
        (
            SEARCHED,
            {"peft": "none", "peft_config": {}, "load_model": ""},
            "more passes (--epoch_count above 2), or more data, or an adapter (--peft miss); the learning"
            " rate was searched for already",
        ),
    ],
)
def test_what_to_try_next_is_what_was_not_tried(origin, settings, advice):
    assert doubted(evaluations(4.0, 4.0), origin=origin, **settings).advice == advice


def test_more_passes_are_no_advice_where_the_last_ones_did_harm():
    for history, step in ((evaluations(4.0, 3.99, 4.5), 1), (evaluations(4.0, 4.5), 1)):
        assert doubted(history, step, origin=SEARCHED).advice.startswith("more data, or")
        guessed = doubted(history, step, origin="chosen: a first guess; no search: too short")
        assert guessed.advice.startswith("another --lr_init, which")


# runs


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A random base, and rows to which it can easily be moved."""
    folder = tmp_path_factory.mktemp("verdict")
    torch.save(random_tensors(make_arch(7, vocab_size=256)), folder / "base.pth")
    for name, count in (("rows", 24), ("held", 5)):
        rows = [
            {"prompt": f"{name} {i}", "completion": "ab c" * random.Random(i).randint(1, 4)}
            for i in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def trained(files, proj_dir, rate, *flags, sabotage=None):
    paths = ["--load_model", str(files / "base.pth"), "--data_file", str(files / "rows.jsonl")]
    held = [] if "--eval_split" in flags else ["--eval_file", str(files / "held.jsonl")]
    given = [
        *"--epoch_count 1 --tokenizer bytes --accelerator cpu --micro_bsz 2 --packing 0".split(),
        "--lr_init",
        rate,
    ]
    return program.run([*paths, "--proj_dir", str(proj_dir), *held, *given, *flags], sabotage)


def test_a_run_that_does_not_learn_says_so_and_its_card_too(files, tmp_path):
    output = succeed(trained(files, tmp_path / "still", "1e-9"))
    card = (tmp_path / "still/run_card.md").read_text()
    for words in (
        "note:      the run has learnt next to nothing: the loss on held-out documents fell by 0.00 %",
        "note:      the sample answers are those of before the training",
        "try next:  --lr_init auto, which searches for the learning rate; 1e-09 was given",
    ):
        assert f"\n{words}" in output
        assert words.removeprefix("note:").replace("next:  ", "next: ").strip() in card

    output = succeed(trained(files, tmp_path / "blind", "1e-9", "--eval_split", "0"))
    assert "no documents were held out" in output and "--eval_split 0.1" in output

    output = succeed(trained(files, tmp_path / "moved", "1e-2"))
    card = (tmp_path / "moved/run_card.md").read_text()
    for text in (output, card):
        assert "learnt next" not in text and "of before the training" not in text and "try next" not in text


def test_a_stopped_run_is_not_judged(files, tmp_path):
    stop = functools.partial(at_file, "metrics.jsonl", 4, tmp_path / "run", interrupt)
    code, output = trained(files, tmp_path / "run", "1e-9", "--eval_steps", "1", sabotage=stop)
    assert code == 130 and "stopped, go on with" in output
    assert "learnt next" not in output and "of before the training" not in output
