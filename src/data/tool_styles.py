"""Tool styles: the text of tools, their calls and their results, by --tool_style.

Tools and calls come as OpenAI's API has them. A tool is {"type": "function", "function": FUNCTION} or
FUNCTION itself, {"name", "description", "parameters": JSON schema of an object}. A call is {"function":
{"name", "arguments": an object, or its JSON as text}}.

A style writes only words. The template puts them into turns: the tools into a System turn, the calls at the
end of an answer, a result into a turn of its own. docs/templates.md shows all of them.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Callable
from typing import Any

from rwkv_miss.errors import UserError

from ..common.files import read_text
from ..common.formatting import short, shown
from .chat_template import clean

ONLY_A_CALL = "Return only a JSON function call."
KEYS = ("name", "description", "parameters", "strict", "type")  # fields of a function
SIMPLE_TYPES = ("string", "number", "integer", "boolean", "null")
# parts of a JSON schema that a signature has no words for
UNWRITABLE = "properties additionalProperties patternProperties prefixItems $ref oneOf allOf not".split()
# characters that would end a name in a signature are left out
WORD = re.compile(r"[^\s(),:?|`\"]+")


@dataclasses.dataclass(frozen=True)
class ToolStyle:
    """Style of tools. Every method raises UserError for tools or calls that it has no form for."""

    name: str
    describe: Callable[[list[dict]], str]  # tools -> the words of the System turn
    dump: Callable[[Any], str]  # a call -> JSON
    before_call: str
    after_call: str
    result_role: str  # user or tool
    before_result: str = ""
    after_result: str = ""

    def calls(self, tool_calls: list[dict]) -> str:
        """Write the end of an answer with these calls."""
        return "\n".join(
            f"{self.before_call}{self.dump(read_call(call))}{self.after_call}" for call in tool_calls
        )

    def result(self, content: str) -> tuple[str, str]:
        """Return (the role of the turn, its words) for the result of a call."""
        return self.result_role, f"{self.before_result}{clean(content)}{self.after_result}".strip()

    def parse(self, text: str) -> tuple[str, list[dict]]:
        """Parse an answer into (content, tool_calls): the inverse of calls().

        Calls are read from the end of an answer, with "arguments" as JSON text. Text that is no valid call
        stays in the content, and so do thoughts before it; thoughts that are still open hold no calls.
        """
        if text.startswith("<think") and "</think>" not in text:
            return text, []
        begin, end = (
            re.compile(r"\s*".join(map(re.escape, words.split())))
            for words in (self.before_call, self.after_call)
        )
        place = 0
        while match := begin.search(text, place):
            calls, place = _calls(text, match.start(), begin, end)
            if place == len(text):
                return text[: match.start()].strip(), calls
            # calls that other text follows are none at the end, wherever reading begins
            place = max(place, match.start() + 1)
        return text, []


def _calls(text: str, place: int, begin: re.Pattern, end: re.Pattern) -> tuple[list[dict], int]:
    """Return (the calls that follow each other from `place` on, the place of the next other text)."""
    calls: list[dict] = []
    while match := begin.match(text, place):
        try:
            value, after = DECODER.raw_decode(text, _after_space(text, match.end()))
            call = read_call(value)
        except (ValueError, RecursionError, UserError):
            break
        calls.append({"type": "function", "function": {**call, "arguments": _dumps(call["arguments"])}})
        place = _after_space(text, after)
        # many models leave the closing words out, and the opening ones may begin alike
        if (closed := end.match(text, place)) and not begin.match(text, place):
            place = _after_space(text, closed.end())
    return calls, place


def _after_space(text: str, place: int) -> int:
    return re.compile(r"\s*").match(text, place).end()


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


DECODER = json.JSONDecoder(parse_constant=_no_constant)


_dumps = functools.partial(json.dumps, ensure_ascii=False)
_compact = functools.partial(_dumps, separators=(",", ":"))
_indented = functools.partial(_dumps, indent=2)


def read_call(call: Any) -> dict[str, Any]:
    """Read {"name", "arguments": object} of a call. Raises UserError for any other value."""
    try:
        function = call.get("function", call)
        name, arguments = function["name"], function["arguments"]
        if isinstance(arguments, str):
            arguments = DECODER.decode(arguments)
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError):
        name = arguments = None
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        raise UserError(
            'a tool call must be {"function": {"name": text, "arguments": object, or its JSON as text}}, got'
            f" {shown(call)}"
        )
    return {"name": name, "arguments": arguments}


def read_function(tool: Any) -> dict[str, Any]:
    """Read the function of a tool, which has a name. Raises UserError for any other value."""
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    description = function.get("description") if isinstance(function, dict) else None
    if not isinstance(name, str) or not name or not isinstance(description, (str, type(None))):
        raise UserError(
            'a tool must be {"type": "function", "function": {"name": text, "description": text,'
            f' "parameters": JSON schema}}}}, got {shown(tool)}'
        )
    return function


def read_parameters(function: dict[str, Any]) -> dict[str, Any]:
    """Read the JSON schema of a function's parameters. Raises UserError unless it is one of an object."""
    name, schema = function["name"], _without_nulls(function.get("parameters"))
    if schema is None:
        if others := [key for key in function if key not in KEYS]:
            raise UserError(
                f'tool {name}: its arguments are described by "parameters", not by {short(others[0])}'
            )
        return {"type": "object", "properties": {}}
    properties = schema.get("properties", {}) if isinstance(schema, dict) else None
    required = schema.get("required", []) if isinstance(schema, dict) else None
    if (
        not isinstance(properties, dict)
        or not all(isinstance(value, dict) for value in properties.values())
        or not isinstance(required, list)
        or schema.get("type", "object") != "object"
    ):
        raise UserError(
            f'tool {name}: "parameters" must be the JSON schema of an object, {{"type": "object",'
            f' "properties": {{"a": {{"type": "string"}}, ...}}, "required": ["a"]}}, got {shown(schema)}'
        )
    return schema


