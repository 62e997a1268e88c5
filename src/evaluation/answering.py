"""Answers of a model to many questions, through the engine (inference/engine.py)."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection, Iterator, Sequence

import numpy as np

from rwkv_miss.errors import UserError
from rwkv_miss.progress import Progress

from ..common.available_memory import free_memory
from ..data.chat_template import Template
from ..data.questions import Question
from ..data.rwkv_template import DEFAULT
from ..data.templates import answer_text
from ..data.tokenizer import Tokenizer
from ..inference.decoders import fastest
from ..inference.engine import Engine
from ..inference.request import Answer, Request
from ..inference.sampling import GREEDY, Sampling
from ..model import RWKV
from ..model.batch_loss import state_bytes
from .answers_file import AnswersFile, SavedAnswer

# Rows of the engine. A CPU computes at its peak from 16 rows on, and more rows read more states. A GPU's
# weights take as long for 256 rows as for one.
ROWS = {"cpu": 32, "gpu": 256}
STATES = 3  # states of a row during a step: the old one, the new one, and a copy in between


@dataclasses.dataclass(frozen=True)
class Asking:
    """Settings of asking questions. The template is the one that they are written in."""

    max_tokens: int
    template: Template = DEFAULT
    bos: tuple[int, ...] = ()  # the ids that every prompt begins with
    sampling: Sampling = GREEDY
    samples: int = 1  # answers to each question
    seed: int = 0


def rows_for(model: RWKV, answers: int, batch: int | None = None) -> int:
    """Choose how many of `answers` are made at once: `batch`, else what ROWS and half of the memory allow.

    Raises UserError if the states of `batch` answers do not fit into the memory.
    """
    accelerator = "gpu" if model.emb.weight.is_cuda else "cpu"
    rows = min(answers, batch or ROWS[accelerator])
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    left = free_memory(accelerator) - weights
    a_row = STATES * state_bytes(model.arch, 1, model.dtype.itemsize)
    if batch and rows * a_row > left:
        raise UserError(
            f"--batch {batch}: the states of {rows} answers take {rows * a_row / 1e9:.1f} GB, and"
            f" {max(left, 0) / 1e9:.1f} GB of memory are free next to the model; leave it out, or give at"
            f" most {max(left // a_row, 1)}"
        )
    return rows if batch else max(1, min(rows, left // 2 // a_row))


def seed_of(seed: int, place: int) -> int:
    """Return the seed for the question in this place; the engine derives one for each answer."""
    return int(np.random.SeedSequence([seed, place]).generate_state(1, np.uint64)[0])


def engine_for(model: RWKV, tokenizer: Tokenizer, answers: int, batch: int | None = None) -> Engine:
    """Make an engine for `answers` answers, of which rows_for() are made at once."""
    decoder, _ = fastest(model, rows=rows_for(model, answers, batch))
    return Engine(decoder, tokenizer)


def answers_to(
    engine: Engine, questions: Sequence[Question], asking: Asking, file: AnswersFile | None = None
) -> list[list[SavedAnswer]]:
    """Ask the model each question: asking.samples answers each, without thoughts.

    An answer depends on its question, its place in the list, the number of the sample and asking.seed, and
    not on the other rows. Answers that `file` has are not asked for again; new ones are added to it.
    """
    keys = [(i, sample) for i in range(len(questions)) for sample in range(asking.samples)]
    answers = {key: file.answers[key] for key in keys if key in file.answers} if file else {}
    open_ones = sorted({i for i, sample in keys if (i, sample) not in answers})
    requests = [
        Request(
            questions[i].ids(engine.tokenizer, asking.bos),
            asking.max_tokens,
            asking.sampling,
            seed_of(asking.seed, i),
            asking.template.stops,
            n=asking.samples,
        )
        for i in open_ones
    ]
    places = {i: place for place, i in enumerate(open_ones)}
    answered = {(places[i], sample) for i, sample in answers if i in places}
    with Progress("answering", len(keys), "answers", done=len(answers)) as bar:
        for place, answer in completed(engine, requests, bar, answered):
            question, key = questions[open_ones[place]], (open_ones[place], answer.index)
            text = answer_text(answer.text, asking.template, question.opening)
            answers[key] = SavedAnswer(text, answer.cut)
            if file:
                file.add(*key, question.prompt, answers[key])
    if file:
        file.finish()
    return [[answers[i, sample] for sample in range(asking.samples)] for i in range(len(questions))]


def completed(
    engine: Engine, requests: Sequence[Request], bar: Progress, known: Collection[tuple[int, int]] = ()
) -> Iterator[tuple[int, Answer]]:
    """Yield (place of the request, one of its answers) as soon as it is complete. The bar counts answers.

    `known` are (place, index) of answers that are not needed. Raises UserError if the model overflows.
    """
    places: dict[Answer, int] = {}
    for place, request in enumerate(requests):
        for answer in engine.submit(request):
            places[answer] = place
            if (place, answer.index) in known:
                engine.cancel(answer)
    tokens, begun = 0, time.monotonic()
    while not engine.idle:
        for answer in engine.step():
            tokens += 1
            if answer.error:
                raise answer.error
            if answer.finish:
                bar.update(1)
                yield places.pop(answer), answer
        bar.update(0, f"{tokens / max(time.monotonic() - begun, 1e-9):,.0f} tokens/s")


def exact_accuracy(
    model: RWKV, tokenizer: Tokenizer, questions: Sequence[Question], asking: Asking
) -> tuple[float, list[str]]:
    """Return (share of answers that are right as a whole, the answers)."""
    drawn = answers_to(engine_for(model, tokenizer, len(questions)), questions, asking)
    answers = [answer.text for answer, *_ in drawn]
    right = sum(answer == question.answer for answer, question in zip(answers, questions, strict=True))
    return right / len(questions), answers
