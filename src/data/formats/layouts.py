"""Layouts: the meaning of a record's columns, by data sets' names for them, turned into our forms."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterable
from typing import Any

from rwkv_miss.errors import UserError

from ...common.formatting import short
from ...losses import LOSSES
from .errors import WrongSetting

ROLES = ("system", "user", "assistant", "tool")
# the names that ShareGPT and others have for the roles
ROLE_NAMES = {
    **{role: role for role in ROLES},
    "developer": "system",
    "human": "user",
    "observation": "tool",
    "function": "tool",
    "ipython": "tool",
    **dict.fromkeys(("gpt", "chatgpt", "bot", "model", "ai", "function_call"), "assistant"),
}
QUESTIONS = ("instruction", "question", "query", "prompt", "input", "user", "human", "问题", "提问")
ANSWERS = ("output", "answer", "response", "completion", "target", "assistant", "gpt", "答案", "回答")
CONTEXTS = ("input", "context")  # columns that may follow an instruction
SYSTEMS = ("system", "system_prompt")
LARGEST_WEIGHT = 100  # the most that a message may weigh in the loss
CONVERSATIONS = ("messages", "conversations", "conversation")
# ways to read the rows of a file
SFT, PAIRS, LABELS = ROWS = ("sft", "pairs", "labels")
# columns of pairs and of labelled answers, for preference_layouts.py
CHOSEN = ("chosen", "chosen_response")
REJECTED = ("rejected", "reject", "rejected_response")
RLHF_REJECTED = "reject"  # RWKV-LM-RLHF's name; its prompts are questions
LABEL = "label"
EMPTY = "an answer is empty"  # why a row is left out

EXPECTED = (
    'expected one of {"text": ...}, {"messages": [...]}, {"conversations": [...]}, {"instruction": ...,'
    ' "input": ..., "output": ...}, {"prompt": ..., "completion": ...}, {"question": ..., "answer": ...};'
    " --sft_field names other columns"
)


@dataclasses.dataclass(frozen=True)
class RecordLayout:
    """Way to read records with certain columns."""

    name: str  # for the plan
    used: tuple[str, ...]  # the columns that are used
    convert: Callable[[dict[str, Any]], dict[str, Any]]  # a record as the file has it -> one of the forms


TOKENS = RecordLayout("", ("ids",), dict)  # for data that were tokenised before


def canonical(record: dict[str, Any], fields: tuple[str, ...] = ()) -> tuple[RecordLayout, dict[str, Any]]:
    """Turn a record of a file into (layout, record in one of the forms). A column with null counts as absent.

    `fields` are the columns to use if the names do not tell: one with a text or conversation; question and
    answer; or instruction, input, output. Raises UserError that says what is wrong with the record, without
    its place.
    """
    if not isinstance(record, dict):
        raise UserError(f"{EXPECTED}; got {type(record).__name__}")
    present = tuple(name for name, value in record.items() if value is not None)
    layout = find_layout(present, fields, tuple(record))
    if not fields and (labelled := _labelled(present)) and is_label(record[labelled[0]]):
        raise WrongSetting(
            f"{labelled[0]} tells good answers from bad ones, and here all would count as good; --loss kto"
            f" learns from both, --sft_field {labelled[1]} takes all"
        )
    try:
        return layout, layout.convert(record)
    except UserError as error:
        if not fields and is_pair(present):
            raise WrongSetting(f"{_for_pairs(present)}; {error}") from None
        raise


@functools.lru_cache(maxsize=1024)
def find_layout(present: tuple[str, ...], fields: tuple[str, ...], columns: tuple[str, ...]) -> RecordLayout:
    """Find the layout of a record with these columns, of which `present` hold a value.

    Names are compared without case.
    """
    if fields:
        check_fields(fields, columns)
        return _chosen(fields, is_raw=RLHF_REJECTED not in by_lower(columns))
    # with all columns, a null is found where a value is needed, and convert() names it
    layouts = _candidates(present) or _candidates(columns)
    if not layouts:
        if is_pair(columns):
            raise WrongSetting(f"{_for_pairs(columns)}; got keys {shown(columns)}")
        names = by_lower(columns).keys()
        is_unanswered = not names.isdisjoint(QUESTIONS) and names.isdisjoint(ANSWERS)
        lacks = "the answer is missing; " if is_unanswered else ""
        raise UserError(f"{lacks}{EXPECTED}; got keys {shown(columns)}")
    if len(layouts) > 1:
        choices = " or ".join(f"--sft_field {','.join(layout)}" for layout in layouts)
        raise UserError(f"the row has several layouts, choose one with {choices}; got keys {shown(columns)}")
    return _chosen(layouts[0], tuple(name for name in columns if name not in layouts[0]))


def by_lower(columns: Iterable[str]) -> dict[str, str]:
    """Map the names of columns in lower case, by which layouts know them, to the names as they are."""
    return {name.strip().lower(): name for name in columns}


def check_fields(fields: tuple[str, ...], columns: tuple[str, ...]) -> None:
    """Raise UserError if a record lacks a column of --sft_field."""
    missing = [name for name in fields if name not in columns]
    if missing:
        raise UserError(
            f"--sft_field {','.join(fields)}: no column {missing[0]!r}; got keys {shown(columns)}"
        )


def _for_pairs(columns: tuple[str, ...]) -> str:
    """Tell the user what to do with a row of a pair under --loss sft."""
    by_name = by_lower(columns)
    question = [by_name[name] for name in (*CONVERSATIONS, *QUESTIONS) if name in by_name][:1]
    chosen = [by_name[name] for name in CHOSEN if name in by_name][:1]
    losses = [name for name, loss in LOSSES.items() if loss.data in ("pairs", "labels")]
    return (
        f"a row with a chosen and a rejected answer is for --loss {', '.join(losses[:-1])} or {losses[-1]};"
        f" --sft_field {','.join([*question, *chosen])} trains on the chosen ones alone"
    )


@functools.lru_cache(maxsize=1024)
def _labelled(present: tuple[str, ...]) -> tuple[str, str] | None:
    """Find (the column of a label, the --sft_field that ignores it) in records of answers with a label."""
    label = by_lower(present).get(LABEL)
    answers = [columns for columns in _candidates(present) if columns[0].strip().lower() != "text"]
    return (label, ",".join(answers[0])) if label and answers else None


def is_label(value: Any) -> bool:
    """Tell whether a value says that an answer is good or bad: true or false, also as a word, 1 or 0."""
    if isinstance(value, str):
        return value.strip().lower() in ("true", "false")
    return isinstance(value, (bool, int, float)) and value in (0, 1)


def has_layout(columns: Iterable[str]) -> bool:
    """Tell whether the names alone say how such records are read."""
    return bool(_candidates(tuple(columns)))


def is_pair(columns: Iterable[str]) -> bool:
    """Tell whether these are the columns of a pair of answers."""
    names = by_lower(columns).keys()
    return not names.isdisjoint(CHOSEN) and not names.isdisjoint(REJECTED)


def _candidates(columns: tuple[str, ...]) -> list[tuple[str, ...]]:
    """List the columns of every layout that these columns complete."""
    by_name = by_lower(columns)
    has = [name for name in (*QUESTIONS, *ANSWERS) if name in by_name]
    candidates = [(by_name[name],) for name in ("text", *CONVERSATIONS) if name in by_name]
    context = [name for name in CONTEXTS if name in by_name and "instruction" in by_name]
    questions = [name for name in has if name in QUESTIONS and name not in context]
    for answer in (name for name in has if name in ANSWERS):
        for question in questions:
            followed_by = context[:1] if question == "instruction" else []
            candidates.append(tuple(by_name[name] for name in (question, *followed_by, answer)))
    return candidates


def _chosen(names: tuple[str, ...], others: tuple[str, ...] = (), is_raw: bool = False) -> RecordLayout:
    """Make a layout of these columns by their number.

    `is_raw`: a chosen answer continues the text of its prompt, as in pairs.

    1 is a text or conversation, 2 are question and answer, 3 have an input between them. A system prompt,
    earlier turns and tools are taken from the other columns.
    """
    other_columns = by_lower(others)
    system = next((other_columns[name] for name in SYSTEMS if name in other_columns), None)
    history, tools = other_columns.get("history"), other_columns.get("tools")
    lower = tuple(name.strip().lower() for name in names)
    if lower == ("text",):
        convert = functools.partial(_whole, column=names[0], system=None, tools=None)
        return RecordLayout(names[0], names, convert)
    if len(names) == 1:
        used = (*names, *filter(None, (system, tools)))
        convert = functools.partial(_whole, column=names[0], system=system, tools=tools)
        return RecordLayout(" + ".join(used), used, convert)
    if lower == ("prompt", "completion") or is_raw and lower == ("prompt", "chosen"):
        convert = functools.partial(_continuation, prompt=names[0], completion=names[1])
        return RecordLayout(" + ".join(names), names, convert)
    if len(names) in (2, 3):
        *questions, answer = names
        extra = tuple(filter(None, (system, history)))
        named = ", ".join([f"{' + '.join(questions)} -> {answer}", *extra])
        convert = functools.partial(_question, names=names, system=system, history=history)
        return RecordLayout(named, (*names, *extra), convert)
    raise UserError(
        f"--sft_field {','.join(names)}: expected 1 column (text or messages), 2 (question, answer) or 3"
        " (instruction, input, output)"
    )


def _whole(record: dict, column: str, system: str | None, tools: str | None) -> dict[str, Any]:
    value = record[column]
    name = column.strip().lower()
    if name == "text" or not isinstance(value, list) and name not in CONVERSATIONS:
        return {"text": text(value, column)}
    turns = with_system(turns_of(value, column, last_is_answer=True), record, system)
    if tools and record[tools]:
        return {"messages": turns, "tools": tools_of(record[tools], tools)}
    return {"messages": turns}


def tools_of(value: Any, column: str) -> list[dict[str, Any]]:
    """Read descriptions of tools, as they are or as JSON in a text."""
    value = _from_json(value)
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise UserError(
            f"{column} must be a list of objects, or such a list as JSON text, got {short(value)}"
        )
    return value


def _from_json(value: Any) -> Any:
    """Read JSON in a text, such as in a cell of a CSV file; leave any other value as it is."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            pass
    return value


