"""Answers to many questions: which are asked, where they end, and that they do not depend on what else is
asked, or on a stop in between.
"""

import json
import random

import pytest

from rwkv_miss import UserError
from rwkv_miss.progress import Progress
from scripts.evaluate import first_answers
from src.data.formats import Reading
from src.data.questions import Question, answer_limit, read_questions
from src.data.templates import load_template
from src.data.tokenizer import load_tokenizer
from src.evaluation import answering
from src.evaluation.answering import Asking, answers_to, completed, engine_for, exact_accuracy, rows_for
from src.evaluation.answers_file import AnswersFile, SavedAnswer
from src.inference.engine import Engine, Request
from src.inference.sampling import Sampling
from src.inference.torch_decoder import TorchDecoder
from src.model import RWKV
from src.sources.held_out_loss import shortened

from .answering import scripted
from .conftest import make_arch, random_tensors

BYTES = load_tokenizer("bytes", 256)
WARM = Sampling(1.0, 0.9)


@pytest.fixture(scope="module")
def model():
    """A model in float64, in which no rounding changes a sample. Its answers depend on all of the prompt."""
    arch = make_arch(7, vocab_size=256, n_embd=32)
    made = RWKV(arch).double().eval().requires_grad_(False)
    loud = ("att.output.weight", "ffn.value.weight")
    tensors = random_tensors(arch)
    made.load_state_dict({name: t * (6 if name.endswith(loud) else 1) for name, t in tensors.items()})
    return made


def questions(count=5):
    rng = random.Random(0)
    return [Question(["".join(rng.choices("abcdef ", k=rng.randrange(1, 30)))], "a") for _ in range(count)]


def engine_of(model, rows):
    return Engine(TorchDecoder(model, rows), BYTES)


def said(tokens, request, tokenizer=BYTES):
    """The answer of one who says these tokens."""
    [(_, answer)] = completed(scripted(tokenizer, tokens), [request], Progress("answering"))
    return answer


def asked(tokenizer, tokens, question, asking):
    """Return the answer as an evaluation has it."""
    [[answer]] = answers_to(scripted(tokenizer, tokens), [question], asking)
    return answer


def test_many_answers_at_once_are_those_of_one_at_a_time(model):
    """Greedy and sampled, whatever the rows, and however the questions' neighbours end."""
    asked_for = questions()
    for asking in (Asking(6), Asking(6, sampling=WARM, samples=3, seed=5)):
        alone, together = (answers_to(engine_of(model, n), asked_for, asking) for n in (2, 7))
        assert alone == together
        assert len({answer.text for answers in alone for answer in answers}) > 3
        # the samples of a question do not depend on how many are drawn, nor on the questions after it
        fewer = answers_to(engine_of(model, 3), asked_for[:3], Asking(6, sampling=asking.sampling, seed=5))
        if asking.samples > 1:
            assert fewer == [answers[:1] for answers in alone[:3]]
            assert alone != answers_to(engine_of(model, 7), asked_for, Asking(6, sampling=WARM, samples=3))


def test_a_whole_answer_is_right_or_wrong(model):
    texts = [answer.text for (answer,) in answers_to(engine_of(model, 2), questions(), Asking(5))]
    made = [q._replace(answer=text if i % 3 else "no") for i, (q, text) in enumerate(zip(questions(), texts))]
    assert exact_accuracy(model, BYTES, made, Asking(5)) == (3 / 5, texts)


class Killed(Exception):
    """In the place of a signal."""


class StoppedFile(AnswersFile):
    """The process ends after some answers, in the middle of the next line."""

    left = 8

    def add(self, *answer):
        if not self.left:
            with open(self.path, "a") as file:
                file.write('{"question": 3, "sample": 0, "prom')
            raise Killed
        self.left -= 1
        super().add(*answer)


