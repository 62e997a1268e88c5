"""Preview without data, for scripts.preview: a small conversation in each form of a template."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from src.data.chat_template import CHINESE_HM, Template, begins_thoughts
from src.data.dataset import Document
from src.data.encode import Encoder
from src.data.rwkv_template import MODES, RwkvTemplate
from src.data.tool_styles import STYLES
from src.inference.sampling import recommended

SYSTEM = {"role": "system", "content": "Be brief."}
# question, thoughts, answer
TURNS = (("6 times 7?", "It is 42.", "42."), ("7 times 7?", "It is 49.", "49."))
CHINESE_THOUGHTS = (f"{CHINESE_HM}，是42。", f"{CHINESE_HM}，是49。")
NUMBER = {"type": "number"}
TOOL = {
    "type": "function",
    "function": {
        "name": "multiply",
        "description": "Multiplies two numbers.",
        "parameters": {"type": "object", "properties": {"a": NUMBER, "b": NUMBER}, "required": ["a", "b"]},
    },
}
CALLS = [{"type": "function", "function": {"name": "multiply", "arguments": {"a": 6, "b": 7}}}]


def forms(encoder: Encoder, every_mode: bool, every_style: bool) -> Iterator[tuple[str, list[Document]]]:
    """Yield (description, documents) for the encoder's template; if asked, in all its modes or tool
    styles."""
    template = encoder.template

    def written(form: Template, messages: list[dict], tools: list[dict] | None = None) -> list[Document]:
        record = {"messages": messages, **({"tools": tools} if tools else {})}
        return [Document(*tokens) for tokens in dataclasses.replace(encoder, template=form).encode(record)]

    modes = [RwkvTemplate(name, template.tools.name) for name in MODES] if every_mode else [template]
    for mode in modes:
        yield about(mode), written(mode, conversation(mode))
        if not mode.opening:
            yield f"template {mode.name}, with thoughts", written(mode, conversation(mode, thinks=True))
    if isinstance(template, RwkvTemplate):
        for style in STYLES if every_style else [template.tools.name]:
            form = RwkvTemplate(template.name, style)
            yield f"tools, --tool_style {style}", written(form, calling(form), [TOOL])


def about(template: Template) -> str:
    """Describe the template: its name, the end of its answers, and the recommended sampling."""
    best = recommended(template.opening)
    ends = f", an answer ends at {' or '.join(map(repr, template.stops))}" if template.stops else ""
    return f"template {template.name}{ends}{f'; recommended: {best}' if best else ''}"


def conversation(template: Template, thinks: bool = False) -> list[dict]:
    """Make two questions with their answers, with thoughts if the template begins them."""
    messages = [SYSTEM]
    for turn, chinese in zip(TURNS, CHINESE_THOUGHTS, strict=True):
        question, thoughts, answer = turn
        message = {"role": "assistant", "content": answer}
        if thinks or begins_thoughts(template.opening):
            message["reasoning_content"] = chinese if template.opening.endswith(CHINESE_HM) else thoughts
        messages += [{"role": "user", "content": question}, message]
    return messages


def calling(template: Template) -> list[dict]:
    """Make a question, the call of a tool, its result and the answer."""
    thoughts = {"reasoning_content": "I need the tool."} if begins_thoughts(template.opening) else {}
    return [
        {"role": "user", "content": TURNS[0][0]},
        {"role": "assistant", "content": "", "tool_calls": CALLS, **thoughts},
        {"role": "tool", "content": '{"product": 42}'},
        {"role": "assistant", "content": TURNS[0][2], **thoughts},
    ]
