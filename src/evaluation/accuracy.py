"""Exact-answer accuracy: greedy answers of many prompts at once."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from rwkv_miss.errors import UserError
from rwkv_miss.progress import Progress

from ..data.chat_template import BEGUN_THOUGHTS, Template, before_stops, begins_thoughts, thoughts_of
from ..data.formats import BY_NAME, Reading, read_records
from ..data.leading_token import with_leading
from ..data.rwkv_template import DEFAULT
from ..data.templates import answer_text
from ..model import RWKV, LayerState, State

THOUGHTS = 2048  # tokens of an answer that begins with thoughts
LIMITS = {"number": 512, "boxed": 512, "math_verify": 512, "code": 1024}  # tokens of an answer, by score


class Question(NamedTuple):
    """What is asked, and what is right."""

    pieces: list[str]  # of the prompt; each is tokenised on its own
    right: Any
    opening: str = ""  # what every answer begins with without being generated: a template's <think

    @property
    def prompt(self) -> str:
        return "".join(self.pieces)

    def ids(self, tokenizer, bos: tuple[int, ...] = ()) -> list[int]:
        """The tokens of the prompt, after its leading token."""
        tokens: list[int] = []
        for piece in self.pieces:
            tokens += tokenizer.encode(piece)
        return with_leading(tokens, bos)


class Answer(NamedTuple):
    """What a model said."""

    text: str
    cut: bool | None  # whether it reached the limit of tokens before its end; None where that is not known


def read_questions(path, template: Template = DEFAULT, reading: Reading = BY_NAME) -> list[Question]:
    """The question of every row.

    Of {"messages"} the last message is the right answer, without its thoughts; tool calls in it count as
    they are written. {"prompt", "completion"} is taken as it stands, whatever the template.

    Raises UserError for data that cannot be read, and for a row that has no answer or no form in the
    template.
    """
    questions = []
    for where, row in read_records(path, reading=reading):
        if "prompt" in row:
            questions.append(_of_prompt(row))
        elif "messages" in row:
            try:
                questions.append(_of_messages(row, template))
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
        else:
            raise UserError(
                f"{where}: expected messages, a question and its answer, or a prompt and its completion; got"
                f" {' and '.join(row)}"
            )
    return questions


def _of_prompt(row: dict[str, Any]) -> Question:
    begun = BEGUN_THOUGHTS.search(row["prompt"])
    return Question([row["prompt"]], row["completion"].strip(), begun[0] if begun else "")


def _of_messages(row: dict[str, Any], template: Template) -> Question:
    *before, answer = row["messages"]
    tools = row.get("tools")
    pieces = [piece for piece, _ in template.segments(before, tools, ask=True)]
    right = thoughts_of(answer)[1]
    if answer.get("tool_calls"):  # the template says how they are written
        prompt = "".join(pieces)
        whole = "".join(piece for piece, _ in template.segments(row["messages"], tools))
        if not whole.startswith(prompt):
            raise UserError(
                f"the template {template.name} asks in other words than it answers in, so the right call"
                " can't be found; give the row as prompt and completion"
            )
        right = answer_text(whole.removeprefix(prompt), template, template.opening)
    return Question(pieces, right, template.opening)


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
    """What the model says after each prompt of tokens.

    An answer ends at the end of document, at a text of `stops`, after max_tokens, or as soon as it has more
    than `characters`. `batch` answers are made at a time. A bar counts them where it takes long; of several
    processes one has `shown`.
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
                    state = _of_rows(state, rows)
                if not going:
                    break
                logits, state = model.next_logits(tokens[:, None], state)
            bar.update(len(going))
            for i, ids in said.items():
                text = tokenizer.decode(_before_end(ids, tokenizer.eod))
                answers[i] = Answer(before_stops(text, stops), i in going)
    return answers


def _of_rows(state: State, rows: torch.Tensor) -> State:
    """The states of some rows of a batch."""
    chosen = []
    for layer in state:
        chosen.append(LayerState(*(part[rows] for part in layer)))
    return chosen