def _without_nulls(schema: Any) -> Any:
    """Remove nulls from a JSON schema: a table has them where another row's tools have a value."""
    if isinstance(schema, list):
        return [_without_nulls(value) for value in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: value if key in ("enum", "const", "default") else _without_nulls(value)
        for key, value in schema.items()
        if value is not None or key in ("const", "default")
    }


def _as_json(tools: list[dict]) -> str:
    lines = []
    for function in map(read_function, tools):
        described = {"name": function["name"]}
        if function.get("description"):
            described["description"] = function["description"]
        lines.append(_compact({**described, "arguments": read_parameters(function).get("properties", {})}))
    return "\n".join(["Tools:", "[", ",\n".join(lines), "]", ONLY_A_CALL])


def _as_signatures(tools: list[dict]) -> str:
    return "\n".join(["Tools:", *(f"- {signature(read_function(tool))}" for tool in tools), ONLY_A_CALL])


def signature(function: dict[str, Any]) -> str:
    """Write `name(a: string, b?: integer)`; an optional parameter has a question mark.

    Raises UserError for a schema that can't be written so, such as an object within the parameters.
    """
    schema = read_parameters(function)
    required = schema.get("required", [])
    parameters = []
    for name, kind in schema.get("properties", {}).items():
        try:
            if not WORD.fullmatch(name):
                raise UserError(f"the name {short(name)}")
            parameters.append(f"{name}{'' if name in required else '?'}: {_type(kind)}")
        except UserError as error:
            raise UserError(
                f"tool {function['name']}, parameter {name}: a signature can't write {error};"
                " --tool_style json can"
            ) from None
    if not WORD.fullmatch(function["name"]):
        raise UserError(f"tool {function['name']}: a signature can't write this name; --tool_style json can")
    return f"{function['name']}({', '.join(parameters)})"


def _type(schema: Any) -> str:
    """Write a type as `string`, `string[]`, `"a" | "b"`, by its JSON schema, or raise UserError."""
    if not isinstance(schema, dict) or any(key in schema for key in UNWRITABLE):
        raise UserError(shown(schema))
    if "const" in schema:
        return _literals([schema["const"]])
    if "enum" in schema:
        return _literals(schema["enum"])
    if isinstance(schema.get("anyOf"), list) and schema["anyOf"]:
        return " | ".join(_type(one) for one in schema["anyOf"])
    kinds = schema.get("type")
    if isinstance(kinds, list) and kinds:
        return " | ".join(_type({**schema, "type": kind}) for kind in kinds)
    if kinds == "array":
        if "items" not in schema:
            return "array"
        items = _type(schema["items"])
        return f"({items})[]" if " | " in items else f"{items}[]"
    if kinds not in SIMPLE_TYPES:
        raise UserError(shown(schema))
    return kinds


