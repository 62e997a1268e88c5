"""Layouts of pairs of answers and of labelled answers, for the losses of preferences.

They become the forms that __init__.py lists. The last turn of an answer is the assistant's.

Texts under the names of TRL, prompt with chosen and rejected or with completion, go on from the prompt as
they are. Under other names, and RWKV-LM-RLHF's prompt, chosen, reject, they are a question and its answers.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from typing import Any, NamedTuple

from rwkv_miss.errors import UserError

from ...common.formatting import short
from .errors import LeftOut, WrongSetting
from .layouts import (
    ANSWERS,
    CHOSEN,
    CONTEXTS,
    CONVERSATIONS,
    EMPTY,
    LABEL,
    LABELS,
    PAIRS,
    QUESTIONS,
    REJECTED,
    RLHF_REJECTED,
    SYSTEMS,
    TOKENS,
    RecordLayout,
    by_lower,
    check_fields,
    earlier_turns,
    has_layout,
    is_label,
    said,
    says_nothing,
    shown,
    text,
    tools_of,
    turns_of,
    with_system,
    words_of,
)

EXPECTED = {
    PAIRS: (
        'expected a pair of answers, {"prompt" or "messages": ..., "chosen": ..., "rejected": ...};'
        " --sft_field prompt,chosen,rejected names other columns"
    ),
    LABELS: (
        'expected an answer with a label, {"prompt" or "messages": ..., "completion": ..., "label": true},'
        " or a pair; --sft_field prompt,completion,label names other columns"
    ),
}
ASSISTANT = "\n\nAssistant:"  # ends the prompt in texts that hold a whole chat


class RecordColumns(NamedTuple):
    """Columns of a record, by their meaning."""

    question: tuple[str, ...]  # a text, a conversation, or instruction and input; () if it is in the answers
    answers: tuple[str, ...]  # chosen and rejected, or one
    label: str | None
    system: str | None = None
    history: str | None = None
    tools: str | None = None

    @property
    def used(self) -> tuple[str, ...]:
        names = (*self.question, *self.answers, self.label, self.system, self.history, self.tools)
        return tuple(filter(None, names))

    @property
    def name(self) -> str:
        answers = " / ".join(self.answers) + (f" + {self.label}" if self.label else "")
        return f"{' + '.join(self.question)} -> {answers}" if self.question else answers


def with_empty_cells(record: dict[str, Any], fields: tuple[str, ...]) -> dict[str, Any]:
    """Fill a line of a CSV file, in which an answer without text is empty. Elsewhere null is no answer."""
    answers = {*CHOSEN, *REJECTED, "completion"}
    return {
        name: "" if value is None and (name in fields or name.strip().lower() in answers) else value
        for name, value in record.items()
    }


def preference(
    record: dict[str, Any], fields: tuple[str, ...], rows: str
) -> tuple[RecordLayout, dict[str, Any]]:
    """Do layouts.canonical() for a pair or a labelled answer.

    `rows` is PAIRS, or LABELS, which takes pairs too. Raises LeftOut where an answer is empty.
    """
    if not isinstance(record, dict):
        raise UserError(f"{EXPECTED[rows]}; got {type(record).__name__}")
    present = tuple(name for name, value in record.items() if value is not None)
    names = tuple(record)
    ends_with_label = (
        bool(fields)
        and rows == LABELS
        and (fields[-1].strip().lower() == LABEL or is_label(record.get(fields[-1])))
    )
    answers, label = find_answers(names, present, fields, rows, ends_with_label)
    is_whole = _holds_prompt(record[answers[0]])
    columns = find_columns(names, present, fields, answers, label, is_whole)
    if is_whole:
        _check_beginnings(record, answers[0])
    layout = RecordLayout(columns.name, columns.used, functools.partial(_convert, columns=columns))
    return layout, layout.convert(record)


@functools.lru_cache(maxsize=1024)
def find_answers(
    names: tuple[str, ...],
    present: tuple[str, ...],
    fields: tuple[str, ...],
    rows: str,
    ends_with_label: bool,
) -> tuple[tuple[str, ...], str | None]:
    """Find (the columns of the answers, the column of the label) of a record with these names.

    `present` of them hold a value. `fields` are those of --sft_field; `ends_with_label`: the last of them
    holds a label.
    """
    if fields:
        check_fields(fields, names)
        if len(fields) == 1:
            raise UserError(f"--sft_field {fields[0]}: one column is no pair of answers. {EXPECTED[rows]}")
        return ((fields[-2],), fields[-1]) if ends_with_label else (fields[-2:], None)
    by_name = by_lower(names)
    chosen, rejected = _first(CHOSEN, by_name), _first(REJECTED, by_name)
    if chosen and rejected:
        return (chosen, rejected), None
    if chosen or rejected:
        absent, wanted = ("rejected", REJECTED) if chosen else ("chosen", CHOSEN)
        raise UserError(
            f"the row has {chosen or rejected!r} and no {absent} answer; a pair needs both, the other one as"
            f" {' or '.join(wanted)}; got keys {shown(names)}"
        )
    label = by_name.get(LABEL)
    completion = _only([by_name[name] for name in ANSWERS if by_name.get(name) in present], names)
    if not label or rows == PAIRS:
        raise _wrong_row(rows, label, completion, present, names)
    # without a completion the answer is the end of a conversation
    answer = completion or _only([by_name[name] for name in CONVERSATIONS if name in by_name], names)
    if answer is None:
        raise UserError(f"{EXPECTED[rows]}; got keys {shown(names)}")
    return (answer,), label


@functools.lru_cache(maxsize=1024)
def find_columns(
    names: tuple[str, ...],
    present: tuple[str, ...],
    fields: tuple[str, ...],
    answers: tuple[str, ...],
    label: str | None,
    is_whole: bool,
) -> RecordColumns:
    """Find the columns of a record with known answers and label; `is_whole`: the answers hold the prompt."""
    by_name = by_lower(names)
    if is_whole:
        question: tuple[str, ...] = ()
    elif fields:
        question = fields[:-2]
    else:
        question = _question_columns(
            {lower: name for lower, name in by_name.items() if name not in answers}, present
        )
        if label and not question and answers[0].strip().lower() not in CONVERSATIONS:
            raise UserError(f"{EXPECTED[LABELS]}; got keys {shown(names)}")
    others = {lower: name for lower, name in by_name.items() if name not in (*question, *answers, label)}
    history = None if is_whole else others.get("history")
    return RecordColumns(question, answers, label, _first(SYSTEMS, others), history, others.get("tools"))


def _question_columns(by_name: dict[str, str], present: tuple[str, ...]) -> tuple[str, ...]:
    """Find the columns of the question; () for none."""
    found = [by_name[name] for name in (*CONVERSATIONS, *QUESTIONS) if by_name.get(name) in present]
    instruction = by_name.get("instruction")
    context = [by_name[name] for name in CONTEXTS if by_name.get(name) in present and instruction in found]
    question = _only([name for name in found if name not in context], tuple(by_name.values()))
    if question is None:
        return ()
    return (question, *context[:1]) if question == instruction else (question,)


def _only(found: list[str], names: tuple[str, ...]) -> str | None:
    """Return the only column found, None for none. Raises UserError for several."""
    if len(found) > 1:
        raise UserError(
            f"the row has several columns for one thing, {', '.join(found)}; choose with --sft_field, such as"
            f" prompt,chosen,rejected or prompt,completion,label; got keys {shown(names)}"
        )
    return found[0] if found else None


def _first(wanted: Iterable[str], by_name: dict[str, str]) -> str | None:
    return next((by_name[name] for name in wanted if name in by_name), None)


def _wrong_row(
    rows: str, label: str | None, completion: str | None, present: tuple[str, ...], names: tuple[str, ...]
) -> UserError:
    """Say what is wrong with a row that has no answers of this kind, and what to do."""
    if label and completion:
        hint = "a row of one answer with a label is for --loss kto; "
    elif has_layout(present):
        hint = "the row has one answer, on which --loss sft trains; "
    elif names == TOKENS.used:
        hint = "nothing tells a prompt from an answer in tokens; give text; "
    else:
        hint = ""
    kind = WrongSetting if hint else UserError
    return kind(f"{hint}{EXPECTED[rows]}; got keys {shown(names)}")


def _label(value: Any, column: str) -> bool:
    word = value.strip().lower() if isinstance(value, str) else value
    if is_label(word) or word in ("1", "0"):  # in CSV a number is a text
        return word in (1, "1", "true")  # and true is 1
    # other words than these are likely to be in all rows
    kind = UserError if value is None else WrongSetting
    raise kind(
        f"{column} must be true (or 1) for an answer to prefer and false (or 0) for one to avoid, in JSON"
        f" without quotes; got {short(value)}"
    )


def _holds_prompt(answer: Any) -> bool:
    """Tell whether an answer is a whole conversation, as it does not begin with the assistant's turn."""
    if not isinstance(answer, list) or not answer:
        return False
    return turns_of(answer[:1], "")[0]["role"] != "assistant"


