"""Chat templates: a conversation becomes segments of text, each tokenised on its own, trained or not.

Training, chat and evaluation use one template: RWKV's own or the user's Jinja file. So a model is asked in
the very tokens it was trained on. What stands before an answer, the answer, and the end of its turn are
segments of their own. A chat tokenises them one by one too, because the first is read before the second
exists. Adapters and merged files record their template.
"""

from __future__ import annotations

import re
from typing import Any

from rwkv_miss.files.checkpoint import read_metadata

from ..common.files import read_text
from .chat_template import Template
from .rwkv_template import MODES, RwkvTemplate


def load_template(spec: str, eos: str = "") -> Template:
    """The template `spec`: a name of MODES, the path of a Jinja file, or such a file's content.

    `auto` is rwkv. Checkpoints record the content. `eos` is the text of the tokenizer's end of document.
    Raises UserError for a file that is missing, wrong, or fails on a trial conversation.
    """
    if spec in ("auto", *MODES):
        return RwkvTemplate("rwkv" if spec == "auto" else spec)
    from .jinja_template import JinjaTemplate  # jinja2 is needed for such templates only

    if "{" in spec:
        return JinjaTemplate("the recorded template", spec, eos)
    content = read_text(spec, "a template", f"--template takes auto, {', '.join(MODES)}, or a Jinja file")
    return JinjaTemplate(spec, content, eos)


def recorded_template(spec: str, tokenizer, *paths) -> Template:
    """load_template(), where "auto" is the template that the first checkpoint with a record names."""
    if spec == "auto":
        records: list[dict[str, Any]] = [read_metadata(path) or {} for path in filter(None, paths)]
        spec = next((record["template"] for record in records if record.get("template")), spec)
    return load_template(spec, tokenizer.decode(tokenizer.eod))


def answer_text(text: str, template: Template, opening: str) -> str:
    """What a generated answer says: the text up to the end of its turn, without the thoughts before it.

    `opening` is what the answer begins with, though it was not generated.
    """
    text = opening + (text.partition(template.stop)[0] if template.stop else text)
    return re.sub(r"^\s*<think>.*?</think>", "", text, flags=re.DOTALL).strip()
