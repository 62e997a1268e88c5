"""Text of a chat's answer as it comes, separated into thoughts, content and tool calls.

Everything works on pieces, so that a stream and a whole answer are the same characters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from ..data.chat_template import Template, begins_thoughts
from ..data.rwkv_template import RwkvTemplate
from ..data.thoughts import BEGIN, END
from ..data.tool_styles import STYLES
from ..inference.answer_text import overlap
from .tools import Tools


class Delta(NamedTuple):
    """New parts of an answer."""

    thoughts: str = ""
    content: str = ""
    calls: Sequence[dict[str, Any]] = ()  # only in the last one


class ChatText:
    """Text of an answer to a template's prompt. push() takes generated text, finish() ends it.

    The content is one part of the generated text: see span().
    """

    def __init__(self, template: Template, tools: Tools):
        self.template, self.tools = template, tools
        self.splitter = _Splitter(template.opening)
        self.thoughts, self.content = _Trimmed(), _Trimmed()
        self.held = _Held(_markers(template) if tools.described else [])
        self.length = 0  # characters of the generated text
        self.whole = ""  # the content with its calls, which ends the generated text
        self.sent = 0  # characters of the content

    def span(self) -> tuple[int, int]:
        """Return begin and end of the content so far, in the generated text."""
        begin = self.length - len(self.whole.lstrip()) if self.sent else 0
        return begin, begin + self.sent

    def push(self, text: str) -> Delta:
        self.length += len(text)
        return self._add(*self.splitter.push(text))

    def finish(self) -> Delta:
        thoughts, content = self.splitter.finish()
        last = self._add(thoughts, content)
        whole = self.whole.strip()
        content, calls = self.template.parse(whole) if self.tools.described else (whole, [])
        if not self.tools.parallel:
            calls = calls[:1]
        rest = content[self.sent :]
        self.sent = len(content)
        return Delta(last.thoughts, last.content + rest, calls)

    def _add(self, thoughts: str, content: str) -> Delta:
        self.whole += content
        shown = self.content.push(self.held.push(content))
        self.sent += len(shown)
        return Delta(self.thoughts.push(thoughts), shown)


class _Splitter:
    """Splitter of an answer into (thoughts, content). `opening` is its beginning, which was not generated."""

    def __init__(self, opening: str):
        self.text = ""
        if begins_thoughts(opening):
            self.inside = True
            _, closed, self.text = opening.partition(">")
            self.bracket = not closed  # whether the tag still lacks its end
        else:
            # the opening of empty thoughts stops inside a tag, too
            self.bracket = bool(opening) and not opening.endswith(">")
            self.inside = False if opening else None  # None: the model itself may begin to think

    def push(self, text: str) -> tuple[str, str]:
        self.text += text
        if self.bracket and self.text:
            self.text, self.bracket = self.text.removeprefix(">"), False
        if self.inside is None:
            begun = self.text.lstrip()
            if BEGIN.startswith(begun):  # also the empty text
                return "", ""
            self.inside = begun.startswith(BEGIN)
            self.text = begun.removeprefix(BEGIN)
        if not self.inside:
            return "", self._all()
        place = self.text.find(END)
        if place >= 0:
            thoughts, content = self.text[:place], self.text[place + len(END) :]
            self.text, self.inside = "", False
            return thoughts, content
        safe = len(self.text) - overlap(self.text, [END])
        thoughts, self.text = self.text[:safe], self.text[safe:]
        return thoughts, ""

    def finish(self) -> tuple[str, str]:
        """Return the held text: the beginning of a tag that never came."""
        return (self._all(), "") if self.inside else ("", self._all())

    def _all(self) -> str:
        text, self.text = self.text, ""
        return text


class _Trimmed:
    """Pieces of a text without the space before and after it."""

    def __init__(self):
        self.begun, self.space = False, ""

    def push(self, text: str) -> str:
        text = self.space + text if self.begun else text.lstrip()
        shown = text.rstrip()
        self.begun = self.begun or bool(shown)
        self.space = text[len(shown) :] if self.begun else ""
        return shown


class _Held:
    """Pieces of a text up to the first place where a marker may begin."""

    def __init__(self, markers: Sequence[str]):
        self.markers = markers
        self.text = ""
        self.met = False

    def push(self, text: str) -> str:
        if self.met:
            return ""
        text = self.text + text
        places = [place for marker in self.markers if (place := text.find(marker)) >= 0]
        if places:
            self.met = True
            return text[: min(places)]
        safe = len(text) - overlap(text, self.markers)
        self.text = text[safe:]
        return text[:safe]


def _markers(template: Template) -> list[str]:
    """Return the first words of possible calls."""
    styles = [template.tools] if isinstance(template, RwkvTemplate) else STYLES.values()
    return list({style.before_call.split()[0] for style in styles})
