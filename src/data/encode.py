"""Encoding of a record to tokens, each with its weight in the loss."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import numpy as np

from rwkv_miss.errors import UserError

from .bos import begins_with
from .chat_template import Segment, Template
from .encode_answers import answers_segments, compared
from .formats import EMPTY, LeftOut, WrongSetting, has_empty_answer
from .loss_mask import marked_spans, record_segments, trains_by_marker
from .rwkv_template import DEFAULT
from .thoughts import thought_spans, within
from .tokenizer import Tokenizer

BLOCK = 1 << 20  # weights that are looked at together


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Tokens of n documents one after another, N in all."""

    ids: np.ndarray  # (N,) int32
    weights: np.ndarray  # (N,) float32, 0 where there is no loss
    ends: np.ndarray  # (n,) int64: where each document ends
    texts: np.ndarray  # running text, and not a conversation
    begins: np.ndarray  # the first document of its record
    labels: np.ndarray  # (n,) int8: 1 an answer that is preferred, -1 one that is not, 0 no such document
    places: np.ndarray  # (n,) int32: the number of its record's line or row

    @property
    def records(self) -> int:
        return int(np.count_nonzero(self.begins))

    @functools.cached_property
    def is_mask(self) -> bool:
        """Tell whether all weights are 0 or 1."""
        blocks = (self.weights[at : at + BLOCK] for at in range(0, len(self.weights), BLOCK))
        return all(((block == 0) | (block == 1)).all() for block in blocks)

    def documents_of(self, records: np.ndarray) -> np.ndarray:
        """Return the places of the documents of these records, which are numbers from 0 on."""
        firsts = np.flatnonzero(self.begins)
        if len(firsts) == len(self.begins):
            return records
        counts = np.diff(firsts, append=len(self.begins))[records]
        number_in_record = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return np.repeat(firsts[records], counts) + number_in_record


# dtypes of the fields of Tokens
DTYPES = {
    "ids": np.int32,
    "weights": np.float32,
    "ends": np.int64,
    "texts": bool,
    "begins": bool,
    "labels": np.int8,
    "places": np.int32,
}