def _continuation(record: dict, prompt: str, completion: str) -> dict[str, Any]:
    if turns := _turns_of_both(record, prompt, completion):
        return {"messages": turns}
    return {"prompt": said(record[prompt], prompt), "completion": said(record[completion], completion, True)}


def is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _turns_of_both(record: dict, question: str, answer: str) -> list[dict[str, Any]]:
    """Return the conversation of a question and its answer if one has turns; [] if both are texts."""
    if not is_list_of_objects(record[question]) and not is_list_of_objects(record[answer]):
        return []
    turns: list[dict] = []
    for column, role in ((question, "user"), (answer, "assistant")):
        value = record[column]
        may_be_empty = role == "assistant"
        turns += (
            value
            if is_list_of_objects(value)
            else [{"role": role, "content": said(value, column, may_be_empty)}]
        )
    return turns_of(turns, f"{question} + {answer}", last_is_answer=True)


def _question(
    record: dict, names: tuple[str, ...], system: str | None, history: str | None
) -> dict[str, Any]:
    question, *context, answer = names
    if not context and (turns := _turns_of_both(record, question, answer)):
        return {"messages": turns}
    turns = [
        {"role": "user", "content": words_of(record, question, context)},
        {"role": "assistant", "content": said(record[answer], answer, True)},
    ]
    if history:
        turns = earlier_turns(record, history) + turns
    return {"messages": with_system(turns, record, system)}


