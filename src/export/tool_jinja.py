"""The tool styles of src/data/tool_styles.py in Jinja, for chat_template.py.

Jinja has no JSON without spaces and no signatures, so macros write them; not every engine knows more of tojson
than its indent. What is wrong with tools is for the training to say; only what a signature can't write is an
exception here, too.
"""

from __future__ import annotations

from typing import NamedTuple

from ..data.tool_styles import ONLY_A_CALL, SIMPLE_TYPES, STYLES, UNWRITABLE


class ToolJinja(NamedTuple):
    """Jinja source of one style."""

    macros: str
    describe: str  # writes the words about `tools`
    call: str  # an expression: the JSON of a call with `function` and `arguments`, which may be JSON as text


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
{{%- if kind == 'array' and 'items' in schema -%}}
{{%- set items = type_of(schema['items']) -%}}
{{{{- '(' + items + ')[]' if ' | ' in items else items + '[]' -}}}}
{{%- elif kind == 'array' or kind in {[*SIMPLE_TYPES]} -%}}{{{{- kind -}}}}
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
# around the description of each tool, which has its `function`, and what parts it from the one before
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


def _tools(before: str, tool: str, between: str, after: str) -> str:
    described = TOOLS.replace("BEFORE", before).replace("BETWEEN", between).replace("AFTER", after)
    return described.replace("TOOL", tool)


AS_TEXT = "arguments if arguments is string else "
SHORT_CALL = (
    f"'{{\"name\":' + function['name']|tojson + ',\"arguments\":' + ({AS_TEXT}compact(arguments)) + '}}'"
)
SPACED_CALL = (
    f"'{{\"name\": ' + function['name']|tojson + ', \"arguments\": ' + ({AS_TEXT}arguments|tojson) + '}}'"
)
LONG_CALL = (
    "'{\\n  \"name\": ' + function['name']|tojson + ',\\n  \"arguments\": ' + arguments + '\\n}'"
    " if arguments is string else {'name': function['name'], 'arguments': arguments}|tojson(indent=2)"
)
AFTER = f"\\n{ONLY_A_CALL}"
JINJA = {
    "json": ToolJinja(COMPACT, _tools("Tools:\\n[\\n", JSON_TOOL, ",\\n", "\\n]" + AFTER), SHORT_CALL),
    "signatures": ToolJinja(
        COMPACT + SIGNATURES, _tools("Tools:\\n", SIGNATURE_TOOL, "\\n", AFTER), SHORT_CALL
    ),
    "markdown": ToolJinja("", _tools("", MARKDOWN_TOOL, "\\n\\n", ""), LONG_CALL),
    "hermes": ToolJinja("", _tools("<tools>\\n", HERMES_TOOL, "\\n", "\\n</tools>"), SPACED_CALL),
}


def calls_jinja(style: str) -> str:
    """Sets `said.text` to the calls of a `message`, empty where it has none."""
    tool_style = STYLES[style]
    before, after = (words.replace("\n", "\\n") for words in (tool_style.before_call, tool_style.after_call))
    return f"""\
{{%- set said = namespace(text='') -%}}
{{%- for call in message['tool_calls'] or [] -%}}
{{%- set function = call['function'] or call -%}}
{{%- set arguments = function['arguments'] -%}}
{{%- set said.text = said.text + ('' if loop.first else '\\n') + '{before}' + ({JINJA[style].call}) + '{after}' -%}}
{{%- endfor -%}}
"""
