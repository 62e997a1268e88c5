"""The plan of --loss grpo: how long answers may be, its steps, its work and time, and its memory."""

import dataclasses
import types

import numpy as np
import pytest
import torch

from rwkv_miss import UserError
from src.config import Config
from src.data.answer_batches import GROUP, collate_answers
from src.data.answer_example import AnswerGroup
from src.data.held_out import evaluations
from src.data.questions import THOUGHTS, Question, Questions
from src.data.templates import load_template
from src.data.tokenizer import load_tokenizer
from src.inference.decoders import for_training
from src.inference.engine import Engine
from src.inference.request import Request
from src.inference.sampling import Sampling
from src.model import RWKV
from src.planning import memory
from src.planning.base_model import build_model
from src.planning.defaults import choose_eval_steps, chosen_rate
from src.planning.draft import Draft
from src.planning.plan import read_data
from src.planning.step_memory import Live, StepBytes, step_bytes
from src.reporting.plan_text import far_above
from src.sources import source_of
from src.sources.drawn.sizes import TOGETHER, largest_groups, longest_answer
from src.sources.estimates import DRAWN, Speed, Work

from .conftest import make_arch, write_rows
from .test_plan import SIZES, bytes_of_a_step
from .test_preference_plan import planned

BYTES = load_tokenizer("bytes", 256)
ROWS = [{"question": str(1000 + i), "answer": str(i)} for i in range(200)]
PROMPT = len("User: 1000\n\nAssistant:")


@pytest.fixture
def flags(checkpoint, tmp_path, monkeypatch):
    """Flags of scripts.plan. The work of a step is not counted here; it has a test of its own."""
    monkeypatch.setattr(memory, "step_bytes", lambda *_, **__: StepBytes(1e6, 1e6, 1e6, 0))
    data, base = (
        tmp_path / "questions.jsonl",
        checkpoint(7, n_layer=2, n_embd=32, head_size=16, vocab_size=256),
    )
    write_rows(data, ROWS)
    options = {
        "load_model": base,
        "data_file": data,
        "proj_dir": tmp_path / "run",
        "tokenizer": "bytes",
        "loss": "grpo",
        "tokens_per_second": 100,
    }
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def test_the_plan_in_words(flags, capsys):
    more_flags = ["--rewards", "exact=1,partial=-0.5", "--epoch_steps", "20", "--eval_split", "0.1"]
    shown, numbers = planned([*flags, *more_flags], capsys)
    for words in (
        " questions, ",
        " tokens of prompts (template rwkv)\n",
        "steps      20 steps of 16 questions (micro_bsz 16 x accumulate 1 x devices 1), ",
        "loss       grpo (dapo), 8 answers to a question, of at most 19 tokens; reward exact - 0.5 partial,"
        " against the mean of a question's answers, in units of their spread; clip 0.2 and 0.28; no KL\n",
        "prompts    each is read once for its 8 answers, to draw them and to train on them; 128 answers are"
        " drawn at once, at temperature 1\n",
        "evaluation greedy answers to ",
        "max_tokens 19: 1.25 times the longest reference answer, plus 16, for the reward ",
        ": from method, rank and widths\n",
        "ctx_len 256: the longest question with its answer has 40 tokens\n",
        " of drawing (as given; if answers are about as long as the right ones, 5 tokens)",
    ):
        assert words in shown, words
    assert "drawing" in numbers["memory"]
    more = ["--grpo_type", "dr_grpo", "--chunk_ctx", "8", "--inner_steps", "4", "--beta", "0.1"]
    shown, _ = planned([*flags, *more_flags, *more], capsys)
    for words in (
        "reward exact - 0.5 partial, against the mean of a question's answers; clip 0.2 and 0.2; 4 steps on"
        " each draw; KL 0.1 to the base, adapter off\n",
        "prompts    each is read once to draw, and before each answer to train on it, as rows run in chunks;",
    ):
        assert words in shown, words


def loaded(*rows, template="rwkv"):
    """LoadedQuestions of (question, right answer)."""
    opening = load_template(template).opening
    questions = [Question([asked], right, opening) for asked, right in rows]
    prompts = [np.frombuffer(asked.encode(), np.uint8).astype(np.int32) for asked, _ in rows]
    return types.SimpleNamespace(questions=questions, prompts=prompts, longest=max(map(len, prompts)))


