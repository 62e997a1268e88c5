"""RWKV's own chat template, with the modes of the G1 models. docs/templates.md shows each of them."""

from __future__ import annotations

from typing import NamedTuple

from rwkv_miss.errors import UserError

from ..config.data_settings import HERMES, MARKDOWN
from .chat_template import CHINESE_HM, Segment, TokenEnd, begins_thoughts, clean, thoughts_of, weight_of
from .tool_styles import STYLES, in_order_of_calls

FLOWER = "✿"
OTHER_FLOWER = "❀"  # replaces it in words that must not end a turn


class TurnForm(NamedTuple):
    """Form of turns, one after another."""

    roles: dict[str, str]
    colon: str  # between a role and its words
    ask: str  # before an answer
    gap: str  # the beginning of an answer
    end: str  # ends every turn, also the last one
    between: str  # parts a turn from the next

    def beginning(self, role: str) -> str:
        """Return the beginning of a turn after another one, without the space before its words."""
        return f"{self.between}{self.roles[role]}{self.colon.rstrip()}"


ROLES = {"system": "System", "user": "User", "assistant": "Assistant", "tool": "Tool"}
TURN_END = "\n\n"
PLAIN = TurnForm(ROLES, ": ", "Assistant:", " ", "", TURN_END)
FLOWERS = TurnForm({**ROLES, "assistant": "Bot"}, FLOWER, f"Bot{FLOWER}", "", FLOWER, "\n")
HEADING = "### "
HEADINGS = TurnForm(
    {role: HEADING + name for role, name in {**ROLES, "tool": "Tool Output"}.items()},
    "\n",
    f"{HEADING}Assistant",
    "\n",
    "",
    "\n",
)


UNCLOSED_THOUGHTS = "an answer opens <think> and never closes it"
THOUGHTS_TWICE = (
    "an answer has its thoughts twice, such as in reasoning_content and as <think> in its content; keep one"
)


class Mode(NamedTuple):
    """Way in which RWKV's template asks for an answer."""

    after_user: str  # after the user's words
    opening: str  # the beginning of an answer, which is not generated
    form: TurnForm = PLAIN


# As the G1 models were trained. The openings stop inside a tag: the `>` that closes it may be one token with
# what comes next.
MODES = {
    "rwkv": Mode("", ""),
    "think": Mode("", " <think"),
    "think-normal": Mode(" (think)", " <think"),
    "think-short": Mode(" (think a bit)", " <think"),
    "think-long": Mode(" (think a lot)", " <think"),
    "think-normal-2025": Mode(" think", " <think"),
    "think-short-2025": Mode(" think a bit", " <think"),
    "think-long-2025": Mode(" think a lot", " <think"),
    "think-chinese": Mode("", f" <think>{CHINESE_HM}"),
    "fake-think": Mode("", " <think>\n</think"),
    "fake-think-compact": Mode("", " <think></think"),
    "flower": Mode("", "<think", FLOWERS),
    "flower-fake-think": Mode("", "<think></think", FLOWERS),
}


