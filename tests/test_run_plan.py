"""Beginning of a run: its words before the first step, its evaluations, and the answer to Ctrl-C."""

import functools
import json
import os
import random
import re
import types

import numpy as np
import pytest

from rwkv_miss import progress
from scripts import plan as plan_program
from src.common.formatting import size_text
from src.config import Config, recorded_settings
from src.data import held_out
from src.data.batches import make_schedule
from src.data.dataset import Document, Documents
from src.planning.draft import Draft
from src.planning.plan import choose_evaluation
from src.reporting import document_text, plan_text
from src.sources import source_of
from src.training import callbacks, trainer

from . import program
from .conftest import read_rows, save_base, write_rows
from .program import at_file, interrupt, losses, succeed

LABELS = "rwkv-miss model data steps trained rates device needs evaluation files sample".split()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A random base over bytes, 48 conversations to train on and 40 others."""
    folder = tmp_path_factory.mktemp("plan")
    save_base(folder / "base.pth")
    rng = random.Random(0)
    for name, count in (("rows", 48), ("held", 40)):
        rows = [
            {"prompt": f"{name} {i}" + "?" * rng.randint(1, 9), "completion": " ab c" * rng.choice([1, 3])}
            for i in range(count)
        ]
        write_rows(folder / f"{name}.jsonl", rows)
    return folder


def flags_of(files, proj_dir, *more):
    common = f"""
        --load_model {files}/base.pth --data_file {files}/rows.jsonl --proj_dir {proj_dir} --tokenizer bytes
        --accelerator cpu --peft_config r=5 --packing 0 --micro_bsz 4 --accumulate_grad_batches 2
    """.split()
    whole = [] if any(flag.startswith("--eval") for flag in more) else ["--eval_split", "0"]
    return [*common, *whole, *([] if "--epoch_count" in more else ["--epoch_count", "1"]), *more]


def start(files, proj_dir, *more, **options):
    return program.run(flags_of(files, proj_dir, *more), **options)


def evaluated(files, proj_dir, *more, **options):
    """Six steps a pass, and evaluations of one sample answer."""
    more = ["--eval_file", str(files / "held.jsonl"), "--eval_samples", "1", "--ctx_len", "45", *more]
    return start(files, proj_dir, *more, **options)


def validation(proj_dir):
    return read_rows(proj_dir / "validation.jsonl")


# the plan


def test_the_plan_is_short_and_its_details_are_in_the_card(files, tmp_path, capsys):
    output = succeed(evaluated(files, tmp_path / "run", counted=True))
    lines = output.partition("step 0/6")[0].splitlines()
    assert [line.split()[0] for line in lines] == LABELS and len(lines) <= plan_text.LINES == 14
    said = dict(zip(LABELS, lines, strict=True))
    assert "6 steps of 8 rows" in said["steps"]
    assert re.search(
        r"trained    [\d,]+ of [\d,]+ parameters \([\d.]+ %\): miss, rank 5 in 12 matrices$", said["trained"]
    )
    assert "loss on" not in said["data"]
    assert re.search("48 documents, [0-9,]+ tokens, [0-9,]+ of them trained", said["data"])
    assert said["sample"].startswith("sample     rows 0") and "?« ab c" in said["sample"]
    inside = ("layout", "linears", "auto: ", "self-test", ".so", "kernel", "chosen", "in full", "hashes")
    assert not [word for word in inside if word in "\n".join(lines)]
    summary = json.loads((tmp_path / "run/run.json").read_text())
    assert said["rwkv-miss"] == f"rwkv-miss  {summary['version']}" + (
        f", commit {summary['commit']}" if summary["commit"] else ""
    )
    card = (tmp_path / "run/run_card.md").read_text()
    assert all(f"    {line}\n" in card for line in lines)
    details = (
        "kernel     wkv cpu: auto",
        "self-test error",
        "hashes     base ",
        "in full    python train.py",
    )
    assert all(f"    {detail}" in card or detail in card for detail in details)

    verbose = succeed(evaluated(files, tmp_path / "verbose", "--epoch_steps", "1", "--verbose"))
    assert all(detail in verbose and detail not in output for detail in details)

    # memory and time are those of scripts.plan
    assert (
        plan_program.plan(
            *plan_program.parse([*flags_of(files, tmp_path / "other", "--ctx_len", "45"), "--json"])
        )
        == 0
    )
    planned = json.loads(capsys.readouterr().out.splitlines()[-1])
    memory = size_text(planned["memory_together"])
    assert re.fullmatch(
        f"needs      about {re.escape(memory)} of memory, of [0-9.]+ GiB that may be used; about [0-9.]+ s"
        " from the command to its end, of which [0-9.]+ s for loading and [0-9.]+ s for evaluation",
        said["needs"],
    )


def test_many_warnings_share_the_last_line_but_one(files, tmp_path):
    with open(files / "bad.jsonl", "w") as bad:
        bad.write(
            (files / "rows.jsonl").read_text()
            + '{"prompt": 1}\n{"prompt": "q", "completion": "'
            + "long " * 20
            + '"}\n{"prompt": "q", "completion": "short"}\n'
        )
    more = ["--data_file", f"{files}/bad.jsonl"]
    more += "--on_bad_row skip --ctx_len 40 --warmup_steps 99 --resume auto".split()
    output = succeed(start(files, tmp_path / "run", *more))
    lines = output.partition("WARNING: the loss")[0].splitlines()
    assert len(lines) == plan_text.LINES and lines[-1].startswith("sample ")
    for text in (
        "no checkpoint in",
        "cut at --ctx_len 40",
        "1 row cannot be used and is left out",
        f"1 row has another answer than an earlier row with the same question, first {more[1]}, line 51;",
        "the warm-up, 99 steps",
    ):
        assert sum(text in line for line in lines) == 1, text
    assert "bad.jsonl, line 49" in (tmp_path / "run/run_card.md").read_text()


def test_a_longer_schedule_tells_the_rate_before_and_now():
    """In the plan of a resumed run: a cosine is higher where it is longer."""
    before, config = (
        Config(lr_init=1e-3, lr_schedule="cos", warmup_steps=0, epoch_count=1, epoch_steps=n, resume="auto")
        for n in (10, 20)
    )
    path, schedule = "step-00000010.pth", types.SimpleNamespace(steps_per_pass=0)
    run = types.SimpleNamespace(settings=config, before=before, resume_from=path, steps=20, schedule=schedule)
    note = plan_text.resume(run, over=False)[-1]
    assert note == (
        "           10 steps -> 20: the learning rate was 0.0001 in step 10 and is 0.00051 in step 11, as its"
        " schedule is now that of 20 steps"
    )


def test_a_long_part_of_the_sample_is_cut_away_from_the_mark():
    from src.data.tokenizer import load_tokenizer

    text = "a" * 100 + "Q:" + " yes" + "b" * 100
    ids = np.frombuffer(text.encode() + b"\0", np.uint8).astype(np.int32)
    row = Document(ids, np.arange(len(ids)) >= 102)
    shown = document_text.short_sample(row, load_tokenizer("bytes", 256))
    assert shown == f"... {'a' * 78}Q:« yes{'b' * 76} ...» (« » is what is trained)"


# the cost of an evaluation


def documents(count, seed, trained=True):
    rng = np.random.default_rng(seed)
    weights = np.ones(60, bool) if trained else np.zeros(60, bool)
    sizes = (rng.integers(5, 60) for _ in range(count))
    return [Document(rng.integers(1, 256, size).astype(np.int32), weights) for size in sizes]


def cut_to_length(rows):
    return Documents([Document(row.ids, row.weights[: len(row.ids)]) for row in rows])


@pytest.mark.parametrize(
    "settings", [{}, {"eval_steps": 7}, {"epoch_count": 3, "eval_steps": 50}, {"epoch_steps": 2}]
)
def test_all_evaluations_take_a_tenth_of_the_run_and_everybody_chooses_alike(settings):
    train, held = cut_to_length(documents(400, 0)), documents(300, 1) + documents(20, 2, trained=False)
    settings = {"epoch_count": 1, "micro_bsz": 4, "ctx_len": 64, "eval_steps": 0, **settings}
    config = Config(**settings)
    draft, schedule = Draft(config), make_schedule(train, config, 1)
    chosen = choose_evaluation(draft, schedule, cut_to_length(held))
    assert draft.config.eval_docs == len(chosen)
    assert draft.config.origins["eval_docs"].startswith("chosen: of 300 held-out documents")
    steps = config.epoch_count * (config.epoch_steps or schedule.steps_per_pass)
    evaluations = sum(
        step in (0, steps) or config.eval_steps > 0 and step % config.eval_steps == 0
        for step in range(steps + 1)
    )
    assert evaluations == held_out.evaluations(steps, config.eval_steps)

    def share(tokens):
        return evaluations * tokens / 3 / source_of(config).cost.trained_tokens(schedule, steps)

    assert share(sum(chosen.lengths - 1)) <= 0.1 < share(sum(chosen.lengths - 1) + 60)
    # in any order of the file the same documents
    again = choose_evaluation(Draft(config), schedule, cut_to_length(held[::-1]))
    assert sorted(row.ids.tobytes() for row in chosen) == sorted(row.ids.tobytes() for row in again)


def test_few_held_out_documents_are_all_taken_and_one_always_is():
    for count, steps, taken in ((3, 0, 3), (300, 1, 1)):
        settings = {"epoch_count": 1, "epoch_steps": steps, "micro_bsz": 1, "packing": False}
        draft = Draft(Config(ctx_len=64, **settings))
        schedule = make_schedule(cut_to_length(documents(400, 0)), draft.config, 1)
        chosen = choose_evaluation(draft, schedule, cut_to_length(documents(count, 1)))
        assert len(chosen) == draft.config.eval_docs == taken
    draft = Draft(Config())
    assert not choose_evaluation(draft, None, Documents([])) and not draft.config.origins


def test_the_share_is_kept(files, tmp_path):
    run = tmp_path / "run"
    succeed(evaluated(files, run))
    recorded = recorded_settings(str(run / "config.yaml"))
    assert 0 < recorded.settings.eval_docs < 40
    assert recorded.chosen["eval_docs"].startswith("of 40 held-out documents")
    tokens = validation(run)[0]["tokens"]
    # twice as long, more would be affordable
    succeed(evaluated(files, run, "--epoch_count", "2", "--resume", "auto"))
    assert [line["tokens"] for line in validation(run)] == 3 * [tokens]
    again = recorded_settings(str(run / "config.yaml"))
    assert again.settings.eval_docs == recorded.settings.eval_docs
    assert again.chosen["eval_docs"] == f"as the run has it so far: {recorded.chosen['eval_docs']}"


def chatty(rank):
    progress.LINE = progress.LINE_SHARE = 0.0


def test_a_pipe_hears_of_the_validation(files, tmp_path):
    output = succeed(evaluated(files, tmp_path / "run", "--eval_docs", "40", sabotage=chatty))
    assert re.search(
        r"^validation:  [ \d]\d%, \d+ of 40 documents, [\d.e+]+ documents/s, [\d.]+ s left$",
        output,
        re.MULTILINE,
    )
    assert len(re.findall("^validation: 100%, 40 of 40 documents", output, re.MULTILINE)) == 2
    assert "\r" not in output


# Ctrl-C


def test_before_the_first_step_the_run_ends_at_once(files, tmp_path):
    stop = at_file("validation.jsonl", 2, tmp_path / "run", interrupt)
    code, output = evaluated(files, tmp_path / "run", sabotage=stop)
    assert code == 130
    assert output.splitlines()[-1] == "interrupted before the first step; the same command starts again"
    assert "step 0/6" not in output
    assert not (tmp_path / "run/adapter.pth").exists()
    succeed(evaluated(files, tmp_path / "run", "--epoch_steps", "1"))


def interrupt_in_validation(step, times, rank):
    """Ctrl-C while the held-out documents are read after a step."""
    validation_step, left = trainer.FineTuning.validation_step, times

    def interrupted(self, batch, index):
        nonlocal left
        if self.trainer.global_step == step and left:
            callbacks.ONE_REQUEST = 0.0
            left -= 1
            interrupt()
        return validation_step(self, batch, index)

    trainer.FineTuning.validation_step = interrupted


def test_an_evaluation_is_left_for_later_by_who_wants_to_stop(files, tmp_path):
    more = ["--eval_steps", "2", "--eval_docs", "40"]
    stop = functools.partial(interrupt_in_validation, 2, 1)
    code, output = evaluated(files, tmp_path / "run", *more, sabotage=stop)
    words = "stopping after this step and saving; press Ctrl-C again to quit now without saving"
    assert code == 130 and output.count(words) == 1
    assert "stopped, go on with --resume auto: step 2 of 6" in output
    assert [line["step"] for line in validation(tmp_path / "run")] == [0]
    assert len(losses(tmp_path / "run")) == 2
    succeed(evaluated(files, tmp_path / "run", *more, "--resume", "auto"))
    succeed(evaluated(files, tmp_path / "whole", *more))
    assert validation(tmp_path / "run") == validation(tmp_path / "whole")


def test_the_second_ctrl_c_ends_it_without_saving(files, tmp_path):
    stop = functools.partial(interrupt_in_validation, 6, 2)
    code, output = evaluated(files, tmp_path / "run", "--eval_docs", "40", sabotage=stop)
    assert code == 130
    assert output.splitlines()[-1] == "ended within a step; what was saved before is unchanged"
    assert not (tmp_path / "run/adapter.pth").exists() and not os.path.exists(tmp_path / "run/run.json")
