"""Questions with their reference answers, from files: to evaluate a model, or to train it on its answers."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np

from rwkv_miss.errors import UserError

from ..common.formatting import counted
from .bos import with_bos
from .chat_template import BEGUN_THOUGHTS, Template, begins_thoughts, thoughts_of
from .encode import Encoder
from .examples import Examples
from .formats import BY_NAME, LeftOut, Reading, Report, places_text, read_source, sample, sources
from .parallel import Converter, parts_of
from .rwkv_template import DEFAULT
from .templates import answer_text
from .tokenizer import Tokenizer

THOUGHTS = 2048  # tokens of an answer that begins with thoughts
LIMITS = {"number": 512, "boxed": 512, "math_verify": 512, "code": 1024}  # tokens of an answer, by score
NAMED = 3  # number of left-out questions that are named
NO_QUESTION = "the question is empty"
NO_ANSWER = "the reference answer is empty"


class Question(NamedTuple):
    """Question, and its reference answer."""

    pieces: list[str]  # pieces of the prompt; each is tokenised on its own
    answer: Any  # the reference answer
    opening: str = ""  # the beginning of every answer, which is not generated: a template's <think

    @property
    def prompt(self) -> str:
        return "".join(self.pieces)

    def ids(self, tokenizer: Tokenizer, bos: tuple[int, ...] = ()) -> list[int]:
        """Encode the prompt, after its BOS."""
        tokens: list[int] = []
        for piece in self.pieces:
            tokens += tokenizer.encode(piece)
        return with_bos(tokens, bos)


@dataclasses.dataclass
class Questions(Examples):
    """Questions of a run on its own answers: group_size answers to each, of at most max_tokens tokens. So
    the sizes of an example are only bounds."""

    questions: list[Question]
    prompts: list[np.ndarray]  # tokens of each, (p,) int32 with p >= 1, with its BOS
    group_size: int
    max_tokens: int
    too_long: int = 0  # questions that were left out because they and an answer take more than --ctx_len
    too_long_places: tuple[str, ...] = ()  # where the first of them are
    usual: float = math.inf  # mean tokens of an answer, as an estimate; inf: unknown
    word: ClassVar[str] = "question"
    alone: ClassVar[bool] = True

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, i: int) -> Question:
        return self.questions[i]

    def take(self, chosen: np.ndarray) -> Questions:
        return dataclasses.replace(
            self, questions=[self.questions[i] for i in chosen], prompts=[self.prompts[i] for i in chosen]
        )

    def too_long_text(self, ctx_len: int) -> str:
        if not self.too_long:
            return ""
        places = places_text(self.too_long, self.too_long_places)
        what = f"of more than --ctx_len {ctx_len} tokens with an answer of {self.max_tokens}"
        return f"{counted(self.too_long, 'question')} {what}: {places}"

    @functools.cached_property
    def prompt_lengths(self) -> np.ndarray:
        """Tokens of each prompt, (n,) int32."""
        return np.array([len(prompt) for prompt in self.prompts], np.int32)

    @property
    def answer_tokens(self) -> int:
        """Tokens that all answers to a question have at most."""
        return self.group_size * self.max_tokens

    @property
    def likely_tokens(self) -> float:
        """Tokens that an answer probably has, in the mean."""
        return min(self.usual, self.max_tokens)

    @property
    def lengths(self) -> np.ndarray:
        """One more than the most tokens of a question and its answers if the prompt is read once, (n,)
        int32. An answer is read from the last token of its prompt on."""
        return self.prompt_lengths + np.int32(self.answer_tokens)

    @property
    def target_counts(self) -> np.ndarray:
        """The tokens that its answers have at most, (n,) int32."""
        return np.full(len(self), self.answer_tokens, np.int32)

    @functools.cached_property
    def weight_sums(self) -> np.ndarray:
        """1 for each question, (n,) float64. A step's divisor depends on the answers."""
        return np.ones(len(self))

    @property
    def tokens(self) -> int:
        """Tokens of all prompts."""
        return int(self.prompt_lengths.sum(dtype=np.int64))

    def inputs(self) -> Iterable[np.ndarray]:
        """Yield the prompts. Answers are the model's own."""
        return self.prompts

    def contents(self) -> Iterable[np.ndarray]:
        """Yield the key of each question, (n,) int32: its tokens, and the bytes of its reference answer."""
        for prompt, question in zip(self.prompts, self.questions):
            right = np.frombuffer(str(question.answer).encode(), np.uint8)
            yield np.concatenate([[len(prompt)], prompt, right]).astype(np.int32)

    def held_out_by(self) -> Iterable[np.ndarray]:
        """Yield the prompts: equal questions are held out together, whatever their answers."""
        return self.prompts

    @functools.cached_property
    def digest(self) -> str:
        """Hash the prompts' tokens and the reference answers with SHA-256."""
        digest = hashlib.sha256(b"questions")
        digest.update(self.prompt_lengths)
        for prompt, question in zip(self.prompts, self.questions):
            digest.update(prompt)
            digest.update(f"{question.answer}\0".encode())
        return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class LoadedQuestions:
    """Questions of --data_file or --eval_file."""

    data_file: str
    questions: list[Question]
    prompts: list[np.ndarray]  # as in Questions
    places: list[str]  # where each stands, such as "data.jsonl, line 3"

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(map(len, self.prompts))

    def examples(self, ctx_len: int, group_size: int, max_tokens: int) -> Questions:
        """Return the questions that fit, with an answer of max_tokens, into rows of ctx_len tokens.

        Raises UserError where none does.
        """
        examples = Questions(self.questions, self.prompts, group_size, max_tokens)
        row_lengths = examples.prompt_lengths - 1 + max_tokens
        long = np.flatnonzero(row_lengths > ctx_len)
        if not len(long):
            return examples
        places = tuple(self.places[i] for i in long[:NAMED])
        if len(long) == len(examples):
            raise UserError(
                f"{places[0]}: all {counted(len(examples), 'question')} with an answer of --max_tokens"
                f" {max_tokens} have more tokens than --ctx_len {ctx_len}, and the shortest takes"
                f" {row_lengths.min():,}; raise it, or lower --max_tokens"
            )
        fitting = examples.take(np.flatnonzero(row_lengths <= ctx_len))
        return dataclasses.replace(fitting, too_long=len(long), too_long_places=places)