def _check_beginnings(record: dict, answer: str) -> None:
    """Raise UserError if the turns of another column are not the beginning of a whole conversation."""
    for name, value in record.items():
        is_asked = name != answer and name.strip().lower() in (*CONVERSATIONS, *QUESTIONS)
        if is_asked and isinstance(value, list) and record[answer][: len(value)] != value:
            raise UserError(
                f"{answer} begins with a message that is not the assistant's, so it is a whole conversation,"
                f" and {name} is not its beginning; give the answer alone, or leave {name} out"
            )


def _convert(record: dict, columns: RecordColumns) -> dict[str, Any]:
    """Convert a record to its form."""
    label = {} if columns.label is None else {"label": _label(record[columns.label], columns.label)}
    names = ("completion",) if columns.label else ("chosen", "rejected")
    values = [record[column] for column in columns.answers]
    if all(isinstance(value, str) for value in values):
        texts = _texts(record, columns)
        if texts is not None:
            prompt, answers = texts
            if not all(answer.strip() for answer in answers):
                raise LeftOut(EMPTY)
            return {"prompt": prompt, **dict(zip(names, answers)), **label}
    answers = [_answer(value, column) for value, column in zip(values, columns.answers)]
    if columns.question:
        turns = _question(record, columns)
    else:
        turns, answers = _parted(answers, columns)
    for answer in answers:
        _check_answer(answer)
    turns = with_system(turns, record, columns.system)
    tools = columns.tools and record[columns.tools]
    extra = {"tools": tools_of(tools, columns.tools)} if tools else {}
    return {"messages": turns, **extra, **dict(zip(names, answers)), **label}


