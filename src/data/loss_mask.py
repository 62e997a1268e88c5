"""Loss mask: the pieces of a record that are trained, by --loss_mask."""

from __future__ import annotations

import re
from collections.abc import Callable

from .chat_template import Segment, Template, TokenEnd
from .formats import WrongSetting
from .rwkv_template import FLOWERS, HEADING, HEADINGS, PLAIN, TurnForm


def trains_by_marker(loss_mask: str) -> bool:
    """Tell whether --loss_mask is a marker."""
    return loss_mask not in ("assistant", "all")


def record_segments(
    record: dict, template: Template, loss_mask: str, token_end: TokenEnd | None = None
) -> list[list[Segment]]:
    """Cut a record {"text"}, {"prompt", "completion"} or {"messages", "tools"} into segments, by document.

    A record is one document. Only a conversation may be several, with the mask `assistant`: see
    Template.documents(), which takes `token_end`.

    `loss_mask` is one of
    - assistant: the assistant's turns are trained, completions, and texts as a whole;
    - all: everything is trained;
    - any other text: it is a marker, such as `Assistant:`. The text after it is trained until the next turn,
      in any kind of record (see `marked`).
    """
    if "messages" in record and loss_mask == "assistant":
        return template.documents(record["messages"], record.get("tools"), token_end)
    if "messages" in record:
        _refuse_weights(record["messages"], loss_mask)
        segments = template.segments(record["messages"], record.get("tools"))
    elif "prompt" in record:
        segments = [Segment(record["prompt"], 0.0), Segment(record["completion"], 1.0)]
    else:
        segments = [Segment(record["text"], 1.0)]
    if loss_mask == "assistant":
        return [segments]
    if loss_mask == "all":
        return [[Segment(segment.text, 1.0) for segment in segments]]
    return [marked("".join(segment.text for segment in segments), loss_mask)]


def _refuse_weights(messages: list[dict], loss_mask: str) -> None:
    """Raise UserError for a weight other than 0 and 1; these two have no meaning under `all` and a marker."""
    for message in messages:
        weight = message.get("weight", 1)
        if message["role"] == "assistant" and weight not in (0, 1):
            raise WrongSetting(
                f"an answer has the weight {weight:g}, and --loss_mask {loss_mask} gives the same weight to"
                " all that it trains; use --loss_mask assistant, or take the weights out of the data"
            )


def marked(text: str, marker: str) -> list[Segment]:
    """Cut a text at a marker: the text after it is trained until the next turn or the next marker.

    A turn begins with `System:`, `User:` or `Tool:` after a blank line, or with `System✿`, `User✿` or `Tool✿`
    on a new line after a flower. For a marker with `### ` also with a line `### System`, `### User` or
    `### Tool Output`. A marker `START...END` has an end of its own instead. The blank line, the flower or the
    newline at the end of a turn is a segment by itself, as in a conversation.
    """
    segments: list[Segment] = []
    place = 0
    for begin, end in marked_spans(text, marker):
        segments.append(Segment(text[place:begin], 0.0))
        body = text[begin:end].removesuffix(PLAIN.between).removesuffix(FLOWERS.end)
        if text.startswith(HEADING, end):
            body = body.removesuffix(HEADINGS.between)
        segments += [Segment(body, 1.0), Segment(text[begin + len(body) : end], 1.0)]
        place = end
    segments.append(Segment(text[place:], 0.0))
    return [segment for segment in segments if segment.text]


def marked_spans(text: str, marker: str, read: Callable[[str], str] = str) -> list[tuple[int, int]]:
    """Find beginnings and ends, in characters, of the text that a marker trains.

    `read` encodes words as the text has them, if it is not plain text.
    """
    start, _, end = (read(part.replace("\\n", "\n")) for part in marker.partition("..."))
    # a heading inside an answer is likely, unless the turns have headings
    forms = [PLAIN, FLOWERS, HEADINGS] if HEADING in start else [PLAIN, FLOWERS]
    next_turn = read("|".join(map(_turn_of_others, forms)))
    after = re.compile(f"{re.escape(end) if end else next_turn}|{re.escape(start)}")
    spans: list[tuple[int, int]] = []
    place = text.find(start)
    while place >= 0:
        begin = place + len(start)
        match = after.search(text, begin)
        spans.append((begin, match.start() if match else len(text)))
        place = text.find(start, spans[-1][1])
    return spans


def _turn_of_others(form: TurnForm) -> str:
    """Write a regex for the beginning of a turn, after another one, that is not the assistant's."""
    roles = "|".join(re.escape(role) for name, role in form.roles.items() if name != "assistant")
    before = f"(?<={form.end}){form.between}" if form.end else f"(?<={form.between})"
    return f"{before}(?:{roles}){form.colon.rstrip(' ')}"
