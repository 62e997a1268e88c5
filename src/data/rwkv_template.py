"""RWKV's own chat template, with the think modes of the G1 models."""

from __future__ import annotations

from typing import NamedTuple

from rwkv_miss.errors import UserError
from rwkv_miss.files.template_record import HERMES

from .chat_template import Segment, TokenEnd, clean, thoughts_of, weight_of
from .tool_styles import STYLES, in_order_of_calls

ROLES = {"system": "System", "user": "User", "assistant": "Assistant", "tool": "Tool"}
TURN_END = "\n\n"


class Mode(NamedTuple):
    """How RWKV's template asks for an answer."""

    after_user: str  # what follows the user's words
    opening: str  # what follows `Assistant:`


# As the G1 models were trained: see docs/templates.md. The openings stop inside a tag: the `>` that closes it
# may be one token with what comes next.
MODES = {
    "rwkv": Mode("", ""),
    "think": Mode("", " <think"),
    "think-normal": Mode(" (think)", " <think"),
    "think-short": Mode(" (think a bit)", " <think"),
    "think-long": Mode(" (think a lot)", " <think"),
    "think-normal-2025": Mode(" think", " <think"),
    "think-short-2025": Mode(" think a bit", " <think"),
    "think-long-2025": Mode(" think a lot", " <think"),
    "fake-think": Mode("", " <think>\n</think"),
    "fake-think-compact": Mode("", " <think></think"),
}


class RwkvTemplate:
    """`User: ...`, blank line, `Assistant: ...`.

    A blank line ends a turn, so that only the model's own turns may hold one. An assistant's message may have
    thoughts: as `reasoning_content`, as `reasoning`, or as `<think>...</think>` before its content. It may
    have `tool_calls` as in OpenAI's API. Tools are described in a System turn. `tool_style`, one of
    tool_styles.STYLES, says how.
    """

    stops = (TURN_END + "User:",)
    asked_only = ""

    def __init__(self, name: str, tool_style: str = HERMES):
        self.name, self.record = name, f"{name}:{tool_style}"
        self.after_user, self.opening = MODES[name]
        self.tools = STYLES[tool_style]

    def segments(
        self, messages: list[dict], tools: list[dict] | None = None, ask: bool = False
    ) -> list[Segment]:
        segments: list[Segment] = []
        waiting = [{"role": "system", "content": self.tools.describe(tools)}] if tools else []

        def add(segment: Segment) -> None:
            if segments:
                segments.append(Segment(TURN_END, segments[-1].weight))
            segments.append(segment)

        for message in in_order_of_calls(messages):
            if message["role"] != "assistant":
                waiting.append(message)
                continue
            add(Segment(self._turns(waiting, ask=True), 0.0))
            segments.append(Segment(self._answer(message), weight_of(message)))
            waiting = []
        if waiting or ask:
            add(Segment(self._turns(waiting, ask), 0.0))
        return segments

    def documents(
        self, messages: list[dict], tools: list[dict] | None = None, token_end: TokenEnd | None = None
    ) -> list[list[Segment]]:
        return [self.segments(messages, tools)]

    def next_turn(self, messages: list[dict], new: list[dict], tools: list[dict] | None = None) -> list[str]:
        return [TURN_END, self._turns(new, ask=True)]

    def parse(self, text: str) -> tuple[str, list[dict]]:
        return self.tools.parse(text)

    def _turns(self, messages: list[dict], ask: bool) -> str:
        turns = []
        for message in messages:
            role, content = message["role"], message["content"]
            after = self.after_user if role == "user" else ""
            if role == "tool":
                role, content = self.tools.result(content)
            turns.append(f"{ROLES[role]}: {clean(content)}{after}")
        if ask:
            turns.append(f"{ROLES['assistant']}:{self.opening}")
        return TURN_END.join(turns)

    def _answer(self, message: dict) -> str:
        thoughts, content = thoughts_of(message)
        if self.opening and content.startswith("<think>"):
            raise UserError(f"an answer opens <think> and never closes it: {content[:60]!r}")
        if calls := message.get("tool_calls"):
            content = "\n".join(filter(None, [content, self.tools.calls(calls)]))
        if not self.opening:
            return f" <think>\n{thoughts}\n</think>\n{content}" if thoughts else f" {content}"
        if "</think" not in self.opening:
            return f">\n{thoughts}\n</think>\n{content}" if thoughts else f">\n</think>\n{content}"
        if thoughts:
            raise UserError(
                f"an answer has thoughts, for which --template {self.name} has no place; use think, or take"
                " them out of the data"
            )
        return f">\n{content}"


DEFAULT = RwkvTemplate("rwkv")
