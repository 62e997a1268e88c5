"""A record becomes tokens, each with its weight in the loss."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np

from rwkv_miss.errors import UserError

from .chat_template import Segment, Template
from .formats import WrongSetting
from .leading_token import begins
from .loss_mask import marked_spans, record_segments, trains_by_marker
from .rwkv_template import DEFAULT
from .tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Tokens:
    """n documents one after another, N tokens in all."""

    ids: np.ndarray  # (N,) int32
    weights: np.ndarray  # (N,) float32, 0 where there is no loss
    ends: np.ndarray  # (n,) int64: where each document ends
    texts: np.ndarray  # (n,) bool: whether it is running text and not a conversation
    begins: np.ndarray  # (n,) bool: whether it is the first document of its record

    @property
    def records(self) -> int:
        return int(np.count_nonzero(self.begins))

    def documents_of(self, records: np.ndarray) -> np.ndarray:
        """The places of the documents of these records, which are numbers from 0 on."""
        firsts = np.flatnonzero(self.begins)
        if len(firsts) == len(self.begins):
            return records
        counts = np.diff(firsts, append=len(self.begins))[records]
        number_in_record = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return np.repeat(firsts[records], counts) + number_in_record


@dataclasses.dataclass(frozen=True)
class Encoder:
    """How a record becomes tokens.

    `loss_mask` is that of record_segments(). `bos` are the ids that every document begins with, as
    leading_token() gives them.
    """

    tokenizer: Tokenizer
    template: Template = DEFAULT
    loss_mask: str = "assistant"
    bos: tuple[int, ...] = ()

    def encode(self, record: dict) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids (n,) int32, weights (n,) float32) of each document, with its leading and its last token.

        The leading token never has a weight, the end of document always. Most records are one document (see
        record_segments).

        Raises UserError for a record that the template or the tokenizer cannot express.
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
            weights = np.ones(len(ids), dtype=np.float32)
            if trains_by_marker(self.loss_mask):
                weights = self._marked(ids).astype(np.float32)
            return [self._whole(ids, weights)]
        documents = record_segments(record, self.template, self.loss_mask, self.token_end)
        return [self.encode_segments(segments) for segments in documents]

    def is_text(self, record: dict) -> bool:
        """Whether the record is running text, any part of which makes sense by itself, not a conversation."""
        return ("text" in record or "ids" in record) and not trains_by_marker(self.loss_mask)

    def token_end(self, text: str, place: int) -> int:
        """See chat_template.TokenEnd. It is `place` for a tokenizer that changes the text."""
        ids = self.tokenizer.encode(text)
        rest = len(self.tokenizer.encode(text[place:])) + 8  # tokens that may reach over the place
        for count in range(len(ids), max(0, len(ids) - rest), -1):
            beginning = self.tokenizer.decode(ids[:count])
            fits = len(beginning) <= place and text.startswith(beginning)
            if fits and self.tokenizer.encode(beginning) == ids[:count]:
                return len(beginning)
        return place

    def encode_segments(self, segments: list[Segment]) -> tuple[np.ndarray, np.ndarray]:
        """encode() of pieces that are tokenised one by one."""
        pieces = [self.tokenizer.encode(segment.text) for segment in segments]
        ids = np.array(list(itertools.chain.from_iterable(pieces)), dtype=np.int32)
        weights = np.array([segment.weight for segment in segments], dtype=np.float32)
        return self._whole(ids, np.repeat(weights, [len(piece) for piece in pieces]))

    def _whole(self, ids: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        end = np.array(self.tokenizer.eod, dtype=np.int32)
        # files of tokens have it already, and so do templates that write it
        if not np.array_equal(ids[-len(end) :], end):
            ids = np.concatenate([ids, end])
            # it ends the last piece, so it weighs as much
            weights = np.concatenate([weights, np.repeat(weights[-1:], len(end))])
        ending = weights[-len(end) :]
        ending[ending == 0] = 1
        bos = np.array(self.bos, dtype=np.int32)
        if not begins(ids, self.bos):
            ids = np.concatenate([bos, ids])
            weights = np.concatenate([np.zeros(len(bos), dtype=np.float32), weights])
        weights[: len(bos)] = 0
        return ids, weights

    def _marked(self, ids: np.ndarray) -> np.ndarray:
        """The mask of a marker on tokens as they are: those that begin in what it trains."""
        if self.tokenizer.encoding != "utf-8" or not hasattr(self.tokenizer, "table"):
            raise UserError(
                f"--loss_mask {self.loss_mask!r} is looked for in text, and tokenizer {self.tokenizer.name}"
                " does not tell which text a token stands for; give the data as text, or --loss_mask all"
            )
        pieces = [self.tokenizer.table.get(token, b"") for token in ids.tolist()]
        begins = np.cumsum([0, *map(len, pieces)])[:-1]
        trained = np.zeros(len(ids), dtype=bool)
        # in latin-1 a character is a byte
        text = b"".join(pieces).decode("latin-1")
        marker = self.loss_mask.encode().decode("latin-1")
        for begin, end in marked_spans(text, marker):
            trained |= (begins >= begin) & (begins < end)
        return trained
