"""Tool styles of src/data/tool_styles.py in Jinja, for chat_template.py.

Jinja has no JSON without spaces and no signatures, so macros write them; some engines know nothing of tojson
but its indent. Wrong tools are reported in training. Here only a type that a signature can't write is an
exception; names that it can't write are not checked.
"""

from __future__ import annotations

from typing import NamedTuple

from ..data.tool_styles import ONLY_A_CALL, SIMPLE_TYPES, UNWRITABLE, ToolStyle


class ToolJinja(NamedTuple):
    """Jinja source of one style."""

    macros: str
    describe: str  # writes the words about `tools`
    calls: str  # adds the calls of `message` to `answer.text`
    result: str  # turns a tool's `message` into the `text` of its turn


COMPACT = """\
{%- macro compact(value) -%}
{%- if value is mapping -%}
{{- '{' -}}
{%- for key, inner in value.items() -%}{{- ('' if loop.first else ',') + key|tojson + ':' + compact(inner) -}}{%- endfor -%}
{{- '}' -}}
{%- elif value is sequence and value is not string -%}
{{- '[' -}}
{%- for inner in value -%}{{- ('' if loop.first else ',') + compact(inner) -}}{%- endfor -%}
{{- ']' -}}
{%- else -%}{{- value|tojson -}}{%- endif -%}
{%- endmacro -%}
"""
SIGNATURES = f"""\
{{%- macro typed(schema, kind) -%}}
{{%- if kind == 'array' and schema['items'] is mapping -%}}
{{%- set items = type_of(schema['items']) -%}}
{{{{- '(' + items + ')[]' if ' | ' in items else items + '[]' -}}}}
{{%- elif kind in {["array", *SIMPLE_TYPES]} -%}}{{{{- kind -}}}}
{{%- else -%}}{{{{- raise_exception("a signature can't write a parameter's type") -}}}}
{{%- endif -%}}
{{%- endmacro -%}}
{{%- macro type_of(schema) -%}}
{{%- for key in {[*UNWRITABLE]} -%}}
{{%- if key in schema -%}}{{{{- raise_exception("a signature can't write " + key) -}}}}{{%- endif -%}}
{{%- endfor -%}}
{{%- if 'const' in schema -%}}{{{{- schema['const']|tojson -}}}}
{{%- elif 'enum' in schema -%}}
{{%- for value in schema['enum'] -%}}{{{{- ('' if loop.first else ' | ') + value|tojson -}}}}{{%- endfor -%}}
{{%- elif schema['anyOf'] -%}}
{{%- for one in schema['anyOf'] -%}}{{{{- ('' if loop.first else ' | ') + type_of(one) -}}}}{{%- endfor -%}}
{{%- elif schema['type'] and schema['type'] is sequence and schema['type'] is not string -%}}
{{%- for kind in schema['type'] -%}}{{{{- ('' if loop.first else ' | ') + typed(schema, kind) -}}}}{{%- endfor -%}}
{{%- else -%}}{{{{- typed(schema, schema['type']) -}}}}
{{%- endif -%}}
{{%- endmacro -%}}
"""
# text around the description of each tool, which has its `function`, and between two of them
TOOLS = """\
{{- 'BEFORE' -}}
{%- for tool in tools -%}
{%- set function = tool['function'] or tool -%}
{%- set parameters = function['parameters'] or {'type': 'object', 'properties': {}} -%}
{%- if not loop.first -%}{{- 'BETWEEN' -}}{%- endif -%}
TOOL{%- endfor -%}
{{- 'AFTER' -}}
"""
JSON_TOOL = """\
{{- '{"name":' + function['name']|tojson -}}
{%- if function['description'] -%}{{- ',"description":' + function['description']|tojson -}}{%- endif -%}
{{- ',"arguments":' + compact(parameters['properties'] or {}) + '}' -}}
"""
SIGNATURE_TOOL = """\
{{- '- ' + function['name'] + '(' -}}
{%- for name, schema in (parameters['properties'] or {}).items() -%}
{{- ('' if loop.first else ', ') + name + ('' if name in (parameters['required'] or []) else '?') + ': ' + type_of(schema) -}}
{%- endfor -%}
{{- ')' -}}
"""
MARKDOWN_TOOL = """\
{{- '### `' + function['name'] + '`\\n**Description:** ' -}}
{{- (function['description'] or '').replace('\\r\\n', '\\n').split('\\n')|reject('equalto', '')|join('\\n')|trim -}}
{{- '\\n**Parameters:**\\n```json\\n' + parameters|tojson(indent=2) + '\\n```' -}}
"""
HERMES_TOOL = """\
{{- tool|tojson -}}
"""


CALLS = """\
{%- for call in message['tool_calls'] or [] -%}
{%- set function = call['function'] or call -%}
{%- set arguments = function['arguments'] -%}
{%- set answer.text = answer.text + ('\\n' if answer.text else '') + 'BEFORE' + (CALL) + 'AFTER' -%}
{%- endfor -%}
"""
RESULT = """\
{%- if message['role'] == 'tool' -%}{%- set text = ('BEFORE' + text + 'AFTER')|trim -%}{%- endif -%}
"""
# JSON of a call; its arguments may be JSON as text
SHORT_CALL = (
    "'{\"name\":' + function['name']|tojson + ',\"arguments\":'"
    " + (arguments if arguments is string else compact(arguments)) + '}'"
)
SPACED_CALL = (
    "'{\"name\": ' + function['name']|tojson + ', \"arguments\": '"
    " + (arguments if arguments is string else arguments|tojson) + '}'"
)
INDENTED_CALL = (
    "'{\\n  \"name\": ' + function['name']|tojson + ',\\n  \"arguments\": ' + arguments + '\\n}'"
    " if arguments is string else {'name': function['name'], 'arguments': arguments}|tojson(indent=2)"
)
# style -> macros, text before, in, between and after the tools, a call
PARTS = {
    "json": (COMPACT, "Tools:\n[\n", JSON_TOOL, ",\n", f"\n]\n{ONLY_A_CALL}", SHORT_CALL),
    "signatures": (COMPACT + SIGNATURES, "Tools:\n", SIGNATURE_TOOL, "\n", f"\n{ONLY_A_CALL}", SHORT_CALL),
    "markdown": ("", "", MARKDOWN_TOOL, "\n\n", "", INDENTED_CALL),
    "hermes": ("", "<tools>\n", HERMES_TOOL, "\n", "\n</tools>", SPACED_CALL),
}


def tool_jinja(style: ToolStyle) -> ToolJinja:
    """Write a tool style in Jinja."""
    macros, before, tool, between, after, call = PARTS[style.name]
    return ToolJinja(
        macros,
        _filled(TOOLS, BEFORE=before, BETWEEN=between, AFTER=after).replace("TOOL", tool),
        _filled(CALLS, BEFORE=style.before_call, AFTER=style.after_call).replace("CALL", call),
        _filled(RESULT, BEFORE=style.before_result, AFTER=style.after_result),
    )


def _filled(source: str, **words: str) -> str:
    """Fill words into Jinja source in the place of names; they stand in quotes there."""
    for name, text in words.items():
        source = source.replace(name, text.replace("\n", "\\n"))
    return source
