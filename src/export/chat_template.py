"""Chat templates in Jinja, as GGUF and Hugging Face folders carry them.

Other programs know nothing of RWKV's template, so it is written here in Jinja; src/data/rwkv_template.py
renders the same. Without it llama.cpp would take the name "rwkv-world", which Jinja renders as just these words.
"""

from __future__ import annotations

import re

from ..data.chat_template import Template
from ..data.rwkv_template import ROLES, RwkvTemplate
from .tool_jinja import tool_jinja

# llama.cpp's C function, which knows no Jinja, takes a template with this text for RWKV's
RECOGNISED = "{{- 'User: ' + message['content']|trim + '\\n\\n' -}}"

JINJA = """\
HEAD{%- if tools -%}
{{- 'System: ' -}}
TOOLS{%- endif -%}
{%- for message in messages -%}
{%- if tools or not loop.first -%}{{- '\\n\\n' -}}{%- endif -%}
{%- if message['role'] == 'assistant' -%}
{%- set content = (message['content'] or '')|trim -%}
{%- set thoughts = (message['reasoning_content'] or message['reasoning'] or '')|trim -%}
{%- if not thoughts and content.startswith('<think>') and '</think>' in content -%}
{%- set thoughts = content.split('</think>')[0][7:]|trim -%}
{%- set content = content.split('</think>')[1:]|join('</think>')|trim -%}
{%- endif -%}
CHECK{%- set answer = namespace(text=content) -%}
CALLS{{- 'Assistant:OPENING' -}}
ANSWER{%- else -%}
{%- set text = message['content'].replace('\\r\\n', '\\n').split('\\n')|reject('equalto', '')|join('\\n')|trim -%}
RESULT{{- {'system': 'System', 'user': 'User', 'tool': 'RESULT_ROLE'}[message['role']] + ': ' + text -}}
USER{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{%- if messages or tools -%}{{- '\\n\\n' -}}{%- endif -%}
{{- 'Assistant:OPENING' -}}
{%- endif -%}
"""
UNCLOSED = """\
{%- if content.startswith('<think>') -%}{{- raise_exception('an answer opens <think> and never closes it') -}}{%- endif -%}
"""
NO_THOUGHTS = """\
{%- if thoughts -%}{{- raise_exception('an answer has thoughts, for which this template has no place') -}}{%- endif -%}
"""


def jinja(template: Template) -> str:
    """Jinja source that gives what the template does, for other programs; without what only training needs."""
    if isinstance(template, RwkvTemplate):
        return rwkv_jinja(template)
    # {% generation %} tells what is trained; not every engine knows it
    return re.sub(
        r"({%[-+]?)\s*(end)?generation\b\s*([-+]?%})",
        lambda m: f"{m[1]} {'endif' if m[2] else 'if true'} {m[3]}",
        template.record,
    )


def rwkv_jinja(template: RwkvTemplate) -> str:
    """RWKV's template in one of its modes."""
    after_user, opening = template.after_user, template.opening
    with_thoughts = "'<think>\\n' + thoughts + '\\n</think>\\n' + answer.text"
    if not opening:
        head, check = f"{{#- RWKV's. Programs without Jinja know it by {RECOGNISED} -#}}\n", ""
        answer = f"{{{{- ' ' + ({with_thoughts} if thoughts else answer.text) -}}}}\n"
    elif "</think" not in opening:
        head, check = "", UNCLOSED
        answer = "{{- '>\\n' + (thoughts + '\\n' if thoughts else '') + '</think>\\n' + answer.text -}}\n"
    else:
        head, check = "", UNCLOSED + NO_THOUGHTS
        answer = "{{- '>\\n' + answer.text -}}\n"
    user = ""
    if after_user:
        user = f"{{%- if message['role'] == 'user' -%}}{{{{- '{after_user}' -}}}}{{%- endif -%}}\n"
    tools = tool_jinja(template.tools)
    parts = {
        "HEAD": head + tools.macros,
        "TOOLS": tools.describe,
        "CALLS": tools.calls,
        "RESULT_ROLE": ROLES[template.tools.result_role],
        "RESULT": tools.result,
        "CHECK": check,
        "ANSWER": answer,
        "USER": user,
        "OPENING": opening.replace("\n", "\\n"),
    }
    return re.sub("|".join(parts), lambda found: parts[found[0]], JINJA)


def thinks_aloud(template: Template) -> bool:
    """Whether the template asks for answers that begin with thoughts, in which a blank line ends nothing."""
    if not isinstance(template, RwkvTemplate):
        return False
    return "<think" in template.opening and "</think" not in template.opening
