"""Watching a run: the training is not disturbed; the best state is kept, and a run that gets no better ends;
what the card and others are told.
"""

import functools
import importlib.machinery
import importlib.util
import itertools
import json
import os
import random
import re
import shlex
import shutil
import sys
import time
import types

import pytest
import torch

import rwkv_miss
from rwkv_miss import UserError, read_checkpoint, read_metadata, write_checkpoint
from src.config import Config, parse, recorded_settings
from src.config.parse import read_yaml
from src.data.dataset import load_documents
from src.data.held_out import SAMPLE_TOKENS
from src.data.tokenizer import load_tokenizer
from src.model import RWKV
from src.reporting import run_card
from src.reporting.curves import draw_losses
from src.reporting.diagnosis import NOTHING, Verdict
from src.reporting.plan_text import LINES
from src.reporting.run_card import card
from src.reporting.run_log import RunLog
from src.sources import held_out_loss
from src.sources.held_out_loss import shortened
from src.training import callbacks
from src.training.forgetting import sections
from src.training.run_folder import restore_best
from src.training.validation_log import base_wins, best_trained, is_over

from . import program
from .answering import engine_of, greedy_text
from .conftest import read_rows, save_base, slow, write_rows
from .program import at_file, dropout, flags_of, in_turn, interrupt, judge_late, kill, losses, succeed
from .tables import talk

BYTES = load_tokenizer("bytes", 256, "")