class RwkvTemplate:
    """`User: ...`, blank line, `Assistant: ...`, or the same with flowers.

    A blank line, or a flower, ends a turn, so only the model's own turns may hold one. In others a blank line
    becomes a newline, and a flower becomes another flower. An assistant's message may have thoughts: as
    `reasoning_content`, as `reasoning`, or as `<think>...</think>` before its content. It may have
    `tool_calls` as in OpenAI's API. Tools are described in a System turn. `tool_style`, one of
    tool_styles.STYLES, says how. With markdown, turns without flowers begin with a heading: `### User`.
    """

    asked_only = ""

    def __init__(self, name: str, tool_style: str = HERMES):
        self.name, self.record = name, f"{name}:{tool_style}"
        self.tools = STYLES[tool_style]
        self.after_user, opening, form = MODES[name]
        self.form = HEADINGS if form is PLAIN and tool_style == MARKDOWN else form
        self.opening = opening.replace(PLAIN.gap, self.form.gap, 1)
        self.turn_end = self.form.end
        followers = dict.fromkeys(("user", self.tools.result_role))
        self.stops = (self.form.end,) if self.form.end else tuple(map(self.form.beginning, followers))

    def segments(
        self, messages: list[dict], tools: list[dict] | None = None, ask: bool = False
    ) -> list[Segment]:
        segments: list[Segment] = []
        waiting = [{"role": "tools", "content": self.tools.describe(tools)}] if tools else []

        def add(turns: str) -> None:
            if segments:
                end, begin = self._between()
                segments.append(Segment(end, segments[-1].weight))
                turns = begin + turns
            segments.append(Segment(turns, 0.0))

        for message in in_order_of_calls(messages):
            if message["role"] != "assistant":
                waiting.append(message)
                continue
            add(self._turns(waiting, ask=True))
            segments.append(Segment(self._answer(message), weight_of(message)))
            waiting = []
        if waiting or ask:
            add(self._turns(waiting, ask))
        elif segments and self.form.end:
            segments.append(Segment(self.form.end, segments[-1].weight))
        return segments

    def documents(
        self, messages: list[dict], tools: list[dict] | None = None, token_end: TokenEnd | None = None
    ) -> list[list[Segment]]:
        return [self.segments(messages, tools)]

    def next_turn(self, messages: list[dict], new: list[dict], tools: list[dict] | None = None) -> list[str]:
        end, begin = self._between()
        return [end, begin + self._turns(new, ask=True)]

    def parse(self, text: str) -> tuple[str, list[dict]]:
        return self.tools.parse(text)

    def drops_thoughts(self, messages: list[dict], tools: list[dict] | None = None) -> bool:
        """Return False: thoughts without a place are an error."""
        return False

    def _between(self) -> tuple[str, str]:
        """Return (the end of an answer when another turn follows, the beginning of that turn)."""
        return (self.form.end, self.form.between) if self.form.end else (self.form.between, "")

    def _turns(self, messages: list[dict], ask: bool) -> str:
        form, turns = self.form, []
        for message in messages:
            role, content = message["role"], message["content"]
            after = self.after_user if role == "user" else ""
            if role == "tools":
                role = "system"
            elif role == "tool":
                role, content = self.tools.result(content)
            else:
                content = clean(content)
            if form.end:
                content = content.replace(form.end, OTHER_FLOWER)
            turns.append(f"{form.roles[role]}{form.colon}{content}{after}{form.end}")
        if ask:
            turns.append(f"{form.ask}{self.opening}")
        return form.between.join(turns)

    def _answer(self, message: dict) -> str:
        """Write the model's text after the opening."""
        thoughts, content = thoughts_of(message)
        if self.opening and content.startswith("<think>"):
            wrong = THOUGHTS_TWICE if thoughts else UNCLOSED_THOUGHTS
            raise UserError(f"{wrong}: {content[:60]!r}")
        if calls := message.get("tool_calls"):
            content = "\n".join(filter(None, [content, self.tools.calls(calls)]))
        if self.form.end and self.form.end in thoughts + content:
            raise UserError(
                f"an answer holds {self.form.end}, which ends a turn in --template {self.name}: the model"
                f" would learn to stop there; take it out of the data, or write {OTHER_FLOWER}"
            )
        if not self.opening:
            thoughts = f"<think>\n{thoughts}\n</think>\n" if thoughts else ""
            return f"{self.form.gap}{thoughts}{content}"
        if self.opening.endswith(CHINESE_HM):
            begun = thoughts.removeprefix(CHINESE_HM)
            joint = "，" if thoughts and begun == thoughts else ""
            return f"{joint}{begun}\n</think>\n{content}"
        if begins_thoughts(self.opening):
            return f">\n{thoughts}\n</think>\n{content}" if thoughts else f">\n</think>\n{content}"
        if thoughts:
            raise UserError(
                f"an answer has thoughts, for which --template {self.name} has no place; use think, or take"
                " them out of the data"
            )
        return f">\n{content}"


DEFAULT = RwkvTemplate("rwkv")
