"""Encoding of answers: a pair becomes two documents, a labelled answer one, with only the answers trained."""

from __future__ import annotations

from typing import Any

import numpy as np

from rwkv_miss.errors import UserError

from .chat_template import Segment, Template, TokenEnd
from .formats import LeftOut

EQUAL = "both answers are the same"
Document = tuple[np.ndarray, np.ndarray]  # ids (n,) int32, weights (n,) float32


def labels_of(record: dict[str, Any], documents: int) -> list[int]:
    """Return Tokens.labels of a record's documents."""
    if "chosen" in record:
        return [1, -1]
    if "label" in record:
        return [1 if record["label"] else -1]
    return [0] * documents


def answers_segments(record: dict[str, Any], template: Template, token_end: TokenEnd) -> list[list[Segment]]:
    """Cut a pair (chosen, then rejected) or a labelled answer into the segments of its documents."""
    names = ("completion",) if "label" in record else ("chosen", "rejected")
    return [_segments(record, record[name], template, token_end) for name in names]


def conversations(record: dict[str, Any]) -> list[tuple[list[dict], list[dict]]]:
    """Yield (turns that are only context, the turns after them) of each conversation in a record."""
    if "messages" not in record:
        return []
    answers = [record[name] for name in ("chosen", "rejected", "completion") if name in record]
    return [(record["messages"], turns) for turns in answers] or [([], record["messages"])]


def _segments(record: dict[str, Any], answer: Any, template: Template, token_end: TokenEnd) -> list[Segment]:
    """Cut prompt and answer into segments."""
    if "prompt" in record:
        return [Segment(record["prompt"], 0.0), Segment(answer, 1.0)]
    # earlier turns of the assistant are only context for both answers
    before = [{**turn, "weight": 0} if turn["role"] == "assistant" else turn for turn in record["messages"]]
    *earlier, last = template.documents([*before, *answer], record.get("tools"), token_end)
    if any(segment.weight for document in earlier for segment in document):
        raise UserError(
            f"{template.name} writes the turns of this answer differently when more turns follow, so that"
            " they are not one document; give its last message alone, and the others in messages"
        )
    return last


def compared(documents: list[Document], template: str) -> list[Document]:
    """Weigh the documents of a pair or a labelled answer: 1 on the compared tokens and 0 elsewhere.

    The documents of a pair have the same tokens before the first trained one. A template may write more
    before one answer than before the other, such as an opened <think>. That then belongs to the answers.
    Raises LeftOut for two equal answers.
    """
    documents = [(ids, (weights != 0).astype(np.float32)) for ids, weights in documents]
    if len(documents) == 1:
        return documents
    (chosen, _), (rejected, _) = documents
    if np.array_equal(chosen, rejected):
        raise LeftOut(EQUAL)
    begins = [int(np.argmax(weights)) for _, weights in documents]
    if not np.array_equal(chosen[: min(begins)], rejected[: min(begins)]):
        raise UserError(
            f"{template} writes the messages before the answer differently for the chosen and the rejected"
            " one, so that they can't be compared; choose another --template"
        )
    for begin, (_, weights) in zip(begins, documents):
        weights[min(begins) : begin] = 1
    return documents
