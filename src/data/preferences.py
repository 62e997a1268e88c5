"""Preferences: pairs of a chosen and a rejected answer, or single answers with a label, as flat arrays.

An *example* of a preference loss is a pair, or under KTO one answer. It lies in one row: each of its answers
is a document of its own, prompt + answer + end.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from rwkv_miss.errors import UserError
from rwkv_miss.progress import progress

from ..common.first_process import is_first_process
from ..common.formatting import counted
from .answer_batches import collate_answers
from .answer_example import AnswerExample
from .encode import Tokens
from .examples import Examples
from .file_documents import Document, FileDocuments, joined
from .formats import places_text

NAMED = 3  # number of left-out examples that are named


@dataclasses.dataclass
class Preference(AnswerExample):
    """Example of a preference loss. In a pair the chosen answer comes first."""

    chosen: list[bool]
    # ln p of the trained tokens of each answer by the reference model, (targets,) float32
    reference: list[np.ndarray] | None = None

    @property
    def weight(self) -> float:
        return 1.0

    @property
    def content(self) -> np.ndarray:
        """Key of the example, (n,) int32: its tokens, with the length and the label of each answer."""
        marks = [[len(answer.ids), chosen] for answer, chosen in zip(self.answers, self.chosen)]
        parts = [part for answer, mark in zip(self.answers, marks) for part in (mark, answer.ids)]
        return np.concatenate(parts).astype(np.int32)


@dataclasses.dataclass
class Preferences(Examples):
    """Pairs of a run, or its answers with labels. An example is never cut.

    There may be 10^6 of them, so they are flat arrays and no objects.
    """

    answers: FileDocuments | MixedDocuments  # answers of all examples, one example after another
    chosen: np.ndarray  # (A,) bool: whether each answer is one to prefer
    paired: bool  # an example is two answers, chosen and rejected; else it is one
    ctx_len: int  # tokens that an example may take of a row
    too_long: int = 0  # examples that were left out because they take more than ctx_len
    too_long_places: tuple[str, ...] = ()  # where the first of them are
    reference: np.ndarray | None = None  # ln p of trained tokens by the reference model, (N,) float32
    reference_starts: np.ndarray | None = None  # (A,) int64: where those of each answer begin
    # under KTO: the mismatched() examples of these examples, at equal places, with their reference
    others: Preferences | None = None

    @property
    def word(self) -> str:
        return "pair" if self.paired else "answer"

    @property
    def size(self) -> int:
        """Answers of an example."""
        return 2 if self.paired else 1

    def __len__(self) -> int:
        return len(self.chosen) // self.size

    def __getitem__(self, i: int) -> Preference:
        i = range(len(self))[i]
        places = range(i * self.size, (i + 1) * self.size)
        answers = [self.answers[place] for place in places]
        reference = None
        if self.reference is not None:
            starts = [int(self.reference_starts[place]) for place in places]
            reference = [self.reference[at : at + a.targets] for at, a in zip(starts, answers)]
        return Preference(answers, [bool(self.chosen[place]) for place in places], reference)

    def take(self, chosen: np.ndarray) -> Preferences:
        places = (np.asarray(chosen, np.int64)[:, None] * self.size + np.arange(self.size)).ravel()
        starts = None if self.reference is None else self.reference_starts[places]
        return dataclasses.replace(
            self,
            answers=self.answers.take(places),
            chosen=self.chosen[places],
            reference_starts=starts,
            others=None if self.others is None else self.others.take(chosen),
        )

    def collator(self, chunk: int = 0, shared: bool = False) -> Callable[[list[list], float], dict]:
        return functools.partial(collate_answers, chunk=chunk, shared=shared)

    def too_long_text(self, ctx_len: int) -> str:
        if not self.too_long:
            return ""
        places = places_text(self.too_long, self.too_long_places)
        what = f"{counted(self.too_long, self.word)} of more than --ctx_len {ctx_len} tokens"
        return f"{what}{', both answers counted' if self.paired else ''}: {places}"

    def to_ask(self, count: int) -> list[Document]:
        """Choose the first `count` preferred answers, each to another prompt."""
        by_prompt: dict[bytes, Document] = {}
        for example in self:
            if len(by_prompt) == count:
                break
            if example.chosen[0]:
                by_prompt.setdefault(example.prompt.tobytes(), example.answers[0])
        return list(by_prompt.values())

    def line(self, i: int) -> int:
        """Return the line or row of its file that example i, or its prompt, comes from."""
        return self.answers.line(i * self.size)

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        return (self._of_examples(self.answers.lengths - 1) + 1).astype(np.int32)

    @functools.cached_property
    def target_counts(self) -> np.ndarray:
        return self._of_examples(self._counted[0]).astype(np.int32)

    @functools.cached_property
    def weight_sums(self) -> np.ndarray:
        """1 for each example, (U,) float64: a step's loss is divided by its examples."""
        return np.ones(len(self))

    @property
    def answer_targets(self) -> np.ndarray:
        """Trained tokens of each answer, (A,) int32."""
        return self._counted[0]

    @property
    def prompt_lengths(self) -> np.ndarray:
        """Tokens of each answer before its first trained one, (A,) int32."""
        return self._counted[1]

    @functools.cached_property
    def _counted(self) -> tuple[np.ndarray, np.ndarray]:
        return self.answers.trained()

    def inputs(self) -> Iterable[np.ndarray]:
        return (answer.ids[:-1] for answer in self.answers)

    def contents(self) -> Iterable[np.ndarray]:
        return (example.content for example in self)

    def held_out_by(self) -> Iterable[np.ndarray]:
        """Yield the prompts: examples with equal ones are held out together."""
        firsts = range(0, len(self.answers), self.size)
        return (self.answers[i].ids[: self.prompt_lengths[i]] for i in firsts)

    def _of_examples(self, values: np.ndarray) -> np.ndarray:
        """Return sum over the answers of each example."""
        return values.reshape(-1, self.size).sum(1)

    @functools.cached_property
    def digest(self) -> str:
        """Hash the tokens, which of them are trained, and the labels, with SHA-256."""
        digest = hashlib.sha256(b"pairs" if self.paired else b"labels")
        digest.update(np.ascontiguousarray(self.chosen))
        digest.update(self.answers.lengths.astype(np.int64))
        for answer in progress(self.answers, "hashing the tokens", unit="answers", shown=is_first_process()):
            digest.update(answer.ids)
            digest.update(answer.weights != 0)
        return digest.hexdigest()

    @property
    def tokens(self) -> int:
        return int(self.answers.lengths.sum(dtype=np.int64))

    def with_reference(self, values: np.ndarray) -> Preferences:
        """Add ln p of every trained token by the reference model, (targets,) float32, example by example."""
        if values.shape != (self.targets,):
            raise ValueError(f"reference: expected ({self.targets},) values, got {values.shape}")
        ends = np.cumsum(self._counted[0], dtype=np.int64)
        return dataclasses.replace(self, reference=values, reference_starts=ends - self._counted[0])

    def mismatched(self) -> Preferences:
        """Pair the prompts with answers of other examples, for KTO's baseline.

        Example i is the prompt of example i with another example's answer, which loses its end where both
        have more than ctx_len tokens. It is the answer to another prompt, except where more than half of all
        examples ask the same. It depends on the data alone.
        """
        if self.paired:
            raise ValueError("mismatched(): expected single answers, got pairs")
        prompts = self.prompt_lengths
        of = _answers_of_others(self.answers, prompts)
        rest = np.minimum(self.answers.lengths[of] - prompts[of], self.ctx_len + 1 - prompts)
        # keep one token before the answer, the first input; MixedDocuments puts the prompt's last token there
        answers = self.answers.take(of).parts(prompts[of] - 1, rest + 1)
        return Preferences(MixedDocuments(self.answers, prompts, answers), self.chosen, False, self.ctx_len)


