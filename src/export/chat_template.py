"""Chat templates in Jinja, as GGUF and Hugging Face folders carry them.

Other programs know nothing of RWKV's template, so it is written here in Jinja; src/data/rwkv_template.py
renders the same. Without it llama.cpp would take the name "rwkv-world" for a template, which Jinja renders as
just that text.

What is between a user's turn and an answer, up to the text that ends turns, is there without
add_generation_prompt as well: llama.cpp feeds its grammars what that flag adds, and a token that ends a turn
would end the program there.
"""

from __future__ import annotations

import re

from ..data.chat_template import CHINESE_HM, Template, begins_thoughts
from ..data.rwkv_template import OTHER_FLOWER, PLAIN, THOUGHTS_TWICE, UNCLOSED_THOUGHTS, RwkvTemplate
from .tool_jinja import tool_jinja

# llama.cpp's C function, which knows no Jinja, takes a template with this text for RWKV's
RECOGNISED = "{{- 'User: ' + message['content']|trim + '\\n\\n' -}}"

JINJA = """\
@HEAD@@MACROS@{%- macro described() -%}
@DESCRIBE@{%- endmacro -%}
{%- if tools -%}
{%- set text = described() -%}
{{- '@SYSTEM@' + text@HARMLESS@ + '@END@' -}}
{%- endif -%}
{%- for message in messages -%}
{%- if tools or not loop.first -%}{{- '@BETWEEN@' -}}{%- endif -%}
{%- if message['role'] == 'assistant' -%}
{%- set content = (message['content'] or '')|trim -%}
{%- set thoughts = (message['reasoning_content'] or message['reasoning'] or '')|trim -%}
{%- if not thoughts and content.startswith('<think>') and '</think>' in content -%}
{%- set thoughts = content.split('</think>')[0][7:]|trim -%}
{%- set content = content.split('</think>')[1:]|join('</think>')|trim -%}
{%- endif -%}
@UNCLOSED@{%- set answer = namespace(text=content) -%}
@CALLS@@CHECK@{{- '@ASK@' -}}
@ANSWER@{%- else -%}
{%- set text = message['content'].replace('\\r\\n', '\\n').split('\\n')|reject('equalto', '')|join('\\n')|trim -%}
@RESULT@{{- @ROLES@[message['role']] + '@COLON@' + text@HARMLESS@ -}}
@USER@{%- endif -%}
{{- '@END@' -}}
{%- endfor -%}
{%- if add_generation_prompt or messages and messages[-1]['role'] != 'assistant' -%}
{%- if messages or tools -%}{{- '@BETWEEN@' -}}{%- endif -%}
{{- '@ASKED@' -}}
{%- endif -%}
{%- if add_generation_prompt -%}{{- '@REST@' -}}{%- endif -%}
"""


def jinja(template: Template) -> str:
    """Write a template in Jinja for other programs, without what only training needs."""
    if isinstance(template, RwkvTemplate):
        return rwkv_jinja(template)
    # {% generation %} marks the trained text; not every engine knows it
    return re.sub(
        r"({%[-+]?)\s*(end)?generation\b\s*([-+]?%})",
        lambda m: f"{m[1]} {'endif' if m[2] else 'if true'} {m[3]}",
        template.record,
    )


def rwkv_jinja(template: RwkvTemplate) -> str:
    """Write RWKV's template in one of its modes, with one of its tool styles."""
    form, opening, tools = template.form, template.opening, tool_jinja(template.tools)
    roles = {
        "system": form.roles["system"],
        "user": form.roles["user"],
        "tool": form.roles[template.tools.result_role],
    }
    asked = form.ask if form.end else ""
    texts = {
        "SYSTEM": form.roles["system"] + form.colon,
        "COLON": form.colon,
        "END": form.end,
        "BETWEEN": form.between,
        "ASK": form.ask + opening,
        "ASKED": asked,
        "REST": form.ask[len(asked) :] + opening,
    }
    parts = {name: text.replace("\n", "\\n") for name, text in texts.items()} | {
        "HEAD": f"{{#- RWKV's. Programs without Jinja know it by {RECOGNISED} -#}}\n"
        if form == PLAIN and not opening
        else "",
        "MACROS": tools.macros,
        "DESCRIBE": tools.describe,
        "CALLS": tools.calls,
        "RESULT": tools.result,
        "HARMLESS": f".replace('{form.end}', '{OTHER_FLOWER}')" if form.end else "",
        "ROLES": repr(roles),
        "UNCLOSED": _raise_if("content.startswith('<think>') and thoughts", THOUGHTS_TWICE)
        + _raise_if("content.startswith('<think>')", UNCLOSED_THOUGHTS)
        if opening
        else "",
        "CHECK": _checks(template),
        "ANSWER": f"{{{{- {_answer(template)} -}}}}\n",
        "USER": f"{{%- if message['role'] == 'user' -%}}{{{{- '{template.after_user}' -}}}}{{%- endif -%}}\n"
        if template.after_user
        else "",
    }
    return re.sub("@([A-Z_]+)@", lambda found: parts[found[1]], JINJA)


def _answer(template: RwkvTemplate) -> str:
    """Write an expression: RwkvTemplate's text of an answer with `thoughts`, after the opening."""
    opening, gap = template.opening, template.form.gap.replace("\n", "\\n")
    closed = "'\\n</think>\\n' + answer.text"
    if not opening:
        return f"'{gap}' + ('<think>\\n' + thoughts + {closed} if thoughts else answer.text)"
    if opening.endswith(CHINESE_HM):
        # llama.cpp cuts a text between bytes, so [1:] would not do here
        rest = f"thoughts.split('{CHINESE_HM}')[1:]|join('{CHINESE_HM}')"
        joint = f"{rest} if thoughts.startswith('{CHINESE_HM}') else ('，' + thoughts if thoughts else '')"
        return f"({joint}) + {closed}"
    if begins_thoughts(opening):
        return f"'>' + ('\\n' + thoughts if thoughts else '') + {closed}"
    return "'>\\n' + answer.text"


def _checks(template: RwkvTemplate) -> str:
    """Write the checks for what RwkvTemplate has no form for."""
    checks = ""
    if end := template.form.end:
        checks += _raise_if(f"'{end}' in thoughts + answer.text", f"an answer holds {end}, which ends a turn")
    if template.opening and not begins_thoughts(template.opening):
        checks += _raise_if("thoughts", "an answer has thoughts, for which this template has no place")
    return checks


def _raise_if(condition: str, words: str) -> str:
    return f"{{%- if {condition} -%}}{{{{- raise_exception('{words}') -}}}}{{%- endif -%}}\n"