def test_how_long_answers_may_be():
    """As scripts.evaluate has it for the score; of several rewards that tell, the one that needs most."""
    found = loaded(("ask", "1234"), ("asked", "12345678"))

    def chosen(found=found, rewards=(), reward_length=0, ctx_len=0):
        return longest_answer(found, BYTES, rewards, reward_length, ctx_len)

    assert chosen(rewards={"exact": 1})[0] == 8 + 2 + 16
    assert chosen(rewards={"partial": 1, "exact": 0.5})[0] == 26
    limit, reason = chosen(rewards={"exact": 1, "number": 1})
    assert limit == 512 and reason == "for the reward number"
    limit, reason = chosen(rewards={"regex": 1})
    assert limit == 512 and "does not tell" in reason
    assert chosen(rewards={"own": 1})[0] == 512
    assert chosen(rewards={"own": 1, "exact": 0.1})[0] == 26
    assert chosen(rewards={"own": 1, "exact": 0})[0] == 512  # which is only shown
    assert chosen(rewards={"exact": 1, "length": 1}, reward_length=100)[0] == 100 + 25 + 16
    thinking = loaded(("ask", "1"), template="think")
    assert chosen(thinking, rewards={"exact": 1})[0] == THOUGHTS == 2048
    # in the row that was given there is room for the longest question and an answer
    limit, reason = chosen(rewards={"number": 1}, ctx_len=100)
    assert limit == 100 + 1 - 5 and reason == "what --ctx_len 100 has room for"
    # but one long question does not shorten all answers
    long = loaded(("q" * 90, "1"), ("q", "1"))
    assert chosen(long, rewards={"number": 1}, ctx_len=100)[0] == 50
    with pytest.raises(
        UserError, match="--reward_length 96: --ctx_len 100 has room for answers of 96 tokens"
    ):
        chosen(rewards={"length": 1}, reward_length=96, ctx_len=100)


def test_a_run_takes_what_was_chosen(tmp_path):
    """max_tokens and ctx_len are filled in, and what a given ctx_len leaves out is told, of both files."""
    data, held = tmp_path / "data.jsonl", tmp_path / "held.jsonl"
    rows = [*ROWS[:20], {"question": "y" * 60, "answer": "1"}]
    write_rows(data, rows)
    write_rows(held, (rows[-1], {"question": "z", "answer": "1"}))
    files = {"loss": "grpo", "data_file": str(data), "eval_file": str(held)}
    draft = Draft(Config(**files))
    found = read_data(draft, BYTES, load_template("rwkv"))
    assert (draft.config.max_tokens, draft.config.ctx_len) == (2 + 16, 256)
    assert len(found.documents) == 20 and len(found.held_out) == 2  # the long one is in both
    assert (found.documents.group_size, found.held_out.max_tokens) == (8, 18)
    found = read_data(Draft(Config(**files, ctx_len=64, max_tokens=18)), BYTES, load_template("rwkv"))
    assert found.documents.too_long == found.held_out.too_long == 1 and len(found.held_out) == 1
    warning = "1 question of more than --ctx_len 64 tokens with an answer of 18: "
    assert f"left out   {warning}{held}, line 1" in found.found.lines()
    with pytest.raises(UserError, match="line 1: all 21 questions with an answer of --max_tokens 18"):
        read_data(Draft(Config(**files, ctx_len=20, max_tokens=18)), BYTES, load_template("rwkv"))