def _answers_of_others(answers: FileDocuments, prompts: np.ndarray) -> np.ndarray:
    """Find for each answer the place of one to another prompt, (A,) int64; every one is taken once."""
    digests = (
        hashlib.blake2b(answer.ids[:end], digest_size=16).digest() for answer, end in zip(answers, prompts)
    )
    keys = np.fromiter(digests, "S16", len(answers))
    # Answers to one prompt stand together in this order, and no prompt has more than the largest group. So a
    # shift by the size of that group leads to an answer of another prompt.
    order = np.argsort(keys, kind="stable")
    _, counts = np.unique(keys, return_counts=True)
    of = np.empty(len(order), np.int64)
    of[order] = np.roll(order, -int(counts.max(initial=0)))
    return of


@dataclasses.dataclass
class MixedDocuments(Sequence):
    """Documents i of the first prompt_lengths[i] tokens of prompts[i] and the tokens of answers[i] but its
    first, in whose place is the prompt's last token."""

    prompts: FileDocuments
    prompt_lengths: np.ndarray  # (n,) int32
    answers: FileDocuments

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    def __getitem__(self, i: int) -> Document:
        prompt, answer, end = self.prompts[i], self.answers[i], int(self.prompt_lengths[i])
        return Document(
            np.concatenate([prompt.ids[:end], answer.ids[1:]]),
            np.concatenate([prompt.weights[:end], answer.weights[1:]]),
        )

    @property
    def lengths(self) -> np.ndarray:
        return self.prompt_lengths + self.answers.lengths - 1

    def line(self, i: int) -> int:
        """Return the line of its prompt."""
        return self.prompts.line(i)

    def take(self, chosen: np.ndarray) -> MixedDocuments:
        return MixedDocuments(
            self.prompts.take(chosen), self.prompt_lengths[chosen], self.answers.take(chosen)
        )

    def trained(self) -> tuple[np.ndarray, np.ndarray]:
        """Call FileDocuments.trained()."""
        return self.answers.trained()[0], self.prompt_lengths


def fit_examples(
    files: list[Tokens], chosen: list[np.ndarray], names: list[str], ctx_len: int, paired: bool
) -> Preferences:
    """Choose the examples that fit into rows of ctx_len tokens, from the chosen documents of each file.

    `names` are of the files, for what is left out. Raises UserError where nothing fits.
    """
    answers = joined(files, chosen)
    labels = np.concatenate([tokens.labels[documents] for tokens, documents in zip(files, chosen)])
    whole = Preferences(answers, labels > 0, paired, ctx_len)
    long = whole.lengths - 1 > ctx_len
    if not long.any():
        return whole
    rows = np.concatenate([tokens.places[documents] for tokens, documents in zip(files, chosen)])
    firsts = np.flatnonzero(long)[:NAMED] * whole.size
    places = tuple(f"{names[answers.of[i]]} {rows[i]}" for i in firsts)
    if long.all():
        shortest = int(whole.lengths.min()) - 1
        condition = "both answers of a pair lie in one row" if paired else "an answer lies in one row"
        raise UserError(
            f"{places[0]}: all {counted(len(whole), whole.word)} have more tokens than --ctx_len {ctx_len};"
            f" {condition}, and the shortest takes {shortest}; raise it"
        )
    return dataclasses.replace(
        whole.take(np.flatnonzero(~long)), too_long=int(long.sum()), too_long_places=places
    )
