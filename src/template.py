"""Chat templates: a conversation becomes pieces of text, each tokenised on its own, and each trained or not.

Training, chat and evaluation use one template, RWKV's own or the user's Jinja file, so a model is asked in
the very tokens it was trained on: what stands before an answer, the answer, and the end of its turn are
pieces of their own, as in a chat, where the first is read before the second exists. Adapters and merged files
record their template.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple, Protocol

from rwkv_miss.errors import UserError
from rwkv_miss.files.checkpoint import read_metadata

from .common.files import read_text
from .common.formatting import short

ROLES = {"system": "System", "user": "User", "assistant": "Assistant", "tool": "Tool"}
TURN_END = "\n\n"


class Segment(NamedTuple):
    """A piece of a document, tokenised on its own, and whether the loss is taken on it."""

    text: str
    trained: bool


class Mode(NamedTuple):
    """How RWKV's template asks for an answer: what follows the user's words, and what follows
    `Assistant:`.
    """

    after_user: str
    opening: str


# As the G1 models were trained. The openings stop inside a tag, because what closes it may be a token
# together with what comes next.
MODES = {
    "rwkv": Mode("", ""),
    "think": Mode("", " <think"),
    "think-normal": Mode(" think", " <think"),
    "think-short": Mode(" think a bit", " <think"),
    "think-long": Mode(" think a lot", " <think"),
    "fake-think": Mode("", " <think>\n</think"),
}


class Template(Protocol):
    """`record` is what a checkpoint's metadata keep of it, `name` is for people; `stop` is the text that ends
    an answer, where the end of document does not; `opening` is what the answer in a chat begins with, though
    it is not generated.
    """

    name: str
    record: str
    stop: str
    opening: str

    def segments(
        self, messages: list[dict], tools: list[dict] | None = None, ask: bool = False
    ) -> list[Segment]:
        """The conversation, the assistant's turns trained; `ask`: with the words at its end after which an
        answer follows.

        Raises UserError for a conversation that the template has no form for.
        """

    def next_turn(self, messages: list[dict], new: list[dict]) -> list[str] | None:
        """The pieces between the last answer in `messages` and the next one, given the turns in between; None
        where the template changes earlier turns when new ones follow, so that only the whole conversation
        will do.
        """


class RwkvTemplate:
    """`User: ...`, blank line, `Assistant: ...`: a blank line ends a turn, so there is none inside a turn
    that is not the model's own.

    An assistant's message may carry its thoughts as `reasoning_content`, as `reasoning`, or as
    `<think>...</think>` before its content, and `tool_calls` as in OpenAI's API. Tools are described in a
    System turn.
    """

    stop = TURN_END + "User:"

    def __init__(self, name: str):
        self.name = self.record = name
        self.after_user, self.opening = MODES[name]

    def segments(
        self, messages: list[dict], tools: list[dict] | None = None, ask: bool = False
    ) -> list[Segment]:
        segments: list[Segment] = []
        waiting = [{"role": "system", "content": _describe(tools)}] if tools else []

        def add(segment: Segment) -> None:
            if segments:
                segments.append(Segment(TURN_END, segments[-1].trained))
            segments.append(segment)

        for message in messages:
            if message["role"] != "assistant":
                waiting.append(message)
                continue
            add(Segment(self._turns(waiting, ask=True), False))
            segments.append(Segment(self._answer(message), is_trained(message)))
            waiting = []
        if waiting or ask:
            add(Segment(self._turns(waiting, ask), False))
        return segments

    def next_turn(self, messages: list[dict], new: list[dict]) -> list[str]:
        return [TURN_END, self._turns(new, ask=True)]

    def _turns(self, messages: list[dict], ask: bool) -> str:
        turns = [
            f"{ROLES[m['role']]}: {clean(m['content'])}{self.after_user if m['role'] == 'user' else ''}"
            for m in messages
        ]
        return TURN_END.join([*turns, f"{ROLES['assistant']}:{self.opening}"] if ask else turns)

    def _answer(self, message: dict) -> str:
        thoughts, content = thoughts_of(message)
        if self.opening and content.startswith("<think>"):
            raise UserError(f"an answer opens <think> and never closes it: {content[:60]!r}")
        content = "\n".join(filter(None, [content, *map(_call, message.get("tool_calls") or ())]))
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


def is_trained(message: dict) -> bool:
    """OpenAI's files have `"weight": 0` in an answer that is there as context only."""
    return message.get("weight") != 0


def clean(text: str) -> str:
    """What a turn other than the assistant's may hold: no blank line, because that ends a turn; runs of
    newlines become one.
    """
    return re.sub(r"\n{2,}", "\n", text.replace("\r\n", "\n")).strip()


def thoughts_of(message: dict) -> tuple[str, str]:
    """(thoughts, content) of an assistant's message, stripped."""
    content = (message.get("content") or "").strip()
    thoughts = (message.get("reasoning_content") or message.get("reasoning") or "").strip()
    if not thoughts and content.startswith("<think>") and "</think>" in content:
        thoughts, _, content = (
            part.strip() for part in content.removeprefix("<think>").partition("</think>")
        )
    return thoughts, content