def test_the_time_is_that_of_the_tokens(flags, capsys):
    """At a given speed of the whole run a drawn token counts as a part of a trained one, and an answer has
    half as many again as a right one.
    """
    more_flags = ["--epoch_steps", "10", "--epoch_count", "3", "--eval_split", "0.1", "--max_tokens", "20"]
    more_flags += ["--eval_steps", "0"]
    shown, numbers = planned([*flags, *more_flags], capsys)
    assert "; if answers are about as long as the right ones, 5 tokens)" in shown
    assert "estimated, at most\n" in shown and " 0 bytes" not in shown
    rows = numbers["documents"]
    usual = 1.5 * (1 + sum(len(row["answer"]) for row in ROWS) / len(ROWS))
    draws, answers = 30, 8 * usual
    asked = draws / -(-rows // 16) * rows  # the last draw of a pass has fewer
    prompts = numbers["tokens"] / asked - answers  # tokens of a question, less one, in the mean
    assert prompts == pytest.approx(PROMPT - 1) and rows == 180
    drawing = DRAWN * asked * answers / 100
    trained = (numbers["tokens"] + asked * prompts / 3) / 100
    assert numbers["drawing_seconds"] == pytest.approx(drawing)
    evaluated = numbers["evaluated_documents"]
    of_one = DRAWN * usual + PROMPT / 3
    assert numbers["evaluation_seconds"] == pytest.approx(2 * evaluated * of_one / 100)
    assert numbers["seconds"] == pytest.approx(drawing + trained + numbers["evaluation_seconds"], rel=1e-6)
    # an inner step trains on the same answers again, and KL has the reference read them once
    _, more = planned([*flags, *more_flags, "--inner_steps", "2", "--beta", "0.1"], capsys)
    half = numbers["tokens"] / 2
    assert more["tokens"] == pytest.approx(numbers["tokens"])
    assert more["drawing_seconds"] == pytest.approx(drawing / 2)
    reads = half * (1 / 3) + asked / 2 * prompts / 3
    wanted = drawing / 2 + (numbers["tokens"] + reads) / 100 + more["evaluation_seconds"]
    assert more["seconds"] == pytest.approx(wanted, rel=1e-6)
    # right answers don't tell how long the way to them is
    shown, longest = planned([*flags, *more_flags, "--rewards", "number=1"], capsys)
    assert "; if answers have all 20 tokens; shorter ones take less)" in shown
    assert longest["drawing_seconds"] == pytest.approx(drawing * 20 / usual)


def test_evaluations_take_a_tenth_at_most(flags, capsys):
    more_flags = ["--eval_split", "0.5", "--epoch_steps", "2", "--epoch_count", "1", "--max_tokens", "20"]
    shown, numbers = planned([*flags, *more_flags], capsys)
    assert 0 < numbers["evaluated_documents"] < 100
    assert 0.05 < numbers["evaluation_seconds"] / (numbers["seconds"] - numbers["evaluation_seconds"]) <= 0.1
    assert "so that all evaluations take at most a tenth of the run" in shown


@pytest.mark.parametrize(
    ("steps", "inner", "affordable", "every"),
    [
        (300, 1, 99.0, 50),
        (300, 4, 7.0, 52),  # a draw has four steps
        (300, 1, 4.9, 100),
        (300, 1, 2.9, 0),
        (3, 1, 99.0, 1),
        (8, 8, 99.0, 0),  # all of one draw
    ],
)
def test_evaluations_between_the_first_and_the_last(steps, inner, affordable, every):
    draft = Draft(Config(loss="grpo", inner_steps=inner))
    choose_eval_steps(draft, steps, affordable)
    assert draft.config.settled().eval_steps == every
    assert ("eval_steps" in draft.config.origins) == (every > 0)
    assert every == 0 or evaluations(steps, every) <= min(7, affordable)
    given = Draft(Config(loss="grpo", inner_steps=inner, eval_steps=0))
    choose_eval_steps(given, steps, affordable)
    assert given.config.eval_steps == 0


def test_a_run_evaluates_in_between_where_that_is_cheap(flags, capsys):
    more_flags = ["--eval_split", "0.01", "--epoch_steps", "60", "--epoch_count", "1"]
    shown, numbers = planned([*flags, *more_flags], capsys)
    assert "7 times: before the training, every 10 steps and at its end" in shown
    assert numbers["evaluation_seconds"] <= 0.1 * (numbers["seconds"] - numbers["evaluation_seconds"])
    assert "early stop" not in shown
    shown, _ = planned([*flags, *more_flags, "--eval_steps", "0"], capsys)
    assert "2 times: before the training and at its end" in shown


def test_work_and_speed():
    work = Work(100, 50) + Work(20).times(0.5)
    assert work == Work(110, 50) and work.total == 110 + 50 * DRAWN
    assert work.seconds(Speed(10, drawn=25)) == 11 + 2
    assert work.seconds(Speed(10)) == work.total / 10


def group(prompt: int, lengths: list[int]) -> AnswerGroup:
    answers = [[2] * length for length in lengths]
    drawn = [np.zeros(length, np.float32) for length in lengths]
    return AnswerGroup.of(np.ones(prompt, np.int32), answers, [0.5] * len(lengths), drawn)


@pytest.mark.parametrize(
    ("kind", "beta", "chunk", "grad_cp", "peft", "kernel"),
    [
        ("dapo", 0.0, 0, 0, "miss", "cpu"),
        ("grpo", 0.1, 0, 2, "miss", "torch"),
        ("dapo", 0.1, 16, 0, "miss", "cpu"),
    ],
)
def test_the_count_is_that_of_a_real_step(checkpoint, kind, beta, chunk, grad_cp, peft, kernel):
    """One of the two questions has answers as long as they may be."""
    config = Config(
        load_model=str(checkpoint(7, **SIZES)),
        loss="grpo",
        rewards={"exact": 1.0},
        grpo_type=kind,
        beta=beta,
        clip_high=0.2,
        peft=peft,
        peft_config={} if peft == "none" else {"r": 5},
        grad_cp=grad_cp,
        chunk_ctx=chunk,
        micro_bsz=2,
        group_size=3,
        max_tokens=11,
        precision="fp32",
    )
    groups = [group(7, [11, 11, 11]), group(4 if not chunk else 7, [11, 11, 11])]
    batch = collate_answers([[example] for example in groups], 1.0, chunk, not chunk, GROUP)
    reference = torch.zeros(len(batch.targets)) if beta else None
    batch = batch.having(width=batch.ids.shape[1], old=None, reference=reference)
    model = build_model(config, make_arch(7, **SIZES), kernel, torch.float32)
    loss, chunks = source_of(config).loss, source_of(config).chunks
    activations, peak = bytes_of_a_step(model, grad_cp, batch, lambda: loss(model, batch, chunks)[0])
    prompts = [np.ones(7, np.int32), np.ones(4, np.int32)]
    asked = Questions([Question(["a"], "b")] * 2, prompts, 3, 11)
    sizes = largest_groups(asked, config.micro_bsz, config.chunk_ctx)
    assert sizes.row == 3 * (7 - 1 + 11) and sizes.targets == len(batch.targets)
    planned = step_bytes(
        make_arch(7, **SIZES), config, kernel, "fp32", sizes.row, sizes.targets, sizes.shared
    )
    assert planned.activations == pytest.approx(activations, rel=0.01 if chunk else 0, abs=8)
    assert planned.peak == pytest.approx(peak, rel=0.01)


@pytest.mark.parametrize("version", [6, 7])
@pytest.mark.parametrize("kernel", ["cpu", "torch"])
def test_drawing_takes_no_more_than_is_planned(version, kernel):
    """States of all rows, likelihoods, and the prompts that are read at once."""
    arch = make_arch(version, n_layer=3, n_embd=64, head_size=32, vocab_size=300)
    torch.manual_seed(0)
    model = RWKV(arch)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.02)
    model.set_kernel(kernel)
    config = Config(
        loss="grpo", micro_bsz=8, accumulate_grad_batches=1, group_size=8, ctx_len=128, max_tokens=4
    )
    prompt = [1, 2, 3] * 40
    with torch.no_grad(), Live([*model.parameters(), *model.buffers()]) as live:
        decoder = for_training(model, 64)
        engine = Engine(decoder, load_tokenizer("bytes", 300), together=TOGETHER)
        for seed in range(8):
            engine.submit(
                Request(prompt, 4, Sampling(temperature=1.0, top_p=1.0), seed=seed, n=8, logprobs=0)
            )
        while not engine.idle:
            engine.step()
        decoder.close()
    room = source_of(config).cost.sampling_bytes(arch, "fp32", "cpu")
    assert room / 4 < live.peak < room


def test_right_answers_that_cannot_be_drawn_are_told():
    """The end of an answer is a token of it."""
    questions = [Question(["a"], right) for right in ("1", "1234", "12345")]
    prompts = [np.ones(1, np.int32)] * 3
    warnings = source_of(Config(loss="grpo")).warnings
    (warning,) = warnings(Questions(questions, prompts, 2, 4), BYTES)
    assert (
        warning
        == "2 of 3 reference answers have more tokens than --max_tokens 4, so that they can't be drawn"
    )
    assert not warnings(Questions(questions, prompts, 2, 6), BYTES)


def test_a_rate_far_above_the_chosen_rate_is_told():
    arch = make_arch(7, n_layer=2, n_embd=32, head_size=16, vocab_size=256)
    config = Config(loss="grpo", load_model="base.pth", peft_config={"r": 4})
    chosen = chosen_rate(config, arch)

    def told(**changes):
        return far_above(types.SimpleNamespace(settings=dataclasses.replace(config, **changes), arch=arch))

    assert not told(lr_init=5 * chosen)
    assert told(lr_init=20 * chosen) == f"; 20 times the chosen rate, {chosen:g}: rewards may collapse"
    assert not told(lr_init=20 * chosen, loss="sft")
