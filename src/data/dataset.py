"""Dataset: documents of the data files, as weighted tokens, in memory or mapped from the cache."""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar, TypeVar

import numpy as np

from rwkv_miss.errors import UserError
from rwkv_miss.progress import progress

from ..common.first_process import is_first_process
from .chat_template import Template
from .collate import collate
from .encode import Encoder, Tokens
from .examples import Examples
from .file_documents import Document, FileDocuments, joined
from .formats import BY_NAME, PAIRS, SFT, Reading, Report, sample, sources
from .loss_mask import trains_by_marker
from .preferences import Preferences, fit_examples
from .rwkv_template import DEFAULT
from .token_cache import tokenise

T = TypeVar("T")


@dataclasses.dataclass
class Documents(Examples):
    """Encoded data set, a sequence of documents. Texts longer than ctx_len are in parts."""

    items: Sequence[Document]
    word: ClassVar[str] = "document"
    by_prompt: ClassVar[bool] = False
    lost: np.ndarray | None = None  # (n,) int32: tokens that were cut off each conversation; None: off none
    # (n,) int32: the number of the long text that a document is a part of, -1 for a whole document; None: all
    # are whole
    text: np.ndarray | None = None
    # (n,) int32: the number of the conversation that became several documents, this one among them; -1 for a
    # whole conversation or text; None: all are
    conversation: np.ndarray | None = None
    untrained: int = 0
    # values of a reference for the trained tokens, see reference_values.py
    reference: np.ndarray | None = None
    reference_starts: np.ndarray | None = None  # (n,) int64: where those of each document begin

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Document:
        document = self.items[i]
        if self.reference is None:
            return document
        start = int(self.reference_starts[i])
        return dataclasses.replace(document, reference=self.reference[start : start + document.targets])

    def with_reference(self, values: np.ndarray) -> Documents:
        """Add the values of a reference for every trained token, (targets,), document by document."""
        documents = copy.copy(self)  # the copy has the counts and hashes that are computed already
        documents.reference = values
        documents.reference_starts = np.cumsum(self.target_counts, dtype=np.int64) - self.target_counts
        return documents

    def line(self, i: int) -> int:
        """Return the line or row of its file that document i comes from."""
        return self.items.line(i)

    def collator(self, chunk: int = 0, shared: bool = False) -> Callable[[list[list], float], dict]:
        dtype = None if self.reference is None else self.reference.dtype
        return functools.partial(collate, chunk=chunk, reference=dtype)

    @property
    def cut(self) -> int:
        return 0 if self.lost is None else int(np.count_nonzero(self.lost))

    @property
    def cut_tokens(self) -> int:
        return 0 if self.lost is None else int(self.lost.sum(dtype=np.int64))

    @property
    def split(self) -> int:
        return 0 if self.text is None else len(np.unique(self.text[self.text >= 0]))

    @property
    def rewritten(self) -> tuple[int, int]:
        if self.conversation is None:
            return 0, 0
        of = self.conversation[self.conversation >= 0]
        return len(np.unique(of)), len(of)

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, (n,) int32."""
        if isinstance(self.items, FileDocuments):
            return self.items.lengths
        return np.array([len(document.ids) for document in self.items], dtype=np.int32)

    @property
    def target_counts(self) -> np.ndarray:
        return self._counted[0]

    @property
    def weight_sums(self) -> np.ndarray:
        """Sums of the weights of each document's trained tokens, (n,) float64; or their numbers as int32,
        if all documents agree."""
        return self._counted[1]

    @functools.cached_property
    def _counted(self) -> tuple[np.ndarray, np.ndarray]:
        if isinstance(self.items, FileDocuments) and self.items.is_mask:
            counts, _ = self.items.trained()
            return counts, counts
        counts, sums = np.empty(len(self.items), np.int32), np.empty(len(self.items))
        for i, document in enumerate(self._watched("counting trained tokens", self.items)):
            counts[i], sums[i] = document.targets, document.weight
        return counts, counts if np.array_equal(counts, sums) else sums

    def take(self, chosen: np.ndarray) -> Documents:
        if isinstance(self.items, FileDocuments):
            items = self.items.take(chosen)
        else:
            items = [self.items[i] for i in chosen]
        columns = ("lost", "text", "conversation", "reference_starts")
        taken = {name: None if (of := getattr(self, name)) is None else of[chosen] for name in columns}
        return dataclasses.replace(self, items=items, **taken)

    def learnable(self) -> Documents:
        """Return the documents with a trained token: a step without one would have no loss."""
        chosen = np.flatnonzero(self.target_counts)
        left_out = len(self.items) - len(chosen)
        if not left_out:
            return self
        return dataclasses.replace(self.take(chosen), untrained=self.untrained + left_out)

    @functools.cached_property
    def digest(self) -> str:
        """Hash the tokens and weights with SHA-256; every save asks for it.

        Weights of 0 and 1 are hashed as one byte each.
        """
        digest, doing = hashlib.sha256(), "hashing the tokens"
        if isinstance(self.items, FileDocuments) and self.items.is_mask:
            for tokens, part in self._watched(doing, self.items.places()):
                digest.update(tokens.ids[part])
                digest.update(tokens.weights[part] != 0)
            return digest.hexdigest()
        for document in self._watched(doing, self.items):
            digest.update(document.ids)
            trained = document.weights != 0
            digest.update(trained if np.array_equal(document.weights, trained) else document.weights)
        return digest.hexdigest()

    def inputs(self) -> Iterable[np.ndarray]:
        return (ids[:-1] for ids in self.contents())

    def contents(self) -> Iterable[np.ndarray]:
        if isinstance(self.items, FileDocuments):
            return (tokens.ids[part] for tokens, part in self.items.places())
        return (document.ids for document in self.items)

    def held_out_by(self) -> Iterable[np.ndarray]:
        """Yield contents(): equal documents are held out together."""
        return self.contents()

    def _watched(self, doing: str, items: Iterable[T]) -> Iterable[T]:
        return progress(items, doing, len(self.items), unit="documents", shown=is_first_process())

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum(dtype=np.int64))


@dataclasses.dataclass(frozen=True)
class Loaded:
    """Tokens of --data_file or --eval_file: its files, and the documents of each that are used."""

    data_file: str
    encoder: Encoder
    files: list[Tokens]
    chosen: list[np.ndarray]
    names: list[str]  # the beginning of places in each file, such as "data.jsonl, line"
    rows: str = SFT  # one of formats.ROWS, as which the files were read

    @property
    def longest(self) -> int:
        """Inputs of the longest document, or of the longest pair."""
        if self.rows == PAIRS:
            inputs = [(lengths - 1).reshape(-1, 2).sum(1) for lengths in self._lengths()]
        else:
            inputs = [lengths - 1 for lengths in self._lengths()]
        return int(max(of_file.max(initial=0) for of_file in inputs))

    @property
    def texts(self) -> int:
        """Inputs of all documents if all are running text, else 0."""
        if not all(tokens.texts[documents].all() for tokens, documents in zip(self.files, self.chosen)):
            return 0
        return sum(int(lengths.sum()) - len(lengths) for lengths in self._lengths())

    def _lengths(self) -> list[np.ndarray]:
        """Count the tokens of the chosen documents of each file."""
        pairs = zip(self.files, self.chosen)
        return [np.diff(tokens.ends, prepend=0)[documents] for tokens, documents in pairs]

    def documents(self, ctx_len: int) -> Documents:
        """Make documents of at most ctx_len + 1 tokens: ctx_len inputs with their targets.

        A longer conversation is cut. A longer text becomes several documents; each begins with the last token
        of the one before, so that every token is a target once. Documents without a trained token are left
        out. Raises UserError where nothing is trained.
        """
        documents = fit(self.files, self.chosen, ctx_len)
        if not documents.targets:
            raise UserError(
                f"{self.data_file}: no token is trained; every answer is cut off at --ctx_len {ctx_len},"
                " raise it"
            )
        if self._marker_is_absent():
            raise UserError(
                f"{self.data_file}: no row has anything after the marker {self.encoder.loss_mask!r};"
                " --loss_mask takes assistant, all, or a text in the rows"
            )
        return documents.learnable()

    def preferences(self, ctx_len: int) -> Preferences:
        """Return the pairs, or labelled answers, that fit into rows of ctx_len tokens.

        Raises UserError where none fits.
        """
        return fit_examples(self.files, self.chosen, self.names, ctx_len, self.rows == PAIRS)

    def examples(self, ctx_len: int) -> Examples:
        """Return the examples that a run on these rows trains on."""
        return self.documents(ctx_len) if self.rows == SFT else self.preferences(ctx_len)

    def _marker_is_absent(self) -> bool:
        """Tell whether --loss_mask is a marker and nothing is trained but the ends of documents."""
        encoder = self.encoder
        if not trains_by_marker(encoder.loss_mask):
            return False
        # then the marker's text may weigh as much as prompts, and nothing tells them apart
        if encoder.prompt_weight and encoder.prompt_weight in (1, encoder.think_weight):
            return False
        end, prompt = len(encoder.tokenizer.eod), np.float32(encoder.prompt_weight)
        return all(
            np.count_nonzero((tokens.weights != 0) & (tokens.weights != prompt)) <= len(tokens.ends) * end
            for tokens in self.files
        )


def load(
    data_file: str,
    encoder: Encoder,
    cache: str = "none",
    reading: Reading = BY_NAME,
    report: Report | None = None,
    seed: int = 0,
) -> Loaded:
    """Read and tokenise the data files.

    `cache` is that of tokenise(). `seed` decides which records of a source with a weight are seen. Raises
    UserError for what cannot be read, and for no records at all.
    """
    report = report or Report()
    read_from = sources(str(data_file), reading, report.notes)
    files = [tokenise(source, encoder, report, reading, cache) for source in read_from]
    chosen = [
        tokens.documents_of(sample(tokens.records, source.weight, seed, i))
        for i, (tokens, source) in enumerate(zip(files, read_from))
    ]
    names = [report.files[source.path].place for source in read_from]
    return Loaded(str(data_file), encoder, files, chosen, names, reading.rows)


def load_documents(
    data_file, tokenizer, ctx_len: int, template: Template = DEFAULT, loss_mask: str = "assistant", **how
) -> Documents:
    """Call load() and Loaded.documents()."""
    return load(data_file, Encoder(tokenizer, template, loss_mask), **how).documents(ctx_len)


def fit(files: list[Tokens], chosen: list[np.ndarray], ctx_len: int) -> Documents:
    """Make documents of at most ctx_len + 1 tokens from the chosen documents of each file."""
    limit = ctx_len + 1
    pairs = list(zip(files, chosen))
    whole = joined(files, chosen)
    file, starts, lengths = whole.of, whole.starts, whole.lengths
    texts = np.concatenate([tokens.texts[documents] for tokens, documents in pairs])
    too_long = lengths > limit
    cut, split = too_long & ~texts, too_long & texts
    lost = np.where(cut, lengths - limit, 0).astype(np.int32) if cut.any() else None
    conversation = _conversations(pairs)
    if not split.any():
        parts = FileDocuments(files, file, starts, np.minimum(lengths, limit).astype(np.int32))
        return Documents(parts, lost, conversation=conversation)

    counts = np.where(split, -(-(lengths - 1) // ctx_len), 1)  # number of parts of each document
    of = np.repeat(np.arange(len(lengths)), counts)  # the document that each part comes from
    number_in_document = np.arange(len(of)) - np.repeat(np.cumsum(counts) - counts, counts)
    begins = starts[of] + number_in_document * ctx_len
    rest = (starts + lengths)[of] - begins
    parts = FileDocuments(files, file[of], begins, np.minimum(rest, limit).astype(np.int32))
    text = np.where(counts > 1, np.arange(len(counts)), -1).astype(np.int32)[of]
    return Documents(
        parts, None if lost is None else lost[of], text, None if conversation is None else conversation[of]
    )


def _conversations(pairs: list[tuple[Tokens, np.ndarray]]) -> np.ndarray | None:
    """Build Documents.conversation for the chosen documents of each file."""
    if all(tokens.begins.all() for tokens, _ in pairs):
        return None
    numbers, first = [], 0
    for tokens, documents in pairs:
        record = np.cumsum(tokens.begins) - 1
        is_several = np.bincount(record)[record] > 1
        numbers.append(np.where(is_several, record + first, -1).astype(np.int32)[documents])
        first += tokens.records
    return np.concatenate(numbers)