def _call(call: dict) -> str:
    """One of `tool_calls`, as most models write it."""
    try:
        function = call.get("function", call)
        arguments = function["arguments"]
        words = {
            "name": function["name"],
            "arguments": json.loads(arguments) if isinstance(arguments, str) else arguments,
        }
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError):
        raise UserError(
            f'a tool call must be {{"function": {{"name": text, "arguments": JSON}}}}, got {short(call)}'
        ) from None
    return f"<tool_call>\n{json.dumps(words, ensure_ascii=False)}\n</tool_call>"


def _describe(tools: list[dict]) -> str:
    return "\n".join(["<tools>", *(json.dumps(tool, ensure_ascii=False) for tool in tools), "</tools>"])


DEFAULT = RwkvTemplate("rwkv")


def load_template(spec: str, eos: str = "") -> Template:
    """The template `spec`: a name of MODES (auto is rwkv), the path of a Jinja file, or such a file's
    content, as checkpoints record it.

    `eos` is the text of the tokenizer's end of document. Raises UserError for a file that is missing, wrong,
    or fails on a trial conversation.
    """
    if spec in ("auto", *MODES):
        return RwkvTemplate("rwkv" if spec == "auto" else spec)
    from .jinja_template import JinjaTemplate  # jinja2 is needed for such templates only

    if "{" in spec:
        return JinjaTemplate("the recorded template", spec, eos)
    content = read_text(spec, "a template", f"--template takes auto, {', '.join(MODES)}, or a Jinja file")
    return JinjaTemplate(spec, content, eos)


def recorded_template(spec: str, tokenizer, *paths) -> Template:
    """load_template(), where "auto" is the template that the first of these checkpoint files to name one was
    trained with.
    """
    if spec == "auto":
        records: list[dict[str, Any]] = [read_metadata(path) or {} for path in filter(None, paths)]
        spec = next((record["template"] for record in records if record.get("template")), spec)
    return load_template(spec, tokenizer.decode(tokenizer.eod))


def answer_text(text: str, template: Template, opening: str) -> str:
    """What a generated answer says: the text up to the end of its turn, without the thoughts before it.
    `opening` is what the answer begins with though it was not generated.
    """
    text = opening + (text.partition(template.stop)[0] if template.stop else text)
    return re.sub(r"^\s*<think>.*?</think>", "", text, flags=re.DOTALL).strip()


# which tokens carry loss

NEXT_TURN = r"(?<=\n\n)(?:System|User|Tool):"


def trains_by_marker(loss_mask: str) -> bool:
    return loss_mask not in ("assistant", "all")


def row_segments(row: dict, template: Template, loss_mask: str) -> list[Segment]:
    """The pieces of a row {"text"}, {"prompt", "completion"} or {"messages", "tools"}.

    `loss_mask`: assistant trains the assistant's turns, completions, and texts as a whole; all trains
    everything; any other text is a marker, such as `Assistant:`, and trains what follows it until the next
    turn (see `marked`), in any kind of row.
    """
    if "messages" in row:
        segments = template.segments(row["messages"], row.get("tools"))
    elif "prompt" in row:
        segments = [Segment(row["prompt"], False), Segment(row["completion"], True)]
    else:
        segments = [Segment(row["text"], True)]
    if loss_mask == "assistant":
        return segments
    if loss_mask == "all":
        return [Segment(text, True) for text, _ in segments]
    return marked("".join(text for text, _ in segments), loss_mask)


def marked(text: str, marker: str) -> list[Segment]:
    """A text cut at a marker: what follows it is trained, until the next `System:`, `User:` or `Tool:` after
    a blank line, or the next marker.

    A marker `START...END` has an end of its own instead. The blank line at the end of a turn is a piece by
    itself, as in a conversation.
    """
    segments: list[Segment] = []
    place = 0
    for begin, end in marked_spans(text, marker):
        segments.append(Segment(text[place:begin], False))
        words = text[begin:end].removesuffix(TURN_END)
        segments += [Segment(words, True), Segment(text[begin + len(words) : end], True)]
        place = end
    segments.append(Segment(text[place:], False))
    return [segment for segment in segments if segment.text]


def marked_spans(text: str, marker: str) -> list[tuple[int, int]]:
    """Beginnings and ends, in characters, of what a marker trains."""
    start, _, end = (part.replace("\\n", "\n") for part in marker.partition("..."))
    after = re.compile(f"{re.escape(end) if end else NEXT_TURN}|{re.escape(start)}")
    spans: list[tuple[int, int]] = []
    place = text.find(start)
    while place >= 0:
        begin = place + len(start)
        found = after.search(text, begin)
        spans.append((begin, found.start() if found else len(text)))
        place = text.find(start, spans[-1][1])
    return spans
