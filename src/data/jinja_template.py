"""The user's own chat template: Jinja, with the conventions of Hugging Face's `chat_template`.

A template is given messages, tools, add_generation_prompt, bos_token and eos_token. bos_token is always
empty, because RWKV has none. The template may call raise_exception() and tojson.

What is trained stands between `{% generation %}` and `{% endgeneration %}`. Without these blocks two texts
are rendered for each answer: one that asks for it, and one in which it is the last message. The answer begins
where they part, and has the end of its turn.

- Where each text is the beginning of the next, the conversation is one document.
- Many templates rewrite earlier turns, such as by taking out thoughts. A new document begins with each answer
  before which something is written otherwise than in the document so far. So a model sees its earlier answers
  as it will in a chat, and each answer is trained once.
- What asks may end in words that the template does not write before the answer, such as `<think`. Then the
  document has the common beginning, up to the end of a token, and the next answer is in a new one.
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

from .chat_template import BEGUN_THOUGHTS, Segment, TokenEnd, weight_of
from .tool_styles import parse_any

# in the rendered text, around what is trained: noncharacters, which no text has
BEGIN, END = "\ufdd0{generation\ufdd1", "\ufdd0generation}\ufdd1"

Piece = tuple[str, float]  # as a Segment, before the end of the turn is cut off


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
        self.turn_end = self.opening = self.asked_only = ""
        self._try_out()

    def __reduce__(self):
        return JinjaTemplate, (self.name, self.record, self.eos)

    def _try_out(self) -> None:
        """Find the end of a turn, what begins an answer in a chat, and what ends it.

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
        stop = self.turn_end.strip() or between.rstrip()
        self.stops = (stop,) if stop else ()
        begun = BEGUN_THOUGHTS.search(asked)
        self.opening = begun[0] if begun else ""
        documents = self.documents([question, answer, question, answer])
        if not self.marks:
            self.asked_only = asked[_common_beginning(asked, whole) :]
        if self.marks and not any(segment.weight for segment in documents[0]):
            raise UserError(
                f"{self.name}: {{% generation %}} does not enclose the assistant's words; got {whole!r}"
            )

    def segments(
        self, messages: list[dict], tools: list[dict] | None = None, ask: bool = False
    ) -> list[Segment]:
        """The end of the conversation, from where the template writes nothing otherwise (see this module).

        For the whole conversation it is one document. So a chat asks in the pieces of the training.
        """
        if self.marks:
            return self._segments(self._marked(messages, tools, ask))
        documents, written = self._by_beginnings(messages, tools)
        whole = self._render(messages, ask, tools)
        if written is None or not whole.startswith(written):
            return self._segments([(whole, 0.0)])
        return self._segments([*documents[-1], (whole.removeprefix(written), 0.0)])

    def documents(
        self, messages: list[dict], tools: list[dict] | None = None, token_end: TokenEnd | None = None
    ) -> list[list[Segment]]:
        """See chat_template.Template."""
        if self.marks:
            return [self._segments(self._marked(messages, tools, False))]
        documents, written = self._by_beginnings(messages, tools, token_end)
        if not documents:
            return [self._segments([(self._render(messages, False, tools), 0.0)])]
        if written is not None and messages[-1]["role"] != "assistant":
            whole = self._render(messages, False, tools)
            if whole.startswith(written):
                documents[-1].append((whole.removeprefix(written), 0.0))
        trained = [pieces for pieces in documents if any(weight for _, weight in pieces)]
        return [self._segments(pieces) for pieces in trained or documents[-1:]]

    def _segments(self, pieces: list[Piece]) -> list[Segment]:
        segments: list[Segment] = []
        for text, weight in pieces:
            # the end of a turn is a segment by itself, as in a chat
            end = self.turn_end
            after_answer = segments and segments[-1].weight and segments[-1].text != end
            if end and weight and text.endswith(end):
                segments += [Segment(text.removesuffix(end), weight), Segment(end, weight)]
            elif end and after_answer and text.startswith(end):
                segments += [Segment(end, 0.0), Segment(text.removeprefix(end), 0.0)]
            else:
                segments.append(Segment(text, weight))
        return [segment for segment in segments if segment.text]

    def next_turn(
        self, messages: list[dict], new: list[dict], tools: list[dict] | None = None
    ) -> list[str] | None:
        """See chat_template.Template."""
        *earlier, answer = messages
        asked, before = self._render(earlier, True, tools), self._render(messages, False, tools)
        after = self._render([*messages, *new], True, tools)
        if not (before.startswith(asked) and before.endswith(self.turn_end) and after.startswith(before)):
            return None
        # the model has read what it said, which the template may write otherwise
        said, written = answer["content"].removeprefix(self.opening), before.removeprefix(asked)
        if said.strip() != written.removesuffix(self.turn_end).strip():
            return None
        return [self.turn_end, after.removeprefix(before)]

    def parse(self, text: str) -> tuple[str, list[dict]]:
        """See chat_template.Template."""
        return parse_any(text)

    def _marked(self, messages: list[dict], tools, ask: bool) -> list[Piece]:
        text, *rest = self._render(messages, ask, tools, marks=True).split(BEGIN)
        wanted = [weight_of(message) for message in messages if message["role"] == "assistant"]
        if len(wanted) != len(rest):
            unlike = [weight for weight in wanted if weight != 1]
            if unlike:
                raise UserError(
                    f"{self.name} has {len(rest)} {{% generation %}} blocks for {len(wanted)} answers; which"
                    f' of them has "weight": {unlike[0]:g}?'
                )
            wanted = [1.0] * len(rest)
        pieces = [(text, 0.0)]
        for part, weight in zip(rest, wanted):
            inside, closed, outside = part.partition(END)
            if not closed:
                raise UserError(f"{self.name}: a {{% generation %}} block lies inside another one")
            pieces += [(inside, weight), (outside, 0.0)]
        return pieces

    def _by_beginnings(
        self, messages: list[dict], tools, token_end: TokenEnd | None = None
    ) -> tuple[list[list[Piece]], str | None]:
        """(the documents up to the last answer, the text of the last one).

        The text is None where another answer would be in a new document.
        """
        documents: list[list[Piece]] = []
        written: str | None = None
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            asked = self._render(messages[:i], True, tools)
            answered = self._render(messages[: i + 1], False, tools)
            begin = self._common(asked, answered, messages[:i], tools)
            if written is None or not asked[:begin].startswith(written):
                documents.append([])
                written = ""
            prompt, end = asked.removeprefix(written), begin - len(written)
            if token_end and begin < len(asked):
                end = token_end(prompt, end)
            documents[-1].append((prompt[:end], 0.0))
            documents[-1].append((answered[len(written) + end :], weight_of(message)))
            # a chat has read all of `asked`, so it reads the whole text anew for the next answer
            written = answered if begin == len(asked) else None
        return documents, written

    def _common(self, asked: str, answered: str, before: list[dict], tools) -> int:
        """How many characters the text that asks for an answer and the text with it have in common.

        Raises UserError where these are not all of what the template writes for the messages before it, and
        something of the words that ask.
        """
        same = _common_beginning(asked, answered)
        if same == len(asked):
            return same
        of_messages = _common_beginning(self._render(before, False, tools), asked)
        if asked[of_messages:same].strip():
            return same
        raise UserError(
            f"{self.name}: what the template writes for the messages before an answer changes when it follows"
            f" ({asked[same:][:40]!r} becomes {answered[same:][:40]!r}), so the"
            " assistant's words can't be found; enclose them in {% generation %} ... {% endgeneration %}"
        )

    def _render(self, messages: list[dict], ask: bool = False, tools=None, marks: bool = False) -> str:
        try:
            text = self.template.render(
                messages=messages, tools=tools, add_generation_prompt=ask, bos_token="", eos_token=self.eos
            )
        except Exception as error:  # a template may raise anything that Python does
            raise UserError(f"{self.name}{_line(error)}: {error}") from None
        return text if marks else text.replace(BEGIN, "").replace(END, "")


def _common_beginning(a: str, b: str) -> int:
    return len(os.path.commonprefix([a, b]))


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