def _is_over(ids: list[int], tokenizer, stops: Sequence[str], characters: float) -> bool:
    """Whether the last of these ids ends the text."""
    size = len(tokenizer.eod)
    if len(ids) % size:
        return False  # in the middle of a unit of utf16
    if tuple(ids[-size:]) == tokenizer.eod:
        return True
    if characters < math.inf and len(tokenizer.decode(ids)) > characters:
        return True
    if not stops:
        return False
    # A token has at least one byte, so a stop has no more tokens than bytes. The decoder may leave out a
    # space that the text begins with, therefore a little more is decoded.
    longest = max(len(stop.encode(tokenizer.encoding)) for stop in stops)
    tail = tokenizer.decode(ids[-(longest + 2 * size) :])
    return any(stop in tail for stop in stops)


def shortened(text: str, characters: int) -> str:
    """A text of at most so many characters. A longer one ends in "…".

    So does a text that ends in half a character, as a limit of tokens leaves it; the half is left out.
    """
    whole = text.rstrip("\ufffd")
    if whole == text and len(text) <= characters:
        return text
    return f"{whole[: characters - 1]}…"


def _read(model: RWKV, prompts: list[list[int]], bar: Progress) -> tuple[torch.Tensor, State]:
    """Logits (B, V) after each prompt, and the states.

    Prompts of one length are read together, without padding.
    """
    device = model.emb.weight.device
    read = []
    for _, same in itertools.groupby(prompts, key=len):
        read.append(model.next_logits(torch.tensor(list(same), device=device)))
        bar.update(0, "reading the prompts")
    logits, states = zip(*read, strict=True)
    # each layer's states of all prompts become one state with a row for each
    state = [LayerState(*map(torch.cat, zip(*layer, strict=True))) for layer in zip(*states, strict=True)]
    return torch.cat(logits), state


def _before_end(ids: list[int], eod: tuple[int, ...]) -> list[int]:
    """The ids before the first end of document."""
    size = len(eod)
    for place in range(0, len(ids), size):
        if tuple(ids[place : place + size]) == eod:
            return ids[:place]
    return ids


def answers_to(
    model: RWKV,
    tokenizer,
    questions: Sequence[Question],
    max_tokens: int,
    template: Template = DEFAULT,
    batch: int = 256,
    bos: tuple[int, ...] = (),
) -> list[Answer]:
    """What the model answers to each question, without thoughts. The template is that of the questions."""
    prompts = [question.ids(tokenizer, bos) for question in questions]
    answers = greedy(model, tokenizer, prompts, max_tokens, batch, template.stops)
    return [
        Answer(answer_text(answer.text, template, question.opening), answer.cut)
        for answer, question in zip(answers, questions, strict=True)
    ]


def exact_accuracy(
    model: RWKV,
    tokenizer,
    questions: Sequence[Question],
    max_tokens: int,
    template: Template = DEFAULT,
    bos: tuple[int, ...] = (),
) -> tuple[float, list[str]]:
    """(share of answers that are right as a whole, the answers). The template is that of the questions."""
    given = answers_to(model, tokenizer, questions, max_tokens, template, bos=bos)
    answers = [answer.text for answer in given]
    right = sum(answer == question.right for answer, question in zip(answers, questions, strict=True))
    return right / len(questions), answers


def answer_limit(score: str, tokenizer, questions: Sequence[Question]) -> int:
    """The tokens that an answer may have where the user does not say.

    For `exact` the longest right answer, a quarter more, and 16: a longer answer is wrong anyway.
    """
    if any(begins_thoughts(question.opening) for question in questions):
        return THOUGHTS
    if score in LIMITS:
        return LIMITS[score]
    longest = max((_length(tokenizer, question.right) for question in questions), default=0)
    return longest + longest // 4 + 16


def _length(tokenizer, text: str) -> int:
    """Tokens of a text. Where the tokenizer has no tokens for it, no answer can be right; then its bytes."""
    try:
        return len(tokenizer.encode(text))
    except UserError:
        return len(text.encode())