def test_a_stopped_evaluation_goes_on_and_gives_the_same_file(model, tmp_path, monkeypatch):
    asking, about = Asking(5, sampling=WARM, samples=3), {"model": "m", "bos": (0, 1)}
    whole, stopped = str(tmp_path / "whole.jsonl"), str(tmp_path / "stopped.jsonl")
    want = answers_to(engine_of(model, 7), questions(), asking, AnswersFile(whole, about))
    with pytest.raises(Killed):
        answers_to(engine_of(model, 7), questions(), asking, StoppedFile(stopped, about))
    kept = AnswersFile(stopped, about)
    assert len(kept.answers) == 8 and open(stopped).read().endswith("}\n")
    made = []
    monkeypatch.setattr(kept, "add", lambda *new: made.append(new[:2]) or AnswersFile.add(kept, *new))
    assert answers_to(engine_of(model, 5), questions(), asking, kept) == want
    assert len(made) == 5 * 3 - 8, "what was there is not asked again"
    assert open(stopped).read() == open(whole).read()
    # more samples go on, too
    more = Asking(5, sampling=WARM, samples=4)
    got = answers_to(engine_of(model, 7), questions(), more, AnswersFile(stopped, about))
    assert [answers[:3] for answers in got] == want and len({answers[3] for answers in got}) > 2


@pytest.mark.parametrize(
    "content,message",
    [
        ('{"evaluation": {"model": "m", "seed": 1}}\n', "its seed is 1, and here it is 0; give another name"),
        ('{"evaluation": {"model": "other", "seed": 0}}\n', 'its model is "other", and here it is "m"'),
        ('{"answer": "7"}\n', "no file of answers that --save began .a line has no 'evaluation'"),
        ("no JSON\n", "no file of answers that --save began .Expecting value"),
    ],
)
def test_a_file_of_another_evaluation_is_left_alone(tmp_path, content, message):
    path = tmp_path / "answers.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        AnswersFile(str(path), {"model": "m", "seed": 0})
    assert path.read_text() == content


def test_a_batch_fits_into_the_memory(model, monkeypatch):
    weights = sum(p.nbytes for p in model.parameters())
    arch = model.arch
    state = arch.n_layer * (arch.n_head * arch.head_size**2 * 4 + 2 * 32 * 8)
    monkeypatch.setattr(answering, "free_memory", lambda accelerator: weights + 60 * state)
    assert rows_for(model, 1000) == 10 and rows_for(model, 7) == 7 and rows_for(model, 1000, 20) == 20
    with pytest.raises(UserError, match="--batch 21: the states of 21 answers take .* or give at most 20"):
        engine_for(model, BYTES, 1000, 21)
    monkeypatch.setattr(answering, "free_memory", lambda accelerator: 1 << 40)
    assert rows_for(model, 1000) == 32
    monkeypatch.setattr(answering, "free_memory", lambda accelerator: 0)
    assert rows_for(model, 1000) == 1


def test_an_answer_in_utf16_ends_at_a_whole_unit():
    """The end of document, U+0000, and not two zeros of neighbouring characters."""
    tokenizer = load_tokenizer("utf16", 256)
    tokens = [*tokenizer.encode("aĀb"), *tokenizer.eod, *tokenizer.encode("more")]
    assert asked(tokenizer, tokens, Question(["q"], ""), Asking(20)) == ("aĀb", False)


@pytest.mark.parametrize("limit,cut", [(6, False), (4, True)])
def test_who_reaches_the_limit_is_cut_and_who_ends_there_is_not(limit, cut):
    tokenizer = load_tokenizer("utf16", 256)
    tokens = [*tokenizer.encode("ab"), *tokenizer.eod]
    assert asked(tokenizer, tokens, Question(["q"], "ab"), Asking(limit)) == SavedAnswer("ab", cut)


def test_a_sample_answer_is_cut_between_characters():
    """🎉 takes four of the tokens: neither a limit of tokens nor one of characters leaves a part of it."""
    tokens = [*"ab🎉🎉🎉".encode(), *BYTES.eod]

    def sample(limit, characters):
        left = iter(tokens)
        answer = said(left, Request([65], limit, characters=characters))
        return shortened(answer.text, characters, answer.finish == "length"), len(list(left))

    assert sample(99, 300) == ("ab🎉🎉🎉", 0)
    assert sample(99, 3) == ("ab…", 5), "what is not shown is not made"
    assert sample(9, 300)[0] == "ab🎉…" and sample(10, 300)[0] == "ab🎉🎉…"