def tokens_of(
    documents: list[tuple[np.ndarray, np.ndarray]],
    texts: list[bool],
    begins: list[bool],
    labels: list[int],
    places: list[int],
) -> Tokens:
    """Make Tokens of documents (ids, weights) and the values of each."""
    return Tokens(
        np.concatenate([np.zeros(0, np.int32), *(ids for ids, _ in documents)]),
        np.concatenate([np.zeros(0, np.float32), *(weights for _, weights in documents)]),
        np.cumsum([len(ids) for ids, _ in documents], dtype=np.int64),
        np.array(texts, bool),
        np.array(begins, bool),
        np.array(labels, np.int8),
        np.array(places, np.int32),
    )


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Encoder of records to tokens.

    `loss_mask` is that of record_segments(). `bos` are the ids that every document begins with, as
    bos_ids() gives them.
    """

    tokenizer: Tokenizer
    template: Template = DEFAULT
    loss_mask: str = "assistant"
    bos: tuple[int, ...] = ()
    think_weight: float = 1.0  # multiplies the weight of what stands inside <think>
    prompt_weight: float = 0.0  # loss weight of prompts; answers that are only context stay at 0

    def encode(self, record: dict) -> list[tuple[np.ndarray, np.ndarray]]:
        """Encode a record: (ids (n,) int32, weights (n,) float32) of each document, from first to last token.

        The BOS never has a weight, the end of document always. Most records are one document (see
        record_segments).

        Raises UserError for a record that the template or the tokenizer cannot express, and LeftOut for one
        that teaches nothing.
        """
        if "ids" in record:
            ids = np.asarray(record["ids"], dtype=np.int32)
            if ids.max(initial=0) >= self.tokenizer.vocab_size:
                raise WrongSetting(
                    f"id {ids.max()} is not in the vocabulary of tokenizer {self.tokenizer.name}, whose size"
                    f" is {self.tokenizer.vocab_size}: another one made these data; give it as --tokenizer if"
                    " the model was trained with it (world has ids up to 65529), else make the data again,"
                    " from text"
                )
            weights, is_answer = self._weights_of_ids(ids)
            return [self._whole(ids, weights, is_answer)]
        if "chosen" in record or "label" in record:
            segments = answers_segments(record, self.template, self.token_end)
            return compared([self.encode_segments(of_one) for of_one in segments], self.template.name)
        if has_empty_answer(record):
            raise LeftOut(EMPTY)
        documents = record_segments(record, self.template, self.loss_mask, self.token_end)
        return [self.encode_segments(segments) for segments in documents]

    def is_text(self, record: dict) -> bool:
        """Tell whether the record is running text: any part of it makes sense by itself."""
        return ("text" in record or "ids" in record) and not trains_by_marker(self.loss_mask)

    def token_end(self, text: str, place: int) -> int:
        """Return chat_template.TokenEnd's place. It is `place` for a tokenizer that changes the text."""
        ids = self.tokenizer.encode(text)
        rest = len(self.tokenizer.encode(text[place:])) + 8  # tokens that may reach over the place
        for count in range(len(ids), max(0, len(ids) - rest), -1):
            beginning = self.tokenizer.decode(ids[:count])
            fits = len(beginning) <= place and text.startswith(beginning)
            if fits and self.tokenizer.encode(beginning) == ids[:count]:
                return len(beginning)
        return place

    def encode_segments(self, segments: list[Segment]) -> tuple[np.ndarray, np.ndarray]:
        """Encode pieces that are tokenised one by one."""
        pieces = [self.tokenizer.encode(segment.text) for segment in segments]
        ids = np.array(list(itertools.chain.from_iterable(pieces)), dtype=np.int32)
        befores = ["", *(segment.text for segment in segments)]
        parts = [self._weights(*of_one) for of_one in zip(befores, segments, pieces)]
        weights = np.concatenate([np.zeros(0, np.float32), *parts])
        return self._whole(ids, weights, bool(segments and segments[-1].weight))

    def answers(self, weights: np.ndarray) -> np.ndarray:
        """Find the answers in a document, (n,) bool: their weight differs from that of prompts. Without
        any, all trained tokens count."""
        found = (weights != 0) & (weights != np.float32(self.prompt_weight))
        return found if found.any() else weights != 0

    def _weights(self, before: str, segment: Segment, ids: list[int]) -> np.ndarray:
        """Weigh a segment's tokens; the text `before` it may open a <think>."""
        weight = segment.weight
        if weight == 0 and math.copysign(1, weight) > 0:  # not CONTEXT
            return np.full(len(ids), self.prompt_weight, np.float32)
        weights = np.full(len(ids), abs(weight), np.float32)
        if weight and self.think_weight != 1:
            if spans := thought_spans(before, segment.text):
                weights[self.tokenizer.inside(segment.text, ids, spans)] *= self.think_weight
        return weights

    def _whole(self, ids: np.ndarray, weights: np.ndarray, is_answer: bool) -> tuple[np.ndarray, np.ndarray]:
        """Complete the document of these tokens; `is_answer`: the last one belongs to an answer."""
        end = np.array(self.tokenizer.eod, dtype=np.int32)
        # files of tokens have the end already, and some templates write it
        if not np.array_equal(ids[-len(end) :], end):
            ids = np.concatenate([ids, end])
            # the end of an answer weighs as much as the answer's last token
            weights = np.concatenate(
                [weights, np.full(len(end), weights[-1] if is_answer else 1, np.float32)]
            )
        ending = weights[-len(end) :]
        ending[(ending == 0) | (not is_answer)] = 1
        bos = np.array(self.bos, dtype=np.int32)
        if not begins_with(ids, self.bos):
            ids = np.concatenate([bos, ids])
            weights = np.concatenate([np.zeros(len(bos), dtype=np.float32), weights])
        weights[: len(bos)] = 0
        return ids, weights

    def _weights_of_ids(self, ids: np.ndarray) -> tuple[np.ndarray, bool]:
        """Weigh tokens of an encoded file: (the weights, whether the last one is trained).

        A marker trains the tokens that begin in its text.
        """
        weights, is_answer = np.ones(len(ids), dtype=np.float32), len(ids) > 0
        if trains_by_marker(self.loss_mask):
            text, ends = self._bytes_of(ids, f"--loss_mask {self.loss_mask!r}")
            begins, trained = np.append(0, ends)[:-1], np.zeros(len(ids), dtype=bool)
            # bytes as characters, so that the places are those of bytes
            for begin, end in marked_spans(
                text, self.loss_mask, lambda text: text.encode().decode("latin-1")
            ):
                trained |= (begins >= begin) & (begins < end)
            weights = np.where(trained, weights, np.float32(self.prompt_weight))
            is_answer = bool(trained[-1:].any())
        if self.think_weight != 1:
            text, ends = self._bytes_of(ids, f"--think_weight {self.think_weight:g}")
            weights[within(np.append(0, ends)[:-1], ends, thought_spans("", text))] *= self.think_weight
        return weights, is_answer

    def _bytes_of(self, ids: np.ndarray, flag: str) -> tuple[str, np.ndarray]:
        """Return (the text of tokens, a character for each byte; where each token ends in it (n,))."""
        if self.tokenizer.encoding != "utf-8" or not hasattr(self.tokenizer, "table"):
            raise UserError(
                f"{flag} is looked for in text, and tokenizer {self.tokenizer.name} does not tell which text"
                " a token stands for; give the data as text, or --loss_mask all without --think_weight"
            )
        pieces = [self.tokenizer.table.get(token, b"") for token in ids.tolist()]
        return b"".join(pieces).decode("latin-1"), np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