def _literals(values: Any) -> str:
    if not isinstance(values, list) or not values or any(isinstance(value, (dict, list)) for value in values):
        raise UserError(shown(values))
    return " | ".join(map(_dumps, values))


def _as_markdown(tools: list[dict]) -> str:
    parts = []
    for function in map(read_function, tools):
        description = clean(function.get("description") or "")
        parts.append(
            f"### `{function['name']}`\n**Description:** {description}\n**Parameters:**\n"
            f"```json\n{_indented(read_parameters(function))}\n```"
        )
    return "\n\n".join(parts)


def _as_xml(tools: list[dict]) -> str:
    for tool in tools:
        read_function(tool)
    return "\n".join(["<tools>", *map(_dumps, tools), "</tools>"])


FENCE = ("```json\n", "\n```")
STYLES = {
    style.name: style
    for style in (
        ToolStyle("json", _as_json, _compact, *FENCE, "user", "Function output:\n"),
        ToolStyle("signatures", _as_signatures, _compact, *FENCE, "user", "Function output:\n"),
        ToolStyle(
            "markdown", _as_markdown, _indented, f"**Tool Call:**\n{FENCE[0]}", FENCE[1], "tool", *FENCE
        ),
        ToolStyle("hermes", _as_xml, _dumps, "<tool_call>\n", "\n</tool_call>", "tool"),
    )
}


def parse_any(text: str) -> tuple[str, list[dict]]:
    """Parse an answer of an unknown tool style, as with a Jinja template."""
    # a call in markdown ends with one in json
    for name in ("hermes", "markdown", "json"):
        content, calls = STYLES[name].parse(text)
        if calls:
            return content, calls
    return text, []


def read_tools(path: str) -> list[dict]:
    """Read the tools of a JSON file: a list of them, {"tools": such a list}, or one tool.

    Raises UserError for any other file.
    """
    expected = "tools are a JSON file with a list of {name, description, parameters}, as in OpenAI's API"
    text = read_text(path, "tools", expected)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON: {error}; {expected}") from None
    if isinstance(value, dict):
        value = value.get("tools", [value])
    if not isinstance(value, list) or not value:
        raise UserError(f"{path}: got {shown(value)}; {expected}")
    for tool in value:
        try:
            read_function(tool)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
    return value


def in_order_of_calls(messages: list[dict]) -> list[dict]:
    """Sort the results after each answer in the order of its calls.

    The texts have no ids, so the order tells which result belongs to which call. Raises UserError for a
    `tool_call_id` that no call has. Results or calls without ids stay as they are.
    """
    ordered: list[dict] = []
    ids: list[str] = []  # ids of the last answer's calls
    results: list[dict] = []

    for message in messages:
        if message["role"] == "tool":
            call_id = message.get("tool_call_id")
            if ids and call_id is not None and call_id not in ids:
                raise UserError(
                    f"tool_call_id {short(call_id)} is of no call in the answer before; it has"
                    f" {', '.join(map(short, ids))}"
                )
            results.append(message)
            continue
        ordered += [*_sorted(results, ids), message]
        results, ids = [], _ids(message)
    return ordered + _sorted(results, ids)


def _ids(message: dict) -> list[str]:
    """Return the ids of an answer's calls; [] if one has none."""
    calls = message.get("tool_calls") or []
    ids = [call["id"] for call in calls if isinstance(call, dict) and isinstance(call.get("id"), str)]
    return ids if len(ids) == len(calls) else []


def _sorted(results: list[dict], ids: list[str]) -> list[dict]:
    if not all(result.get("tool_call_id") in ids for result in results):
        return results
    return sorted(results, key=lambda result: ids.index(result["tool_call_id"]))
