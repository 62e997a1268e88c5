"""Forms of answers that a request asks for: response_format, guided fields, and calls of tools.

All of them become one grammar: what a template leaves open at the beginning of an answer, then the form.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

from rwkv_miss.errors import UserError

from ..common.formatting import short, shown
from ..data.chat_template import Template, begins_thoughts
from ..data.rwkv_template import RwkvTemplate
from ..data.tool_styles import STYLES, ToolStyle, read_parameters
from ..inference.constraint import AnswerForm, GrammarCompiler
from .errors import wrong
from .fields import Fields
from .tools import Tools

Compiler = Callable[[], GrammarCompiler]  # made on first use
COMPOSED = {"allOf", "anyOf", "oneOf", "$ref"}
# space between JSON's tokens, if any: a blank, or a new line that is indented; a weak model fills any room
SPACE = r"\x20|\x0A(\x20{0,16}|\x09{0,4})"
MOST_CALLS = 8  # in an answer whose calls must have the form: a weak model would call until its token limit
# a rule that is lazy ends at the first place where it can
LARK = r"""
TEXT: /(?s:.*)/
GAP: /[ \n]{0,2}/
S: /( |\n( {0,16}|\t{0,4}))?/
thoughts[lazy]: TEXT "</think>"
"""


class AskedForm(NamedTuple):
    """Form that a field asks for: {"json_schema": ...} or {"lark_grammar": ...}."""

    field: str
    part: dict[str, Any]


def read_form(fields: Fields, compiler: Compiler) -> AskedForm | None:
    """Read the one field that asks for a form, if there is one. Raises Refused."""
    readers = {
        "response_format": _response_format,
        "guided_json": lambda value: json_part(_schema(value)),
        "json_schema": lambda value: json_part(_schema(value)),
        "guided_regex": lambda value: compiler().regex(_text(value)),
        "guided_choice": _choice,
        "guided_grammar": lambda value: compiler().grammar(_text(value)),
        "grammar": lambda value: compiler().grammar(_text(value)),
    }
    wanted = None
    for field, read in readers.items():
        if (value := fields.take(field)) is None:
            continue
        try:
            part = read(value)
        except UserError as error:
            raise wrong(field, str(error)) from None
        if part and wanted:
            raise wrong(field, f"{wanted.field} says it already; give one of the two")
        wanted = AskedForm(field, part) if part else wanted
    return wanted


def read_format(form: Fields | None) -> dict[str, Any] | None:
    """Turn {"type", "schema"}, which the newer APIs send, into OpenAI's response_format."""
    if form is None:
        return None
    kind, schema = form.choice("type", ("text", "json_object", "json_schema")), form.take("schema")
    if kind == "json_schema" and schema is None:
        raise form.refuse("schema", None, "a JSON schema")
    return {"type": kind, "json_schema": {"schema": schema}}


def answer_form(
    compiler: Compiler, template: Template, tools: Tools, wanted: AskedForm | None
) -> AnswerForm | None:
    """Compile the form of a chat's answers; None leaves them free. Raises Refused."""
    style = style_of(template) if tools.described else None
    if tools.forced and not style:
        raise wrong("tool_choice", f"the template writes no calls in a known style ({template.name})")
    parts = {"asked": wanted.part} if wanted and not tools.forced else {}
    body, rules = "@asked", ""
    try:
        if style and (tools.forced or wanted):
            body = "calls" if tools.forced else "(calls | @asked)"
            rules = _call_rules(style, tools, parts)
        elif style and not style.before_call.startswith("```"):  # which other answers have, too
            # the first line is only a call's
            line, end, rest = style.before_call.partition("\n")
            begun = f"begun {_literal(end + rest)} function {_literal(style.after_call)}"
            body = f"(TEXT | {begun} more)" if tools.parallel else f"(TEXT | {begun})"
            rules = _call_rules(style, tools, parts) + f"begun[lazy]: TEXT {_literal(line)}\n"
        elif not wanted:
            return None
        return compiler().compile(f"start: {_lead(template)} {body}\n{rules}{LARK}", parts)
    except (UserError, RecursionError) as error:
        if tools.forced or wanted:
            field = "tools" if tools.forced else wanted.field
            raise wrong(field, f"{error}{_largest(list(parts.values()))}") from None
        return None  # without llguidance, and with schemas that it can't read


