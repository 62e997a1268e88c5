"""Exact-answer accuracy: greedy answers of many prompts at once."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from rwkv_miss.errors import UserError
from rwkv_miss.progress import Progress

from .formats import BY_NAME, Reading, read_rows
from .model import RWKV, LayerState, State
from .template import DEFAULT, Template, answer_text, thoughts_of

BEGUN_THOUGHTS = re.compile(r"<think>?\s*(?:</think>?\s*)?$")  # at the end of a prompt
THOUGHTS = 2048  # tokens of an answer that begins with thoughts
LIMITS = {"number": 512, "boxed": 512, "code": 1024}  # tokens of an answer, by score


class Question(NamedTuple):
    """What is asked, in the pieces that are tokenised on their own; what is right; what an answer begins with
    though it is not generated (a template's <think)."""

    pieces: list[str]
    right: Any
    opening: str = ""

    @property
    def prompt(self) -> str:
        return "".join(self.pieces)

    def ids(self, tokenizer) -> list[int]:
        """The tokens of the prompt."""
        return [token for piece in self.pieces for token in tokenizer.encode(piece)]


class Answer(NamedTuple):
    """What a model said, and whether it was cut: it had not ended when it reached the limit of tokens."""

    text: str
    cut: bool | None  # None: it is not known, of an answer that was made elsewhere


def read_questions(path, template: Template = DEFAULT, reading: Reading = BY_NAME) -> list[Question]:
    """A question, with the right answer without its thoughts, of every row {"messages": [..., {"role":
    "assistant", ...}]}; a {"prompt", "completion"} is taken as it stands, whatever the template.

    Raises UserError for data that cannot be read, and for a row that has no answer.
    """
    questions = []
    for where, row in read_rows(path, reading=reading):
        if "prompt" in row:
            begun = BEGUN_THOUGHTS.search(row["prompt"])
            questions.append(Question([row["prompt"]], row["completion"].strip(), begun[0] if begun else ""))
            continue
        if "messages" not in row:
            raise UserError(
                f"{where}: expected messages, a question and its answer, or a prompt and its completion; got"
                f" {' and '.join(row)}"
            )
        *before, answer = row["messages"]
        pieces = [piece for piece, _ in template.segments(before, row.get("tools"), ask=True)]
        questions.append(Question(pieces, thoughts_of(answer)[1], template.opening))
    return questions


@torch.no_grad()
def greedy(
    model: RWKV,
    tokenizer,
    prompts: list[list[int]],
    max_tokens: int,
    batch: int = 256,
    stops: Sequence[str] = (),
    characters: float = math.inf,
    shown: bool = True,
) -> list[Answer]:
    """What the model says after each prompt of tokens, up to the end of document, a text of `stops`, or
    max_tokens; or until it has said more than `characters`.

    `batch` answers are made at a time. A bar counts them where it takes long; of several processes one has
    `shown`.
    """
    answers = [Answer("", False)] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    with Progress("answering", len(prompts), "questions", shown) as bar:
        for start in range(0, len(order), batch):
            going = order[start : start + batch]
            said: dict[int, list[int]] = {i: [] for i in going}
            logits, state = _read(model, [prompts[i] for i in going], bar)
            for count in range(1, max_tokens + 1):
                tokens = logits[:, : tokenizer.vocab_size].argmax(-1)
                for i, token in zip(going, tokens.tolist(), strict=True):
                    said[i].append(token)
                over = [_is_over(said[i], tokenizer, stops, characters) for i in going]
                left = [row for row, is_over in enumerate(over) if not is_over]
                bar.update(len(going) - len(left), f"token {count:,} of at most {max_tokens:,}")
                if len(left) < len(going):  # what is complete costs nothing more
                    rows = torch.tensor(left, dtype=torch.int64, device=tokens.device)
                    going, tokens = [going[row] for row in left], tokens[rows]
                    state = [LayerState(*(part[rows] for part in layer)) for layer in state]
                if not going:
                    break
                logits, state = model.next_logits(tokens[:, None], state)
            bar.update(len(going))
            for i, ids in said.items():
                text = tokenizer.decode(_before_end(ids, tokenizer.eod))
                end = min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))
                answers[i] = Answer(text[:end], i in going)
    return answers