# runs


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A base of odd width, 24 rows to train on (6 steps of 4), and 11 to evaluate, with answers of very
    unequal length, and of unequal weight.
    """
    folder = tmp_path_factory.mktemp("watch")
    save_base(folder / "base.pth", n_embd=45, head_size=15)
    rng = random.Random(0)
    for name, count in (("rows", 24), ("held", 11)):
        pairs = [(name + "?" * rng.randint(1, 9), "ab c" * rng.choice([1, 1, 9])) for _ in range(count)]
        rows = [talk(asked, said) for asked, said in pairs]
        if name == "held":
            for row, weight in zip(rows, itertools.cycle([1, 0.25, 3])):
                row["messages"][1]["weight"] = weight
        write_rows(folder / f"{name}.jsonl", rows)
    return folder


def start(files, proj_dir, *flags, sabotage=None, **options):
    flags = flags_of(files, proj_dir, "--peft_config", "r=5", "--epoch_count", "1", *flags)
    return program.run(flags, sabotage, **options)


def validation_lines(proj_dir):
    return read_rows(proj_dir / "validation.jsonl")


@torch.no_grad()
def exact_loss(path, documents):
    """Document by document, in float64."""
    model, total = RWKV.load(path, torch.float64), 0.0
    for row in documents:
        ids, weights = torch.from_numpy(row.ids).long(), torch.from_numpy(row.weights)[1:]
        losses = torch.nn.functional.cross_entropy(model(ids[None, :-1])[0][0], ids[1:], reduction="none")
        total += float((losses * weights).sum())
    return total / sum(float(row.weights[1:].sum()) for row in documents)


def same_tensors(one, other):
    ours, theirs = read_checkpoint(one), read_checkpoint(other)
    return ours.keys() <= theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


ALL = ["--eval_docs", "99"]
THREE = [*ALL, "--eval_steps", "3", "--eval_samples", "1", "--eval_file"]
EVAL = [*ALL, "--eval_steps", "4", "--eval_samples", "2", "--eval_file"]


@pytest.fixture(scope="module")
def watched(files, tmp_path_factory):
    """(folder of a run with dropout and evaluations, what it printed)"""
    proj_dir = tmp_path_factory.mktemp("watched") / "run"
    held, tokens = str(files / "held.jsonl"), SAMPLE_TOKENS
    asked = {"sabotage": dropout, "sample_tokens": tokens, "forgetting": True}
    return proj_dir, succeed(start(files, proj_dir, *EVAL, held, **asked))


def test_evaluation_does_not_disturb_the_training(files, tmp_path, watched):
    succeed(start(files, tmp_path / "alone", "--eval_split", "0", sabotage=dropout))
    assert losses(tmp_path / "alone") == losses(watched[0])
    assert same_tensors(tmp_path / "alone/adapter.pth", watched[0] / "adapter.pth")


def test_the_loss_is_a_sum_over_all_trained_tokens_and_the_samples_are_the_models_own(files, watched):
    proj_dir, output = watched
    lines = validation_lines(proj_dir)
    assert [line["step"] for line in lines] == [0, 4, 6]
    held = load_documents(str(files / "held.jsonl"), BYTES, 1024)
    assert {line["tokens"] for line in lines} == {held.targets}
    assert lines[0]["loss"] == pytest.approx(exact_loss(files / "base.pth", held), rel=1e-6)
    assert lines[2]["loss"] < 0.9 * lines[0]["loss"]
    rows = [line["messages"] for line in read_rows(files / "held.jsonl")]
    longest = max(len(f" {answer['content'].strip()}") for _, answer in rows[: lines[0]["asked"]])
    limit = longest + longest // 4 + 16
    model = RWKV.load(files / "base.pth")
    for sample, (question, answer) in zip(lines[0]["samples"], rows[:2], strict=True):
        assert sample["prompt"] == f"User: {question['content']}\n\nAssistant:"
        assert sample["right"] == answer["content"].strip()
        text = greedy_text(engine_of(model, BYTES), sample["prompt"], limit)
        assert shortened(text.strip() + "\ufffd", 300) == sample["answer"]
    said = (
        f"evaluation loss on 11 of 11 held-out documents and {lines[0]['asked']} greedy answers, 3 times:"
        " before the training, every 4 steps and at its end; "
    )
    # an evaluation has its line, and a step line repeats none of before
    assert re.search(r"^step 6/6 loss \d\.\d+ per token, lr ", output, re.MULTILINE)
    right = f"right answers 0 % of {lines[0]['asked']}"
    first = f"step 0/6 validation loss {lines[0]['loss']:.4f} per token, {right}\n    | 'User: held"
    assert said in output and first in output
    assert (
        f"best.pth, step 6, validation loss {lines[2]['loss']:.4f}; before training {lines[0]['loss']:.4f}"
        in output
    )
    assert same_tensors(proj_dir / "best.pth", proj_dir / "adapter.pth")
    assert read_metadata(proj_dir / "best.pth")["step"] == 6


def memory_by_rank(rank):
    callbacks.peak_memory = lambda device: (1 + rank) << 40
    callbacks.mapped_files = lambda: (2 - rank) << 30


@pytest.fixture(scope="module")
def one_process(files, tmp_path_factory):
    """The evaluations, and what is forgotten, of one process whose steps are those of two."""
    proj_dir = tmp_path_factory.mktemp("one") / "run"
    split = "--micro_bsz 2 --accumulate_grad_batches 2".split()
    succeed(start(files, proj_dir, *split, *THREE, str(files / "held.jsonl"), forgetting=True))
    return validation_lines(proj_dir), summary(proj_dir)["forgetting"]


@pytest.mark.parametrize("strategy", [slow("ddp"), pytest.param("deepspeed_stage_3", marks=pytest.mark.rare)])
def test_two_processes_evaluate_the_same_and_are_not_disturbed(files, tmp_path, one_process, strategy):
    """11 rows in batches of 2 are nothing that two processes share evenly."""
    (evaluations, forgotten), two = (
        one_process,
        ["--devices", "2", "--micro_bsz", "2", "--strategy", strategy],
    )
    succeed(start(files, tmp_path / "alone", *two, "--eval_split", "0"))
    asked = {"sabotage": memory_by_rank, "forgetting": True}
    succeed(start(files, tmp_path / "watched", *two, *THREE, str(files / "held.jsonl"), **asked))
    assert losses(tmp_path / "alone") == losses(tmp_path / "watched")
    many = validation_lines(tmp_path / "watched")
    assert many[0] == evaluations[0], (
        "the state before training is the same to the last bit, and so must be all about it"
    )
    assert [line["loss"] for line in many] == pytest.approx([line["loss"] for line in evaluations], rel=1e-5)
    assert [line["samples"] for line in many] == [line["samples"] for line in evaluations]
    assert same_tensors(tmp_path / "watched/best.pth", tmp_path / "watched/adapter.pth")
    end = summary(tmp_path / "watched")
    memory = end["peak_memory_bytes"], end["mapped_file_bytes"]
    assert memory == (2 << 40, 1 << 30), "of the process that had most"
    assert summary(tmp_path / "watched")["forgetting"] == pytest.approx(forgotten, rel=1e-3)


# the best state and the end


def scripted(losses, rank):
    """Validation losses by step, each of which takes an hour."""
    clock, hours = time.perf_counter, 0

    def loss(trainer, documents, is_stopped):
        nonlocal hours
        hours += 1
        return losses[trainer.global_step], {}

    held_out_loss.validation_loss = loss
    time.perf_counter = lambda: clock() + 3600 * hours


LOSSES = [9.0, 5.0, 4.0, 4.5, float("nan"), 4.0, 3.0]


def test_the_best_state_is_kept_and_a_run_that_gets_no_better_ends(files, tmp_path):
    """Step 2 is the best; ended after 2 worse ones, gone on with patience for 4, killed on the way: the same
    files as in one go.
    """
    proj_dir, whole = tmp_path / "run", tmp_path / "whole"
    flags = """
        --eval_split 0.2 --eval_samples 0 --eval_steps 1 --save_steps 1 --save_total_limit 9 --packing 1
        --micro_bsz 1 --ctx_len 200 --epoch_steps 6 --peft_config r=5 --lr_schedule plateau
    """.split()
    script = functools.partial(scripted, LOSSES)

    output = succeed(start(files, proj_dir, *flags, "--early_stop", "2", sabotage=script))
    why = "fell by less than a thousandth of its start in 2 evaluations"
    assert f"ended early, as the held-out loss {why}: step 4 of 6" in output
    assert (
        f"{proj_dir}/best.pth, step 2, validation loss 4.0000; before training 9.0000, at the end not finite"
        in output
    )
    assert f"--adapter {proj_dir}/best.pth" in output
    assert [line["step"] for line in validation_lines(proj_dir)] == [0, 1, 2, 3, 4]
    assert [line["loss"] for line in validation_lines(proj_dir)] == [9.0, 5.0, 4.0, 4.5, None]
    assert same_tensors(proj_dir / "best.pth", proj_dir / "checkpoints/step-00000002.pth")
    assert not same_tensors(proj_dir / "best.pth", proj_dir / "checkpoints/step-00000001.pth")
    assert read_metadata(proj_dir / "best.pth")["validation_loss"] == 4.0
    assert read_metadata(proj_dir / "adapter.pth")["step"] == 4
    output = succeed(start(files, proj_dir, *flags, "--early_stop", "2", "--resume", "auto", sabotage=script))
    assert "ended at step 4 by --early_stop, and --early_stop 0 would let it go on; nothing" in output

    more = [*flags, "--early_stop", "4", "--resume", "auto"]
    code, output = start(
        files, proj_dir, *more, sabotage=in_turn(script, at_file("/step-", 2, proj_dir, kill))
    )
    # step 5 has no checkpoint and is done again
    assert code and [line["step"] for line in validation_lines(proj_dir)] == [0, 1, 2, 3, 4, 5], output
    output = succeed(start(files, proj_dir, *more, sabotage=script))
    assert "done: step 6 of 6" in output and "best.pth, step 6, validation loss 3.0000" in output
    assert f"--adapter {proj_dir}/adapter.pth" in output, "the last state is the best one"
    succeed(start(files, whole, *flags, "--early_stop", "4", sabotage=script))
    seconds = [line["seconds"] for line in read_rows(whole / "metrics.jsonl")]
    assert max(seconds) < 3600, "an evaluation is no part of a step"
    rates = [line["lr"] for line in read_rows(whole / "metrics.jsonl")]
    shares = [rate / rates[0] for rate in rates]
    assert shares == [1, 1, 1, 1, 0.5, 0.25], "half of it, a step after each evaluation that is no better"
    for name in ("validation.jsonl", "adapter.pth", "best.pth"):
        assert (whole / name).suffix == ".pth" or (whole / name).read_text() == (proj_dir / name).read_text()
        assert (whole / name).suffix != ".pth" or same_tensors(whole / name, proj_dir / name)
    assert losses(whole) == losses(proj_dir)


def test_right_answers_end_a_run_and_choose_its_best_state(files, tmp_path):
    """The held-out loss stands still, so only right answers tell the states apart."""
    proj_dir, held = tmp_path / "run", tmp_path / "held.jsonl"
    for path, count in ((tmp_path / "rows.jsonl", 24), (held, 6)):
        rows = [talk(f"{path.stem} {n}", "ab") for n in range(count)]
        write_rows(path, rows)
    flags = f"""
        --data_file {tmp_path}/rows.jsonl --eval_file {held} --eval_steps 4 --early_stop 2 --epoch_count 20
        --train_parts emb,head
    """.split()
    script = functools.partial(scripted, [4.0] * 121)
    output = succeed(start(files, proj_dir, *flags, sabotage=script))
    right = [line["right_answers"] for line in validation_lines(proj_dir)]
    best = right.index(max(right))
    assert best >= 1 and max(right) > right[0] and len(right) == best + 3, right
    why = "fell by less than a thousandth of its start in 2 evaluations, nor were more answers right"
    assert f"{why}: step {4 * best + 8} of 120" in output
    assert read_metadata(proj_dir / "best.pth")["step"] == 4 * best
    assert f"--adapter {proj_dir}/best.pth" in output
    assert summary(proj_dir)["validation_metrics_best"]["right_answers"] == max(right)


@pytest.mark.slow
def test_the_best_state_of_an_abandoned_branch_does_not_survive_a_resume(files, tmp_path):
    """Step 2 is the best up to the checkpoint of step 3; step 4 was better, and does not come again."""
    whole, proj_dir, lost = (tmp_path / name for name in ("whole", "run", "lost"))
    flags = """
        --eval_split 0.2 --eval_samples 0 --eval_steps 1 --save_steps 3 --micro_bsz 1 --lr_schedule constant
        --peft_config r=5
    """.split()
    script = functools.partial(scripted, [9.0, 5.0, 4.0, 4.5, 3.0, 3.5])
    stop = at_file("validation.jsonl", 8, proj_dir, kill)  # before the line of step 5
    code, output = start(files, proj_dir, *flags, "--epoch_steps", "6", sabotage=in_turn(script, stop))
    assert code and read_metadata(proj_dir / "best.pth")["step"] == 4, output
    shutil.copytree(proj_dir, lost)
    (lost / "checkpoints/best.pth").unlink(missing_ok=True)  # as earlier versions leave a folder

    succeed(start(files, whole, *flags, "--epoch_steps", "3", sabotage=script))
    output = succeed(start(files, proj_dir, *flags, "--epoch_steps", "3", "--resume", "auto"))
    assert f"{proj_dir}/best.pth, of step 4, is that of step 2 again: step 4 is not reached yet" in output
    assert same_tensors(proj_dir / "best.pth", whole / "best.pth")
    assert {name: summary(proj_dir)[name] for name in ("best_step", "validation_best")} == {
        "best_step": 2,
        "validation_best": 4.0,
    }

    worse = functools.partial(scripted, [9.0, 5.0, 4.0, 4.5, 6.0])
    output = succeed(start(files, lost, *flags, "--epoch_steps", "4", "--resume", "auto", sabotage=worse))
    assert (
        "best.pth, of step 4, is removed: step 4 is not reached yet; the best one so far, of step 2, is lost"
        in output
    )
    assert not (lost / "best.pth").exists() and "best" not in summary(lost)


def test_an_evaluation_that_a_stop_left_out_is_made_when_the_run_resumes(files, tmp_path):
    flags = ["--eval_split", "0.2", "--eval_steps", "3", "--eval_samples", "1", "--micro_bsz", "3"]
    # in step 2, so that step 3 is the last
    stop = at_file("metrics.jsonl", 4, tmp_path / "run", interrupt)
    code, output = start(files, tmp_path / "run", *flags, sabotage=stop)
    assert code == 130 and [line["step"] for line in validation_lines(tmp_path / "run")] == [0], output
    assert "holds a run already" in start(files, tmp_path / "run", *flags)[1]
    succeed(start(files, tmp_path / "run", *flags, "--resume", "auto"))
    succeed(start(files, tmp_path / "whole", *flags))
    assert validation_lines(tmp_path / "run") == validation_lines(tmp_path / "whole")


def test_a_run_that_turns_out_to_be_over_when_it_resumes(files, tmp_path):
    """Stopped before the evaluation of step 6; or resumed when 6 steps are all that is asked for. No
    state is better than the base, which the resumed run remembers.
    """
    proj_dir, shorter = tmp_path / "run", tmp_path / "shorter"
    flags = "--eval_split 0.2 --eval_steps 3 --eval_samples 0 --micro_bsz 3 --early_stop 2".split()
    script = functools.partial(scripted, [4.0, 9.0, 9.0, 6.0, 9.0, 9.0, 5.0])
    stop = at_file("metrics.jsonl", 7, proj_dir, interrupt)  # in step 5
    code, output = start(files, proj_dir, *flags, "--epoch_count", "2", sabotage=in_turn(script, stop))
    assert code == 130 and [line["step"] for line in validation_lines(proj_dir)] == [0, 3], output
    shutil.copytree(proj_dir, shorter)
    output = succeed(
        start(files, proj_dir, *flags, "--epoch_count", "2", "--resume", "auto", sabotage=script)
    )
    assert "ended early, as the held-out loss did not fall in 2 evaluations: step 6 of 12" in output
    *_, best, verdict, kept = output.splitlines()
    assert best == "best:      the base, validation loss 4.0000; at the end 5.0000"
    assert verdict.startswith("verdict:   ") and kept.startswith("keep:      the base; ")
    assert "validation loss 5.0000 per token, best 4.0000 before training" in output
    assert "merge it:" not in output
    assert (proj_dir / "adapter.pth").exists() and not (proj_dir / "best.pth").exists()
    assert "best" not in summary(proj_dir)
    assert "better than the model before the training" in (proj_dir / "run_card.md").read_text()
    assert "has all 6 steps already" in succeed(
        start(files, shorter, *flags, "--resume", "auto", sabotage=script)
    )
    assert (shorter / "run_card.md").exists()


def length(proj_dir):
    saved = read_yaml(str(proj_dir / "config.yaml"))
    return [saved[name] for name in ("epoch_count", "eval_steps", "early_stop", "warmup_steps")]


EARLY_STOP = "--epoch_count 40 --eval_steps 24 --early_stop 3 --lr_schedule plateau".split()


def test_passes_end_when_the_held_out_loss_rises(files, tmp_path):
    """Held-out rows are unlike the trained ones, and get worse with every pass."""
    proj_dir, other = tmp_path / "run", tmp_path / "other.jsonl"
    rows = [{"prompt": f"{n}?", "completion": "ca" * 3} for n in range(5)]
    write_rows(other, rows)
    slowly = [*EARLY_STOP, "--lr_init", "1e-3", "--eval_samples", "0"]
    output = succeed(start(files, proj_dir, *slowly, "--eval_file", str(other)))
    assert (
        "at most 240 steps of 4 rows (micro_bsz 4 x accumulate 1 x devices 1), 40 passes over the data: one"
        " pass makes 6 steps; ends when the held-out loss falls no further; rows of" in output
    )
    assert len(output.partition("\nstep 0/240")[0].splitlines()) <= LINES
    assert length(proj_dir) == [40, 24, 3, 12]
    why = "fell by less than a thousandth of its start in 3 evaluations"
    assert f"ended early, as the held-out loss {why}: step 96 of 240" in output
    (_, _), (once, best_loss), *later = [(line["step"], line["loss"]) for line in validation_lines(proj_dir)]
    assert once == 24 and len(later) == 3 and all(loss > best_loss for _, loss in later)
    assert len(losses(proj_dir)) == 96
    kept = read_metadata(proj_dir / "best.pth")
    assert (kept["step"], kept["validation_loss"]) == (24, best_loss)
    merge = next(line for line in output.splitlines() if line.startswith("merge it:"))
    assert f"--adapter {proj_dir}/best.pth" in merge


def test_few_rows_are_trained_until_they_are_known_by_heart(files, tmp_path):
    """Nothing is held out, and the mean training loss of a pass decides, also after a stop and on a GPU."""
    rows, whole, proj_dir = tmp_path / "rows.jsonl", tmp_path / "whole", tmp_path / "run"
    rows.write_text("".join((files / "rows.jsonl").read_text().splitlines(True)[:4]))
    flags = f"""
        --data_file {rows} --epoch_count 40 --early_stop 1 --eval_split 0 --micro_bsz 2 --train_parts emb,head
    """.split()
    output = succeed(start(files, whole, *flags))
    said = "at most 80 steps of 2 rows .* 40 passes .*; ends when the data are known by heart;"
    assert re.search(said, output) and "evaluation none" in output
    curve, steps = losses(whole), summary(whole)["steps"]
    means = [sum(curve[at : at + 2]) / 2 for at in range(0, steps, 2)]
    assert steps < 80 and means[-1] <= curve[0] / 100 < min(means[:-1])
    ended = "ended early, as the data are known by heart, which is all that could be judged: step"
    assert f"{ended} {steps} of 80" in output and (whole / "run_card.md").exists()
    stop = in_turn(judge_late, at_file("metrics.jsonl", 5, proj_dir, interrupt))
    assert start(files, proj_dir, *flags, sabotage=stop)[0] == 130
    again = ["--config", str(proj_dir / "config.yaml"), "--resume", "auto"]
    assert f"{ended} {steps} of 80" in succeed(program.run(again, judge_late))
    assert losses(proj_dir) == curve and same_tensors(proj_dir / "adapter.pth", whole / "adapter.pth")
    over = f"ended at step {steps} by --early_stop, and --early_stop 0 would let it go on; nothing to train"
    assert over in succeed(start(files, proj_dir, *flags, "--resume", "auto"))


@pytest.mark.slow
def test_passes_with_an_early_stop_resume_after_a_stop(files, tmp_path):
    whole, proj_dir = tmp_path / "whole", tmp_path / "run"
    flags = [*EARLY_STOP, "--eval_samples", "0", *ALL, "--eval_file", str(files / "held.jsonl")]
    # better up to step 48
    script = functools.partial(scripted, [10.0 - step // 24 for step in range(72)] + [9.0] * 169)
    succeed(start(files, whole, *flags, sabotage=script))
    stop = at_file("metrics.jsonl", 9, proj_dir, interrupt)  # in the second pass
    code, output = start(files, proj_dir, *flags, sabotage=in_turn(script, stop))
    assert code == 130 and "stopped, go on with --resume auto: step " in output and "of 240" in output
    succeed(start(files, proj_dir, *flags, "--resume", "auto", sabotage=script))
    assert [line["step"] for line in validation_lines(proj_dir)] == [0, 24, 48, 72, 96, 120]
    assert losses(proj_dir) == losses(whole) and length(proj_dir) == length(whole) == [40, 24, 3, 12]
    assert validation_lines(proj_dir) == validation_lines(whole)
    for name in ("adapter.pth", "best.pth"):
        assert same_tensors(proj_dir / name, whole / name)


@pytest.mark.slow
def test_a_run_from_before_passes_were_chosen_keeps_its_length(files, tmp_path):
    """An older release wrote one pass, no warm-up and no evaluations on the way."""
    whole, proj_dir = tmp_path / "whole", tmp_path / "run"
    held = ["--eval_samples", "0", "--eval_file", str(files / "held.jsonl")]
    older = [*held, "--epoch_count", "1", "--warmup_steps", "0", "--eval_steps", "0", "--early_stop", "0"]
    succeed(start(files, whole, *older))
    stop = at_file("metrics.jsonl", 4, proj_dir, interrupt)
    assert start(files, proj_dir, *older, sabotage=stop)[0] == 130
    assert length(proj_dir) == [1, 0, 0, 0]
    output = succeed(start(files, proj_dir, *held, "--epoch_count", "0", "--resume", "auto"))
    assert "6 steps of 4 rows" in output and "done: step 6 of 6" in output
    assert length(proj_dir) == [1, 0, 0, 0] and losses(proj_dir) == losses(whole)
    assert same_tensors(proj_dir / "adapter.pth", whole / "adapter.pth")


@pytest.mark.slow
def test_a_run_that_is_asked_for_less_than_it_has_done_says_so(files, tmp_path):
    proj_dir = tmp_path / "run"
    stop = at_file("metrics.jsonl", 9, proj_dir, interrupt)
    code, _ = start(files, proj_dir, "--epoch_count", "2", sabotage=stop)
    step = summary(proj_dir)["steps"]
    assert code == 130 and 6 < step < 12
    output = succeed(start(files, proj_dir, "--epoch_count", "1", "--resume", "auto"))
    assert f"has {step} steps, more than the 6 that are asked for; nothing to train" in output
    assert f"done: step {step} of {step}, loss " in output and f"step {step} of 6" not in output
    assert summary(proj_dir)["steps"] == summary(proj_dir)["planned_steps"] == step
    assert (proj_dir / "run_card.md").exists()


@pytest.mark.slow
def test_in_full_training_the_best_model_is_kept(files, tmp_path):
    """The model has the loss that its file names; bf16 has 8 bits."""
    flags = "--peft none --peft_config= --lr_init 1e-3 --precision bf16 --eval_samples 1 --eval_file".split()
    succeed(start(files, tmp_path / "run", *ALL, *flags, str(files / "held.jsonl")))
    assert same_tensors(tmp_path / "run/best.pth", tmp_path / "run/model.pth")
    named = read_metadata(tmp_path / "run/best.pth")["validation_loss"]
    held = load_documents(str(files / "held.jsonl"), BYTES, 1024)
    assert exact_loss(tmp_path / "run/best.pth", held) == pytest.approx(named, rel=1e-2)
    assert named < 0.99 * exact_loss(files / "base.pth", held)


# the card


def moved(base, tuned):
    """Mean KL by section and of all, in float64, of two models."""
    found = {}
    with torch.no_grad():
        for name, ids in sections(BYTES).items():
            p, q = (
                torch.log_softmax(model.double()(torch.tensor([ids]))[0][0], -1) for model in (base, tuned)
            )
            found[name] = (p.exp() * (p - q)).sum(-1)
    return {
        **{name: float(part.mean()) for name, part in found.items()},
        "all": float(torch.cat(list(found.values())).mean()),
    }


def tuned(files, path):
    model = RWKV.load(files / "base.pth", torch.float32)
    rwkv_miss.load_adapter(model, path)
    return model


def summary(proj_dir):
    return json.loads((proj_dir / "run.json").read_text())


def test_the_card_says_what_was_run_and_what_came_of_it(files, watched):
    proj_dir, output = watched
    text = (proj_dir / "run_card.md").read_text()
    [line] = [line for line in text.splitlines() if line.startswith("    python train.py")]
    assert parse(shlex.split(line)[2:]).settled() == recorded_settings(str(proj_dir / "config.yaml")).settings
    lines, end = validation_lines(proj_dir), summary(proj_dir)
    base = RWKV.load(files / "base.pth")
    assert (
        f"hashes     base {base.base_fingerprint}, tokens and mask"
        f" {load_documents(str(files / 'rows.jsonl'), BYTES, 1024).digest}" in text
    )
    assert (
        f"| loss, per token | {lines[0]['loss']:.4f} | {lines[2]['loss']:.4f} | {lines[2]['loss']:.4f} |"
        in text
    )
    assert all(f"    {part}" in text for part in output.splitlines()[:9]), "the plan"
    assert "](loss.png)" in text and text.count("### Sample") == 2
    assert f"after:\n\n    {lines[2]['samples'][1]['answer']}\n" in text
    assert 50 << 20 < end["peak_memory_bytes"] < 8 << 30
    private, mapped = end["peak_memory_bytes"], end["mapped_file_bytes"]
    assert f"{private / 2**20:,.0f} MiB, plus {mapped / 2**20:,.0f} MiB of mapped files" in text
    expected = moved(RWKV.load(files / "base.pth"), tuned(files, proj_dir / "adapter.pth"))
    assert end["forgetting"] == pytest.approx(expected, rel=1e-4)
    assert list(expected) == ["English", "Chinese", "Code", "Arithmetic", "all"]
    assert expected["all"] > 0.01 and f"| all | {end['forgetting']['all']:.4f} |" in text


def test_the_card_has_each_answer_before_and_after_and_nothing_that_spoils_a_terminal_or_the_layout():
    metrics = [
        {"seconds": 2.0, "tokens": 100, "trained_tokens": 30},
        {"seconds": 3.0, "tokens": 150, "trained_tokens": 40},
    ]
    history = []
    for step, loss in ((0, 2.0), (9, None)):
        marks = {"prompt": "q\x1b[1m\n\n# q", "answer": f"{step}\0|`", "right": "```"}
        samples = [marks, {"prompt": "p", "answer": "", "right": "r"}]
        history.append({"step": step, "loss": loss, "samples": samples})
    summary = dict(
        steps=9, planned_steps=12, loss_first=2.0, loss_last=1.5, output="out/adapter.pth", forgetting={}
    )
    text = card(
        Config(load_model="m.pth", data_file="d.jsonl").settled(),
        ["a plan"],
        summary,
        RunLog(metrics, history),
        Verdict(NOTHING, "it is so", "that", False),
    )
    for words in (
        "### Sample 1\n\nprompt:\n\n    q␛[1m\n    \n    # q\n\nright:\n\n    ```\n\nbefore:\n\n    0␀|`\n\n",
        "before:\n\n    0␀|`\n\nafter:\n\n    9␀|`\n",
        "after:\n\n    (nothing)\n",
        "| verdict | nothing learnt: it is so; try that |",
        "| steps | 9 of 12 |",
        "| speed | 50 tokens/s (14 of them trained), 5.0 s in 2 steps |",
        "| loss, per token | 2.0000 | not finite |",
        "| peak memory | not measured",
        "The tokenizer has no tokens for the fixed text",
    ):
        assert words in text
    assert not any(ord(letter) < 32 and letter != "\n" for letter in text)


@pytest.mark.slow
def test_the_base_is_the_file_also_where_its_own_tensors_are_trained_and_the_run_was_resumed(files, tmp_path):
    run, again = tmp_path / "run", ["--train_parts", "ln,state", "--state_lr", "0.1", "--resume", "auto"]
    stop = at_file("metrics.jsonl", 4, run, interrupt)
    code, output = start(files, run, *again, sabotage=stop, forgetting=True)
    assert code == 130 and not (run / "run_card.md").exists() and "forgetting" not in summary(run), output
    shutil.copytree(run, tmp_path / "killed")
    succeed(start(files, run, *again, forgetting=True))
    assert summary(run)["forgetting"] == pytest.approx(
        moved(RWKV.load(files / "base.pth"), tuned(files, run / "adapter.pth")), rel=1e-4
    )

    # after its last step: what only that process knew is missing, and said to be so
    run = tmp_path / "killed"
    assert start(files, run, *again, sabotage=at_file("loss.png", 1, run, kill))[0]
    assert "nothing to train" in succeed(start(files, run, *again))
    text = (run / "run_card.md").read_text()
    assert text.count("not measured: the run was killed after its last step") == 2
    assert "| steps | 6 of 6 |" in text


def test_text_that_the_tokenizer_cannot_write_is_left_out():
    class English:
        def encode(self, text):
            if not text.isascii():
                raise UserError("no token")
            return [1]

    assert list(sections(English())) == ["English", "Code", "Arithmetic"]
    assert 1000 < sum(map(len, sections(BYTES).values())) < 3000


# other places for the numbers


def scalars(folder, tag):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder)).Reload()
    return {event.step: event.value for event in events.Scalars(tag)}, events


@pytest.mark.slow
def test_tensorboard_shows_what_the_files_hold_also_of_a_resumed_run(files, tmp_path):
    proj_dir = tmp_path / "run"
    flags = [*EVAL, str(files / "held.jsonl"), "--save_steps", "2"]
    # the first run leaves none, the second and the last resume from step 2
    for checkpoint in ("step-00000002", "step-00000004"):
        code, output = start(
            files, proj_dir, *flags, "--resume", "auto", sabotage=at_file(checkpoint, 1, proj_dir, kill)
        )
        assert code and f"; watch: tensorboard --logdir {proj_dir}/tensorboard" in output
    succeed(start(files, proj_dir, *flags, "--resume", "auto"))
    shown, events = scalars(proj_dir / "tensorboard", "train/loss")
    assert shown == pytest.approx(dict(enumerate(losses(proj_dir), 1)))
    assert len(events.Scalars("train/loss")) == 6 == len(scalars(proj_dir / "tensorboard", "train/lr")[0])
    lines = validation_lines(proj_dir)
    assert scalars(proj_dir / "tensorboard", "validation/loss")[0] == pytest.approx(
        {line["step"]: line["loss"] for line in lines}
    )
    [text] = events.Tensors("validation/samples/text_summary")[-1].tensor_proto.string_val
    assert f"    {lines[-1]['samples'][0]['prompt'].splitlines()[0]}" in text.decode()


def without(package, rank):
    find = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *args: None if name == package else find(name, *args)


def broken_tensorboard(rank):
    sys.modules["torch.utils.tensorboard"] = None  # importing it fails


def test_without_tensorboard_a_run_says_so_and_goes_on(files, tmp_path):
    pytest.importorskip("tensorboard")
    absent = functools.partial(without, "tensorboard")
    for name, sabotage, words in (
        ("absent", absent, "watch it   TensorBoard not installed (pip install tensorboard)"),
        ("broken", broken_tensorboard, "watch it   TensorBoard broken here: "),
    ):
        output = start(files, tmp_path / name, "--epoch_steps", "1", "--verbose", sabotage=sabotage)
        assert words in succeed(output) and not (tmp_path / name / "tensorboard").exists()


def fake_wandb(log, key, rank):
    """The package's surface that is used here; every call becomes a JSON line."""

    def note(name, *args):
        with open(log, "a") as file:
            file.write(json.dumps([name, *args]) + "\n")

    def login():
        if not key:
            raise errors.Error("No API key configured.")

    def init(project, dir, id, resume, config):
        note("init", project, id, resume, config["lr_init"])
        return types.SimpleNamespace(
            id=id or "new-id",
            log=lambda values, step: note("log", step, values),
            finish=functools.partial(note, "finish"),
        )

    errors = types.SimpleNamespace(Error=type("Error", (Exception,), {}))
    module = types.ModuleType("wandb")
    module.login, module.init, module.errors = login, init, errors
    module.Table = lambda columns, data: [columns, *data]
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    sys.modules["wandb"] = module