class ReadQuestion(NamedTuple):
    """Question that was read from a file."""

    question: Question
    prompt: np.ndarray  # as in Questions
    where: str  # the place of its row, such as "data.jsonl, line 3"


@dataclasses.dataclass(frozen=True)
class QuestionConverter(Converter):
    """Conversion of records to (ReadQuestion, row). The row is empty without `keeps_rows`."""

    needs_answer: bool
    keeps_rows: bool

    def made_of(self, row: dict[str, Any], where: str) -> tuple[ReadQuestion, dict[str, Any]]:
        question = question_of(row, self.encoder.template)
        ids = question.ids(self.encoder.tokenizer, self.encoder.bos)
        if not ids or is_blank(row):
            raise LeftOut(NO_QUESTION)
        if self.needs_answer and not question.answer.strip():
            raise LeftOut(NO_ANSWER)
        return ReadQuestion(question, np.array(ids, np.int32), where), row if self.keeps_rows else {}


@dataclasses.dataclass(frozen=True)
class QuestionReader:
    """Reader of a run's question files.

    A row with an empty question is left out and counted, and with `needs_answer` also one with an empty
    reference answer. The report decides about a bad row.
    """

    encoder: Encoder
    reading: Reading = BY_NAME
    report: Report = dataclasses.field(default_factory=Report)
    needs_answer: bool = True

    def load(
        self,
        data_file: str,
        seed: int = 0,
        look: Callable[[ReadQuestion, dict[str, Any]], None] | None = None,
    ) -> LoadedQuestions:
        """Read and tokenise the questions.

        `seed` decides which rows of a source with a weight are asked. `look` sees every question that is not
        left out, and its row. Raises UserError for files that cannot be read, and if nothing is left.
        """
        chosen: list[ReadQuestion] = []
        for number, source in enumerate(sources(str(data_file), self.reading, self.report.notes)):
            convert = QuestionConverter(
                source, self.reading, self.encoder, self.needs_answer, keeps_rows=bool(look)
            )
            of_source = []
            for part in parts_of(convert, self.report, "reading"):
                for question, row in part.made:
                    of_source.append(question)
                    if look:
                        look(question, row)
            if not of_source:
                raise UserError(f"{source.path}: {self.report.files[source.path].unusable()}")
            chosen += [of_source[i] for i in sample(len(of_source), source.weight, seed, number)]
        questions, prompts, places = (list(column) for column in zip(*chosen))
        return LoadedQuestions(str(data_file), questions, prompts, places)