def _is_over(ids: list[int], tokenizer, stops: Sequence[str], characters: float) -> bool:
    """Whether the last of these ids ends the text."""
    size = len(tokenizer.eod)
    if len(ids) % size:
        return False  # in the middle of a unit of utf16
    if tuple(ids[-size:]) == tokenizer.eod:
        return True
    if characters < math.inf and len(tokenizer.decode(ids)) > characters:
        return True
    # every token has a byte of its own, so that a stop is in as many of them at most; a decoder may leave out
    # a space that it begins with
    tail = (
        ids[-max((len(stop.encode(tokenizer.encoding)) + 2 * size for stop in stops), default=0) :]
        if stops
        else []
    )
    return bool(tail) and any(stop in tokenizer.decode(tail) for stop in stops)


def shortened(text: str, characters: int) -> str:
    """A text of at most so many characters, of which the last is "…" where it was longer; without half a
    character that a limit of tokens has left at its end."""
    whole = text.rstrip("\ufffd")
    return text if len(text) <= characters and whole == text else f"{whole[: characters - 1]}…"


def _read(model: RWKV, prompts: list[list[int]], bar: Progress) -> tuple[torch.Tensor, State]:
    """Logits (B, V) after each prompt, and the states: prompts of one length are read together, without
    padding.
    """
    device = model.emb.weight.device
    read = []
    for _, same in itertools.groupby(prompts, key=len):
        read.append(model.next_logits(torch.tensor(list(same), device=device)))
        bar.update(0, "reading the prompts")
    logits, states = zip(*read, strict=True)
    return torch.cat(logits), [
        LayerState(*map(torch.cat, zip(*layers, strict=True))) for layers in zip(*states, strict=True)
    ]


def _before_end(ids: list[int], eod: tuple[int, ...]) -> list[int]:
    size = len(eod)
    end = next((i for i in range(0, len(ids), size) if tuple(ids[i : i + size]) == eod), len(ids))
    return ids[:end]


def answers_to(
    model: RWKV,
    tokenizer,
    questions: Sequence[Question],
    max_tokens: int,
    template: Template = DEFAULT,
    batch: int = 256,
) -> list[Answer]:
    """What the model answers to each question, without thoughts; the same template has made the questions."""
    prompts = [question.ids(tokenizer) for question in questions]
    stops = [template.stop] if template.stop else []
    answers = greedy(model, tokenizer, prompts, max_tokens, batch, stops)
    return [
        Answer(answer_text(answer.text, template, question.opening), answer.cut)
        for answer, question in zip(answers, questions, strict=True)
    ]


def exact_accuracy(
    model: RWKV, tokenizer, questions: Sequence[Question], max_tokens: int, template: Template = DEFAULT
) -> tuple[float, list[str]]:
    """(share of answers that are right as a whole, the answers); `questions` are read_questions() with the
    same template.
    """
    answers = [answer.text for answer in answers_to(model, tokenizer, questions, max_tokens, template)]
    return sum(a == q.right for a, q in zip(answers, questions, strict=True)) / len(questions), answers


def answer_limit(score: str, tokenizer, questions: Sequence[Question]) -> int:
    """The tokens that an answer may have where the user does not say.

    `exact`: those of the longest right answer, a quarter more and 16. A longer answer is wrong anyway.
    """
    if any("<think" in question.opening and "</think" not in question.opening for question in questions):
        return THOUGHTS
    if score in LIMITS:
        return LIMITS[score]
    longest = max((_length(tokenizer, question.right) for question in questions), default=0)
    return longest + longest // 4 + 16


def _length(tokenizer, text: str) -> int:
    """Tokens of a text; its bytes where the tokenizer has no tokens for it, and no answer can be right."""
    try:
        return len(tokenizer.encode(text))
    except UserError:
        return len(text.encode())