def test_weights_and_biases_gets_one_run_however_often_it_is_resumed(files, tmp_path):
    proj_dir, log = tmp_path / "run", tmp_path / "log"
    flags = ["--wandb", "project", *EVAL, str(files / "held.jsonl")]
    fake = functools.partial(fake_wandb, log, True)
    stop = at_file("metrics.jsonl", 4, proj_dir, interrupt)
    code, output = start(files, proj_dir, *flags, sabotage=in_turn(fake, stop))
    assert code == 130 and "Weights & Biases, project project" in output
    succeed(start(files, proj_dir, *flags, "--resume", "auto", sabotage=fake))
    calls = read_rows(log)
    begun = [["init", "project", name, "allow", 0.01] for name in (None, "new-id")]
    assert [call for call in calls if call[0] != "log"] == [begun[0], ["finish", 0], begun[1], ["finish", 0]]
    logged = [
        (step, name, value)
        for _, step, values in (call for call in calls if call[0] == "log")
        for name, value in values.items()
    ]
    assert [step for step, _, _ in logged] == sorted(step for step, _, _ in logged), (
        "wandb drops what is logged for a step before the last one"
    )
    assert [value for _, name, value in logged if name == "train/loss"] == losses(proj_dir)
    assert [value for _, name, value in logged if name == "validation/loss"] == [
        line["loss"] for line in validation_lines(proj_dir)
    ]
    assert [value[0] for _, name, value in logged if name == "validation/samples"] == 3 * [
        ["prompt", "answer", "right"]
    ]