def read_questions(
    path: str | os.PathLike, template: Template = DEFAULT, reading: Reading = BY_NAME
) -> list[Question]:
    """Read the question of every row, each once, whatever its file's weight. See question_of().

    Raises UserError for data that cannot be read, and for a row that has no answer or no form in the
    template.
    """
    questions, report = [], Report()
    for source in sources(str(path), reading, report.notes):
        for where, row in read_source(source, report, reading, eod=(0,)):
            try:
                question = question_of(row, template)
                if not question.answer.strip():
                    raise UserError(NO_ANSWER)
                questions.append(question)
            except UserError as error:
                report.refuse(source.path, where, error)
    return questions


def question_of(row: dict[str, Any], template: Template = DEFAULT) -> Question:
    """Make the question of a row.

    The last message of {"messages"} is the reference answer, without its thoughts; tool calls in it count as
    they are written. {"prompt", "completion"} is taken as it stands, whatever the template. Raises UserError
    for a row that has no answer or no form in the template.
    """
    if "prompt" in row:
        begun = BEGUN_THOUGHTS.search(row["prompt"])
        return Question([row["prompt"]], row["completion"].strip(), begun[0] if begun else "")
    if "messages" in row:
        return _of_messages(row, template)
    raise UserError(
        "expected messages, a question and its answer, or a prompt and its completion; got"
        f" {' and '.join(row)}"
    )


def is_blank(row: dict[str, Any]) -> bool:
    """Tell whether nothing is asked in a row that question_of() takes."""
    if "prompt" in row:
        return not row["prompt"].strip()
    return not any(
        (message.get("content") or "").strip() or message.get("tool_calls")
        for message in row["messages"][:-1]
        if message["role"] != "system"
    )


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
                f"the template {template.name} writes a prompt that its answers do not continue, so the"
                " reference call can't be found; give the row as prompt and completion"
            )
        right = answer_text(whole.removeprefix(prompt), template, template.opening)
    return Question(pieces, right, template.opening)


def answer_limit(score: str, tokenizer: Tokenizer, questions: Sequence[Question]) -> int:
    """Choose the most tokens of an answer, unless the user does.

    For `exact` it is the longest reference answer, a quarter more, and 16: a longer answer is wrong anyway.
    """
    if any(begins_thoughts(question.opening) for question in questions):
        return THOUGHTS
    if score in LIMITS:
        return LIMITS[score]
    longest = max((text_length(tokenizer, question.answer) for question in questions), default=0)
    return longest + longest // 4 + 16


def text_length(tokenizer: Tokenizer, text: str) -> int:
    """Count the tokens of a text. Without tokens for it no answer can be right; then its bytes."""
    try:
        return len(tokenizer.encode(text))
    except UserError:
        return len(text.encode())
