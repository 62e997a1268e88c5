"""The user's own chat template: Jinja, with the conventions of Hugging Face's `chat_template`.

A template is given messages, tools, add_generation_prompt, bos_token and eos_token. bos_token is always
empty, because RWKV has none. The template may call raise_exception() and tojson.

What is trained stands between `{% generation %}` and `{% endgeneration %}`. Without these blocks the
conversation is rendered up to each answer, and again with the answer. What the second text adds is the answer
with the end of its turn.
"""

from __future__ import annotations

import json
import os
import re

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from rwkv_miss.errors import UserError

from .chat_template import Segment, is_trained

# in the rendered text, around what is trained: noncharacters, which no text has
BEGIN, END = "\ufdd0{generation\ufdd1", "\ufdd0generation}\ufdd1"


class Generation(jinja2.ext.Extension):
    """The block {% generation %}."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("marked"), [], [], body).set_lineno(line)

    def marked(self, caller):
        return BEGIN + caller() + END


class JinjaTemplate:
    """A chat_template.Template from Jinja source.

    Raises UserError, with the line, for source that is wrong or fails on a trial conversation.
    """

    opening = ""

    def __init__(self, name: str, source: str, eos: str):
        self.name, self.record, self.eos = name, source, eos
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[Generation, jinja2.ext.loopcontrols],
        )
        environment.globals["raise_exception"] = _raise
        environment.filters["tojson"] = _to_json
        try:
            self.template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"{name}, line {error.lineno}: {error.message}") from None
        self.marks = re.search(r"{%[-+]?\s*generation\b", source) is not None
        self.turn_end = ""
        self._try_out()

    def __reduce__(self):
        return JinjaTemplate, (self.name, self.record, self.eos)

    def _try_out(self) -> None:
        """Find the end of a turn, and what ends an answer in a chat.

        That is the end of the turn. Where it is only space, it is how the next turn begins.
        """
        question = {"role": "user", "content": "A question?"}
        answer = {"role": "assistant", "content": "An answer."}
        asked = self._render([question], True)
        whole = self._render([question, answer])
        again = self._render([question, answer, question])
        for text, message in ((asked, question), (whole, answer)):
            if message["content"] not in text:
                raise UserError(
                    f"{self.name}: the template writes a conversation without the {message['role']}'s words;"
                    f" got {text!r}"
                )
        self.turn_end = whole.rpartition(answer["content"])[2]
        between = again.rpartition(answer["content"])[2].partition(question["content"])[0]
        self.stop = self.turn_end.strip() or between.rstrip()
        if self.marks and not any(segment.trained for segment in self.segments([question, answer])):
            raise UserError(
                f"{self.name}: {{% generation %}} does not enclose the assistant's words; got {whole!r}"
            )
        self.segments([question, answer])

    def segments(
        self, messages: list[dict], tools: list[dict] | None = None, ask: bool = False
    ) -> list[Segment]:
        """See chat_template.Template."""
        pieces_of = self._marked if self.marks else self._by_beginnings
        segments: list[Segment] = []
        for text, trained in pieces_of(messages, tools, ask):
            # the end of a turn is a segment by itself, as in a chat
            end = self.turn_end
            after_answer = segments and segments[-1].trained and segments[-1].text != end
            if end and trained and text.endswith(end):
                segments += [Segment(text.removesuffix(end), True), Segment(end, True)]
            elif end and after_answer and text.startswith(end):
                segments += [Segment(end, False), Segment(text.removeprefix(end), False)]
            else:
                segments.append(Segment(text, trained))
        return [segment for segment in segments if segment.text]

    def next_turn(self, messages: list[dict], new: list[dict]) -> list[str] | None:
        """See chat_template.Template."""
        before, after = self._render(messages), self._render([*messages, *new], True)
        if not (before.endswith(self.turn_end) and after.startswith(before)):
            return None
        return [self.turn_end, after.removeprefix(before)]

    def _marked(self, messages: list[dict], tools, ask: bool) -> list[tuple[str, bool]]:
        text, *rest = self._render(messages, ask, tools, marks=True).split(BEGIN)
        wanted = [is_trained(message) for message in messages if message["role"] == "assistant"]
        if len(wanted) != len(rest):
            if not all(wanted):
                raise UserError(
                    f"{self.name} has {len(rest)} {{% generation %}} blocks for {len(wanted)} answers; which"
                    ' of them has "weight": 0?'
                )
            wanted = [True] * len(rest)
        pieces = [(text, False)]
        for part, trained in zip(rest, wanted):
            inside, closed, outside = part.partition(END)
            if not closed:
                raise UserError(f"{self.name}: a {{% generation %}} block lies inside another one")
            pieces += [(inside, trained), (outside, False)]
        return pieces

    def _by_beginnings(self, messages: list[dict], tools, ask: bool) -> list[tuple[str, bool]]:
        whole = self._render(messages, ask, tools)
        pieces, place = [], 0
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:i], True, tools)
            after = self._render(messages[: i + 1], False, tools)
            if ask and not (whole.startswith(before) and whole.startswith(after)):
                return [(whole, False)]  # a question for the model needs no mask
            self._check_beginning(whole, before, i)
            self._check_beginning(whole, after, i + 1)
            pieces.append((whole[place : len(before)], False))
            pieces.append((whole[len(before) : len(after)], is_trained(message)))
            place = len(after)
        return [*pieces, (whole[place:], False)]

    def _check_beginning(self, whole: str, beginning: str, count: int) -> None:
        if whole.startswith(beginning):
            return
        same = len(os.path.commonprefix([beginning, whole]))
        raise UserError(
            f"{self.name}: what the template writes for the first {count} messages changes when more follow"
            f" ({beginning[same:][:40]!r} becomes {whole[same:][:40]!r}), so the assistant's words can't be"
            " found; enclose them in {% generation %} ... {% endgeneration %}"
        )

    def _render(self, messages: list[dict], ask: bool = False, tools=None, marks: bool = False) -> str:
        try:
            text = self.template.render(
                messages=messages, tools=tools, add_generation_prompt=ask, bos_token="", eos_token=self.eos
            )
        except Exception as error:  # a template may raise anything that Python does
            raise UserError(f"{self.name}{_line(error)}: {error}") from None
        return text if marks else text.replace(BEGIN, "").replace(END, "")


def _raise(message: str):
    raise jinja2.TemplateError(message)


def _to_json(
    value, ensure_ascii: bool = False, indent: int | None = None, separators=None, sort_keys: bool = False
) -> str:
    """Jinja's own filter is for HTML and would escape < and >."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _line(error: Exception) -> str:
    """ ", line N" of the template, from the frames that Jinja makes up for it."""
    line, trace = "", error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = f", line {trace.tb_lineno}"
        trace = trace.tb_next
    return line