@pytest.mark.parametrize(
    "trouble, words",
    [
        ("absent", " needs the package wandb: pip install wandb, or drop the flag"),
        ("no key", ": No API key configured. With WANDB_MODE=offline the run stays on this machine"),
    ],
)
def test_wandb_that_cannot_work_is_said_before_anything_else(files, tmp_path, trouble, words):
    absent, no_key = functools.partial(without, "wandb"), functools.partial(fake_wandb, os.devnull, False)
    sabotage, words = absent if trouble == "absent" else no_key, f"--wandb p{words}"
    code, output = start(files, tmp_path / "run", "--wandb", "p", sabotage=sabotage)
    assert code == 2 and output.strip() == f"error: {words}" and not (tmp_path / "run").exists()


def offline(rank):
    os.environ["WANDB_MODE"] = "offline"


@pytest.mark.slow
def test_the_real_wandb_takes_it_offline(files, tmp_path):
    pytest.importorskip("wandb")
    flags = ["--wandb", "project", "--eval_file", str(files / "held.jsonl")]
    output = succeed(start(files, tmp_path / "run", *flags, sabotage=offline))
    [record] = (tmp_path / "run/wandb").glob("offline-run-*/run-*.wandb")
    assert record.stem == "run-" + (tmp_path / "run/wandb-id.txt").read_text().strip()
    assert "train/loss" in output and "validation/loss" in output  # wandb's own summary