def text_form(compiler: Compiler, wanted: AskedForm | None) -> AnswerForm | None:
    """Compile the form of a completion. Raises Refused."""
    try:
        return compiler().compile("start: @asked", {"asked": wanted.part}) if wanted else None
    except (UserError, RecursionError) as error:
        raise wrong(wanted.field, f"{error}{_largest(wanted.part)}") from None


def json_part(schema: dict[str, Any], lenient: bool = False) -> dict[str, Any]:
    """Make a part of JSON; if lenient, keywords that can't be held are left out."""
    options = {"whitespace_pattern": SPACE, "lenient": lenient, "coerce_one_of": lenient}
    return {"json_schema": {**schema, "x-guidance": options}}


def style_of(template: Template) -> ToolStyle | None:
    """Return the style in which a template writes calls, a Jinja one by a trial; None if it has another."""
    if isinstance(template, RwkvTemplate):
        return template.tools
    call = {"type": "function", "function": {"name": "trial", "arguments": {"a": 1}}}
    messages = [
        {"role": "user", "content": "A question?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    try:
        written = "".join(text for text, _ in template.segments(messages))
    except UserError:
        return None
    # a call in markdown ends with one in json
    styles = (STYLES[name] for name in ("hermes", "markdown", "json"))
    text = written.removesuffix(template.turn_end).rstrip()
    return next((style for style in styles if style.parse(text)[1]), None)


def _response_format(value: Any) -> dict[str, Any] | None:
    form = Fields({"response_format": value}).inner("response_format")
    kind = form.choice("type", ("text", "json_object", "json_schema"))
    if kind == "json_object":
        return json_part({"type": "object", **_schema(form.take("schema") or {})})
    if kind == "text" or kind is None:
        return None
    described = form.inner("json_schema")
    if described is None or described.take("schema") is None:
        raise UserError('expected {"type": "json_schema", "json_schema": {"name": ..., "schema": ...}}')
    return json_part(_schema(described.take("schema")))


def _schema(value: Any) -> dict[str, Any]:
    """Read a JSON schema, or its text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise UserError(f"got {shown(value)}, expected a JSON schema: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"got {shown(value)}, expected a JSON schema, which is an object")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise UserError(f"got {shown(value)}, expected a text")
    return value


def _choice(value: Any) -> dict[str, Any]:
    if not isinstance(value, list) or not value or not all(isinstance(one, str) and one for one in value):
        raise UserError(f"got {shown(value)}, expected a list of texts")
    return {"lark_grammar": f"start: {' | '.join(map(_literal, value))}"}


def _lead(template: Template) -> str:
    """Write what comes before the form: the end of what the opening leaves open, thoughts, a gap."""
    if begins_thoughts(template.opening):
        return "thoughts GAP"
    return '">" GAP' if template.opening and not template.opening.rstrip().endswith(">") else "GAP"


def _call_rules(style: ToolStyle, tools: Tools, parts: dict[str, Any]) -> str:
    """Write the rules of calls, and add the schemas of their arguments to the parts."""
    functions = []
    for number, function in enumerate(tools.forced or tools.functions):
        parts[f"arguments{number}"] = _arguments(function)
        name = json.dumps(function["name"], ensure_ascii=False)
        words = " S ".join(map(_literal, ["{", '"name"', ":", name, ",", '"arguments"', ":"]))
        functions.append(f'S {words} S @arguments{number} S "}}"')
    call = f"{_literal(style.before_call)} function {_literal(style.after_call)}"
    calls = "call more" if tools.parallel else "call"
    more = f"(S call){{0,{MOST_CALLS - 1}}}"
    return f"calls: {calls}\nmore: {more}\ncall: {call}\nfunction: {' | '.join(functions)}\n"


def _arguments(function: dict[str, Any]) -> dict[str, Any]:
    """Make the part of a function's arguments, which has no unknown names unless the schema says so."""
    schema = read_parameters(function)
    if not COMPOSED & schema.keys():
        schema = {"additionalProperties": False, **schema}
    return json_part({"type": "object", **schema}, lenient=not function.get("strict"))


def _largest(value: Any) -> str:
    """Name the keyword with the longest list or text, or the largest number, if one is large."""
    sizes, waiting = {"": 999}, [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting += value
        elif isinstance(value, dict):
            waiting += value.values()
            for key, one in value.items():
                size = one if isinstance(one, int) else len(one) if isinstance(one, (str, list, dict)) else 0
                sizes[key] = max(size, sizes.get(key, 0))
    key = max(sizes, key=sizes.get)
    return f"; its largest keyword is {short(key)}, of {sizes[key]:,}" if key else ""


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