def words_of(record: dict, question: str, context: list[str]) -> str:
    """Write a question with the columns that belong to it, such as an instruction's input."""
    words = said(record[question], question)
    for column in context:
        if record[column] not in (None, ""):
            words += "\n" + said(record[column], column)
    return words


def with_system(turns: list[dict], record: dict, column: str | None) -> list[dict]:
    """Put the system prompt of a column before turns that have none; None: there is no such column."""
    if not column or not record[column] or turns and turns[0]["role"] == "system":
        return turns
    return [{"role": "system", "content": text(record[column], column)}, *turns]


def earlier_turns(record: dict, column: str | None) -> list[dict[str, str]]:
    """Read earlier turns as [[question, answer], ...]; None: there is no such column."""
    if not column or not (value := record[column]):
        return []
    if not isinstance(value, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        raise UserError(f"{column} must be a list of [question, answer] pairs, got {short(value)}")
    turns = []
    for question, answer in value:
        turns.append({"role": "user", "content": text(question, column)})
        turns.append({"role": "assistant", "content": text(answer, column, True)})
    return turns


def turns_of(value: Any, column: str, last_is_answer: bool = False) -> list[dict[str, Any]]:
    """Read turns as {"role": ..., "content": text} from OpenAI's and ShareGPT's forms, also from JSON text.

    Other fields of a turn stay. `last_is_answer`: the last turn must be the assistant's.
    """
    value = _from_json(value)
    if not isinstance(value, list) or not value:
        raise UserError(f"{column} must be a non-empty list, got {short(value)}")
    turns = [turn for item in value for turn in _turns(item)]
    if last_is_answer and turns[-1]["role"] != "assistant":
        raise UserError(f"the last message is from {turns[-1]['role']}; the assistant's answer is missing")
    return turns


def _turns(item: Any) -> list[dict[str, Any]]:
    """Read one message, or two from a pair {"human": ..., "assistant": ...}."""
    message = {}
    if isinstance(item, dict):
        message = {name: value for name, value in item.items() if value is not None}
    if isinstance(message.get("human"), str) and isinstance(message.get("assistant"), str):
        return [
            {"role": "user", "content": text(item["human"], "human", True)},
            {"role": "assistant", "content": text(item["assistant"], "assistant", True)},
        ]
    for name in message.keys() & {"reasoning_content", "reasoning"}:
        text(message[name], name, True)
    if not isinstance(message.get("tool_calls", []), list):
        raise UserError(f"tool_calls must be a list, got {short(message['tool_calls'])}")
    if "weight" in message:
        _check_weight(message["weight"])
    if "function_call" in message:  # OpenAI's earlier form of tool_calls
        message["tool_calls"] = [*message.get("tool_calls", []), {"function": message.pop("function_call")}]
    spelt = message.pop("role", None) or message.pop("from", None)
    role = ROLE_NAMES.get(spelt.lower()) if isinstance(spelt, str) else None
    content = message.pop("content", message.pop("value", None))
    if content is None and message.get("tool_calls"):
        content = ""  # the call is the answer
    if isinstance(content, list):
        content = _joined(content)
    if role is None or not isinstance(content, str):
        raise UserError(
            f'a message must be {{"role": {" | ".join(ROLES)}, "content": text}}, got {short(item)}'
        )
    return [{"role": role, "content": text(content, "content", True), **message}]


def _check_weight(weight: Any) -> None:
    """Raise UserError for a weight that can't multiply the loss of a message."""
    is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    if not is_number or not 0 <= weight <= LARGEST_WEIGHT:
        raise UserError(
            f"the weight of a message must be a number from 0, no loss, to {LARGEST_WEIGHT}, got"
            f" {short(weight)}; leave it out for 1"
        )


def _joined(parts: list) -> str:
    """Join OpenAI's content lists, [{"type": "text", "text": ...}, ...], to one text."""
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise UserError(
                'a part of a content list must be {"type": "text", "text": ...}, got one of type'
                f" {short(kind)}"
            )
    return "".join(part["text"] for part in parts)


def said(value: Any, column: str, may_be_empty: bool = False) -> str:
    """Read the text of a question or an answer. It may be a number: as text that is 4, 2.5 or 1e+22."""
    is_integer = isinstance(value, int) and not isinstance(value, bool)  # an integer of any size
    if is_integer or isinstance(value, float) and math.isfinite(value):
        return repr(value)
    return text(value, column, may_be_empty)


def says_nothing(turn: dict[str, Any]) -> bool:
    """Tell whether an assistant's message has neither words nor thoughts, and calls no tool."""
    others = ("tool_calls", "reasoning_content", "reasoning")
    return not turn["content"].strip() and not any(turn.get(name) for name in others)


def has_empty_answer(record: dict[str, Any]) -> bool:
    """Tell whether a record of supervised training has an answer that is to be trained and says nothing."""
    if "completion" in record:
        return not record["completion"].strip()
    turns = record.get("messages", ())
    return any(t["role"] == "assistant" and t.get("weight", 1) and says_nothing(t) for t in turns)


def with_empty_answer(record: dict[str, Any], fields: tuple[str, ...]) -> dict[str, Any]:
    """Make the answer of a line of a CSV file an empty text, not null, if no column of it has words.

    `fields` are those of --sft_field.
    """
    answers = fields[-1:] or [name for name in record if name.strip().lower() in ANSWERS]
    if any(record.get(name) for name in answers):
        return record
    return {name: "" if name in answers else value for name, value in record.items()}


def text(value: Any, column: str, may_be_empty: bool = False) -> str:
    """Check that a value is a text that a tokenizer can take, and return it."""
    if not isinstance(value, str) or not (value or may_be_empty):
        raise UserError(f"{column} must be a non-empty string, got {short(value)}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{column}: half a surrogate pair, {value[error.start]!r}, is no text (character"
                f" {error.start + 1})"
            ) from None
    if "\0" in value:
        raise UserError(f"{column}: NUL is no text (character {value.index(chr(0)) + 1})")
    return value


def shown(columns: tuple[str, ...]) -> str:
    return short(sorted(columns))
