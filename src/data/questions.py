"""Questions with their right answers, out of files, and how long an answer may be."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from rwkv_miss.errors import UserError

from .chat_template import BEGUN_THOUGHTS, Template, begins_thoughts, thoughts_of
from .formats import BY_NAME, Reading, read_records
from .leading_token import with_leading
from .rwkv_template import DEFAULT
from .templates import answer_text
from .tokenizer import Tokenizer

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

    def ids(self, tokenizer: Tokenizer, bos: tuple[int, ...] = ()) -> list[int]:
        """The tokens of the prompt, after its leading token."""
        tokens: list[int] = []
        for piece in self.pieces:
            tokens += tokenizer.encode(piece)
        return with_leading(tokens, bos)


def read_questions(
    path: str | os.PathLike, template: Template = DEFAULT, reading: Reading = BY_NAME
) -> list[Question]:
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


def answer_limit(score: str, tokenizer: Tokenizer, questions: Sequence[Question]) -> int:
    """The tokens that an answer may have where the user does not say.

    For `exact` the longest right answer, a quarter more, and 16: a longer answer is wrong anyway.
    """
    if any(begins_thoughts(question.opening) for question in questions):
        return THOUGHTS
    if score in LIMITS:
        return LIMITS[score]
    longest = max((_length(tokenizer, question.right) for question in questions), default=0)
    return longest + longest // 4 + 16


def _length(tokenizer: Tokenizer, text: str) -> int:
    """Tokens of a text. Where the tokenizer has no tokens for it, no answer can be right; then its bytes."""
    try:
        return len(tokenizer.encode(text))
    except UserError:
        return len(text.encode())