@pytest.mark.parametrize("count, line", [(1, "None"), (2, "None"), (3, "-")])
def test_two_evaluations_are_two_marks_in_the_picture(tmp_path, plotted, count, line):
    metrics = [{"step": step, "loss": 3.0} for step in range(1, 9)]
    draw_losses(metrics, [{"step": 4 * i, "loss": 2.0} for i in range(count)], str(tmp_path / "loss.png"))
    validation = plotted["validation loss"]
    assert validation.get_linestyle() == line and validation.get_marker() == "o"
    assert len(validation.get_xdata()) == count
    assert plotted["loss"].get_linestyle() == "-" and (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"


def test_a_kl_is_rated_in_words():
    rows = {"English": 0.004, "Code": 0.05, "Arithmetic": 0.5, "all": 1.5}
    text = "\n".join(run_card._forgetting("base.pth", {"forgetting": rows}))
    for line in (
        "| English | 0.0040 | +0.4 % | small |",
        "| Code | 0.0500 | +5.1 % | moderate |",
        "| Arithmetic | 0.5000 | 1.65 times | large |",
        "| all | 1.5000 | 4.48 times | very large",
    ):
        assert line in text


@pytest.mark.parametrize(
    "losses, patience, kept, wins",
    [
        ((3.0, 2.0, 2.5, 2.1), 2, 1, False),
        ((3.0, 4.0, 3.5, 2.0), 0, 3, False),
        ((0.081, 2.775, 2.769, 2.658), 3, None, True),  # the model before the training is the best
        ((3.0, 4.0, None), 2, None, True),
        ((3.0, 3.0, 3.0), 2, None, False),  # the base is as good as the others
        ((None, 4.0, 5.0), 1, 1, False),
        ((3.0,), 0, None, False),
        ((), 0, None, False),
        # a fall by less than a thousandth of the first loss is none, until several make one
        ((2.0, 1.0, 0.999, 0.9985), 2, 3, False),
        ((2.0, 1.0, 0.999, 0.9975), 0, 3, False),
        ((-0.5, -0.6, -0.6001), 1, 2, False),  # the negative of a reward
    ],
)
def test_the_evaluation_before_the_training_counts(losses, patience, kept, wins):
    """`patience`: the largest --early_stop with which the run is over."""
    history = [{"step": step, "loss": loss} for step, loss in enumerate(losses)]
    assert [is_over(history, count) for count in (-1, 0, 1, 2, 3, 4)] == [
        0 < count <= patience for count in (-1, 0, 1, 2, 3, 4)
    ]
    assert (best_trained(history) or {}).get("step") == kept and base_wins(history) == wins


def test_the_best_state_of_an_earlier_version_that_is_worse_than_the_base_is_removed(tmp_path):
    best = tmp_path / "best.pth"
    write_checkpoint(best, [], {"step": 3, "validation_loss": 5.0})
    note = restore_best(str(best), str(tmp_path), None)
    assert not best.exists() and note.endswith("no state so far is better than the model before the training")


def test_more_right_answers_are_better_than_a_lower_loss_unless_rewards_decide():
    from src.training.validation_log import best, no_better

    history = [
        {"step": step, "loss": loss, "right_answers": right}
        for step, loss, right in ((0, 4.0, 0.0), (1, 1.0, 0.0), (2, 1.2, 0.4), (3, 1.1, 0.4), (4, 1.3, 0.2))
    ]
    assert best(history)["step"] == 3 and no_better(history) == [False, False, False, True, True]
    rewarded = [{**line, "reward": -line["loss"]} for line in history]
    assert best(rewarded)["step"] == 1 and no_better(rewarded) == [False, False, True, True, True]