@pytest.mark.parametrize(
    "question,text",
    [
        (Question(["q"], "4", " <think"), ">\nhm\n</think>\n4"),
        (Question(["q <think"], "4", "<think"), ">\nhm\n</think>\n4"),
        (Question(["q"], "4"), "4"),
    ],
    ids=["by the template", "a prompt that begins thoughts", "a prompt as it stands"],
)
def test_an_answer_begins_with_what_its_prompt_opened(question, text):
    tokens = [*BYTES.encode(text), *BYTES.eod]
    assert asked(BYTES, tokens, question, Asking(99, load_template("think"))) == ("4", False)


def test_a_model_that_overflows_is_named(model):
    broken = RWKV(model.arch).double().eval().requires_grad_(False)
    broken.load_state_dict({name: t * float("nan") for name, t in model.state_dict().items()})
    with pytest.raises(UserError, match="the model overflows"):
        answers_to(engine_of(broken, 2), questions(3), Asking(5))


# the questions


def test_questions_are_conversations_and_the_right_answer_is_without_thoughts(tmp_path):
    rows = tmp_path / "rows.jsonl"
    turns = [
        {"role": "user", "content": "2+2"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n 4 "},
    ]
    rows.write_text(json.dumps({"messages": turns}) + '\n{"question": "q", "answer": "a"}\n')
    assert read_questions(rows) == [
        (["User: 2+2\n\nAssistant:"], "4", ""),
        (["User: q\n\nAssistant:"], "a", ""),
    ]
    rows.write_text('{"this": "q", "that": "a"}\n')
    with pytest.raises(UserError, match="--sft_field"):
        read_questions(rows)
    assert read_questions(rows, reading=Reading(("this", "that"))) == [(["User: q\n\nAssistant:"], "a", "")]
    assert read_questions(rows, load_template("think"), Reading(("this", "that")))[0].opening == " <think"
    rows.write_text('{"prompt": "q,", "completion": " a"}\n{"prompt": "q: <think>", "completion": "a"}\n')
    # which stand as they are, whatever the template
    assert read_questions(rows, load_template("think")) == [
        (["q,"], "a", ""),
        (["q: <think>"], "a", "<think>"),
    ]
    rows.write_text('{"text": "q"}\n')
    with pytest.raises(
        UserError,
        match=(
            "rows.jsonl, line 1: expected messages, a question and its answer, or a prompt and its"
            " completion; got text"
        ),
    ):
        read_questions(rows)


def test_a_right_answer_that_the_tokenizer_has_no_tokens_for_ends_no_evaluation(tmp_path):
    """A vocabulary of its own may lack the space before an answer, or a character of it."""
    vocabulary = tmp_path / "letters.txt"
    vocabulary.write_text("".join(f"{i} {c!r} 1\n" for i, c in enumerate("abcehlo ", 1)))
    tokenizer = load_tokenizer(str(vocabulary), 67)
    with pytest.raises(UserError, match="has no token for"):
        tokenizer.encode("a/b")
    made = [Question(["hello"], "a/b"), Question(["hello"], "a")]
    assert answer_limit("exact", tokenizer, made) == 3 + 16
    assert first_answers(tokenizer, made) == [] and len(first_answers(tokenizer, made[1:])) == 1


def test_the_limit_follows_the_task():
    tokenizer = load_tokenizer("utf16", 256)
    made = [Question(["q"], "four"), Question(["q"], "x" * 40)]
    assert answer_limit("exact", tokenizer, made) == 80 + 20 + 16
    assert [answer_limit(score, tokenizer, made) for score in ("number", "boxed", "code")] == [512, 512, 1024]
    thinking = [question._replace(opening=load_template("think").opening) for question in made]
    assert {answer_limit(score, tokenizer, thinking) for score in ("exact", "number", "code")} == {2048}
    closed = [question._replace(opening=load_template("fake-think").opening) for question in made]
    assert answer_limit("number", tokenizer, closed) == 512