def _texts(record: dict, columns: RecordColumns) -> tuple[str, list[str]] | None:
    """Return (prompt, answers) of texts that are no turns; None if they are turns."""
    answers = [text(record[column], column, may_be_empty=True) for column in columns.answers]
    if not columns.question:
        if len(answers) == 1:
            raise UserError(
                f"{columns.answers[0]} is a text, in which nothing tells the prompt from the answer; give"
                " messages, or the prompt in a column of its own"
            )
        return _parted_texts(answers, columns)
    has_more = any(name and record[name] for name in (columns.system, columns.history, columns.tools))
    names = [name.strip().lower() for name in (*columns.question, columns.answers[-1])]
    prompt = record[columns.question[0]]
    if names[:-1] != ["prompt"] or names[-1] == RLHF_REJECTED or has_more or not isinstance(prompt, str):
        return None
    return text(prompt, columns.question[0]), answers


def _parted_texts(answers: list[str], columns: RecordColumns) -> tuple[str, list[str]]:
    """Split two texts into (the common beginning, the answers): at `Assistant:`, or after a whole word."""
    common = os.path.commonprefix(answers)
    end = common.rfind(ASSISTANT)
    if end >= 0:
        end += len(ASSISTANT)
    else:
        last = min(map(len, answers)) - 1  # each answer keeps at least one character
        end = max(common.rfind(" ", 0, last), common.rfind("\n", 0, last))
    if end <= 0:
        raise UserError(_NOT_SHARED.format(*columns.answers))
    return common[:end], [answer[end:] for answer in answers]


_NOT_SHARED = "{} and {} do not share their beginning; both must answer the same prompt"


def _answer(value: Any, column: str) -> list[dict[str, Any]]:
    """Read the turns of an answer, or of a whole conversation."""
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list):
        return turns_of(value, column, last_is_answer=True)
    if value is None:
        raise UserError(f"{column} must be a text or a list of messages, got None")
    return [{"role": "assistant", "content": "" if value == "" else said(value, column)}]


def _question(record: dict, columns: RecordColumns) -> list[dict[str, Any]]:
    """Read the turns before the answers."""
    question, *context = columns.question
    value = record[question]
    if isinstance(value, list):
        turns = turns_of(value, question)
        if turns[-1]["role"] == "assistant":
            raise UserError(
                f"{question} ends with the assistant's message; expected the message that both answers follow"
            )
    else:
        turns = [{"role": "user", "content": words_of(record, question, context)}]
    return [*earlier_turns(record, columns.history), *turns]


def _parted(conversations: list[list[dict]], columns: RecordColumns) -> tuple[list[dict], list[list[dict]]]:
    """Split whole conversations into (the turns before the answers, the answers)."""
    if len(conversations) == 1:
        [turns] = conversations
        common = max((i + 1 for i, turn in enumerate(turns) if turn["role"] != "assistant"), default=0)
    else:
        shortest = min(map(len, conversations))
        pairs = zip(*conversations)
        alike = next((i for i, (a, b) in enumerate(pairs) if a != b), shortest)
        common = min(alike, shortest - 1)
    others = {turns[common]["role"] for turns in conversations} - {"assistant"}
    if not common or others:
        part = f"; they part at message {common + 1}, which is the {min(others)}'s" if others else ""
        raise UserError(_NOT_SHARED.format(*columns.answers, columns.answers[0]) + part)
    return conversations[0][:common], [turns[common:] for turns in conversations]


def _check_answer(turns: list[dict[str, Any]]) -> None:
    """Check an answer. Raises LeftOut if the last turn says nothing, UserError if it has a weight."""
    for turn in turns:
        if turn["role"] == "assistant" and turn.get("weight", 1) != 1:
            raise UserError(
                f"a compared answer has the weight {turn['weight']}; all of it is compared, so leave it out"
            )
    if says_nothing(turns[-1]):
        raise LeftOut(EMPTY)
