"""Jinja chat template of the user, with the conventions of Hugging Face's `chat_template`.

A template is given messages, tools, add_generation_prompt, bos_token and eos_token. bos_token is always
empty, because --bos is put before the ids. The template may call raise_exception() and tojson.

Two texts are rendered for each answer: one that asks for it, and one in which it is the last message. The
answer begins where they part, and has the end of its turn. It is trained, or only its text between `{%
generation %}` and `{% endgeneration %}` if the template has such marks.

- Where each text is the beginning of the next, the conversation is one document.
- Many templates rewrite earlier turns, such as by taking out thoughts. A new document begins with each answer
whose text before it differs from the document so far. So a model sees its earlier answers
  as it will in a chat, and each answer is trained once.
- The prompt may end in words that the template does not write before the answer, such as `<think`. Then the
  document has the common beginning, up to the end of a token, and the next answer is in a new one.
- If the messages before an answer are written differently once it follows, only marks help. The conversation
  is then one document, and the marks alone tell what is trained.
"""

from __future__ import annotations

import contextlib
import json
import os
import re

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from rwkv_miss.errors import UserError

from .chat_template import BEGUN_THOUGHTS, CONTEXT, Segment, TokenEnd, thoughts_of, weight_of
from .tool_styles import parse_any, read_call

# in the rendered text, around the trained parts: noncharacters, which no text has
BEGIN, END = "\ufdd0{generation\ufdd1", "\ufdd0generation}\ufdd1"

OTHER = "Other thoughts."


class Generation(jinja2.ext.Extension):
    """Jinja extension with the block {% generation %}."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("marked"), [], [], body).set_lineno(line)

    def marked(self, caller):
        return BEGIN + caller() + END


class _Changed(UserError):
    """Error: the messages before an answer are written differently once it follows."""


class JinjaTemplate:
    """Chat template from Jinja source.

    Raises UserError, with the line, for source that is wrong or fails on a trial conversation.
    """

    def __init__(self, name: str, source: str, eos: str):
        self.name, self.record, self.eos = name, source, eos
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
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
        """Find the end of a turn, the opening of an answer in a chat, and its stop.

        The stop is the end of the turn. If that is only space, it is the beginning of the next turn.
        """
        question = {"role": "user", "content": "A question?"}
        answer = {"role": "assistant", "content": "An answer."}
        prompt = self._render([question], True)
        whole = self._render([question, answer])
        again = self._render([question, answer, question])
        for text, message in ((prompt, question), (whole, answer)):
            if message["content"] not in text:
                raise UserError(
                    f"{self.name}: the template writes a conversation without the {message['role']}'s words;"
                    f" got {text!r}"
                )
        self.turn_end = whole.rpartition(answer["content"])[2]
        between = again.rpartition(answer["content"])[2].partition(question["content"])[0]
        stop = self.turn_end.strip() or between.rstrip()
        self.stops = (stop,) if stop else ()
        begun = BEGUN_THOUGHTS.search(prompt)
        self.opening = begun[0] if begun else ""
        documents = self.documents([question, answer, question, answer])
        with contextlib.suppress(_Changed):  # which documents() has allowed, as there are marks
            self.asked_only = prompt[self._common(prompt, whole, [question], None) :]
        if self.marks and not any(segment.weight for segment in documents[0]):
            raise UserError(
                f"{self.name}: {{% generation %}} does not enclose the assistant's words; got {whole!r}"
            )

    def segments(
        self, messages: list[dict], tools: list[dict] | None = None, ask: bool = False
    ) -> list[Segment]:
        """Return the end of the conversation, from where the template rewrites nothing (see this module).

        Often that is the whole conversation. So a chat asks in the pieces of the training.
        """
        self._require_tools(messages, tools)
        try:
            documents, written = self._by_answers(messages, tools)
        except _Changed as changed:
            return self._by_marks(messages, tools, ask, changed)
        whole = self._render(messages, ask, tools)
        if written is None or not whole.startswith(written):
            return [Segment(whole, 0.0)] if whole else []
        return _full([*documents[-1], Segment(whole.removeprefix(written), 0.0)])

    def documents(
        self, messages: list[dict], tools: list[dict] | None = None, token_end: TokenEnd | None = None
    ) -> list[list[Segment]]:
        self._require_tools(messages, tools)
        try:
            documents, written = self._by_answers(messages, tools, token_end)
        except _Changed as changed:
            return [self._by_marks(messages, tools, False, changed)]
        if not documents:
            return [_full([Segment(self._render(messages, False, tools), 0.0)])]
        if written is not None and messages[-1]["role"] != "assistant":
            whole = self._render(messages, False, tools)
            if whole.startswith(written):
                documents[-1].append(Segment(whole.removeprefix(written), 0.0))
        trained = [segments for segments in documents if any(segment.weight for segment in segments)]
        return [_full(segments) for segments in trained or documents[-1:]]

    def next_turn(
        self, messages: list[dict], new: list[dict], tools: list[dict] | None = None
    ) -> list[str] | None:
        *earlier, answer = messages
        prompt, before = self._render(earlier, True, tools), self._render(messages, False, tools)
        after = self._render([*messages, *new], True, tools)
        if not (before.startswith(prompt) and before.endswith(self.turn_end) and after.startswith(before)):
            return None
        # the model has read what it said, which the template may write otherwise
        content, written = answer["content"].removeprefix(self.opening), before.removeprefix(prompt)
        if content.strip() != written.removesuffix(self.turn_end).strip():
            return None
        return [self.turn_end, after.removeprefix(before)]

    def parse(self, text: str) -> tuple[str, list[dict]]:
        return parse_any(text)

    def drops_thoughts(self, messages: list[dict], tools: list[dict] | None = None) -> bool:
        *before, answer = messages
        if not thoughts_of(answer)[0]:
            return False
        changed = {key: OTHER for key in ("reasoning_content", "reasoning") if answer.get(key)}
        if not changed:  # the thoughts are in the content
            changed["content"] = f"<think>{OTHER}</think>{answer['content'].partition('</think>')[2]}"
        return self._writes_alike(messages, tools, [*before, {**answer, **changed}], tools)

    def _require_tools(self, messages: list[dict], tools: list[dict] | None) -> None:
        """Raise UserError for wrong calls, and for tools or calls that the template does not write."""
        if tools and self._writes_alike(messages, tools, messages, None):
            raise UserError(f"{self.name} does not write tools; choose another --template")
        for i, message in enumerate(messages):
            if message["role"] != "assistant" or not message.get("tool_calls"):
                continue
            for call in message["tool_calls"]:
                read_call(call)
            mute = {key: value for key, value in message.items() if key != "tool_calls"}
            # a later turn may change this one's text; it is trained as it is here
            if self._writes_alike(messages[: i + 1], tools, [*messages[:i], mute], tools):
                raise UserError(f"{self.name} does not write tool_calls; choose another --template")

    def _writes_alike(self, messages: list[dict], tools, others: list[dict], other_tools) -> bool:
        """Tell whether other messages and tools become the same text."""
        text = self._render(messages, False, tools)
        try:
            return text == self._render(others, False, other_tools)
        except UserError:  # the others have no form
            return False

    def _by_answers(
        self, messages: list[dict], tools, token_end: TokenEnd | None = None
    ) -> tuple[list[list[Segment]], str | None]:
        """Return (the documents up to the last answer, the text of the last one).

        The text is None if another answer would be in a new document. Raises _Changed.
        """
        documents: list[list[Segment]] = []
        written: str | None = None
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:i], True, tools)
            parts = self._parts(messages[: i + 1], tools)
            answered = "".join(text for text, _ in parts)
            begin = self._common(before, answered, messages[:i], tools)
            if written is None or not before[:begin].startswith(written):
                documents.append([])
                written = ""
            prompt, end = before.removeprefix(written), begin - len(written)
            if token_end and begin < len(before):
                end = token_end(prompt, end)
            # most of this prompt is in an earlier document; as one piece for the tokenizer it has one weight
            is_repeated = not written and any(s.weight for earlier in documents[:-1] for s in earlier)
            documents[-1].append(Segment(prompt[:end], CONTEXT if is_repeated else 0.0))
            documents[-1] += self._answer(parts, len(written) + end, weight_of(message))
            # a chat has read all of `before`, so it reads the whole text again for the next answer
            written = answered if begin == len(before) else None
        return documents, written

    def _answer(self, parts: list[tuple[str, bool]], start: int, weight: float) -> list[Segment]:
        """Cut the answer that begins at the character `start` of a text in parts.

        The end of its turn is a segment by itself, as in a chat. In a template with marks only the text
        inside them has the weight.
        """
        text = "".join(part for part, _ in parts)
        end = len(text) - len(self.turn_end) if text.endswith(self.turn_end) else len(text)
        segments, place = [], 0
        for part, inside in parts:
            for first, last in ((start, end), (max(start, end), len(text))):
                piece = part[max(first - place, 0) : max(last - place, 0)]
                segments.append(Segment(piece, weight if inside or not self.marks else 0.0))
            place += len(part)
        return segments

    def _by_marks(self, messages: list[dict], tools, ask: bool, changed: _Changed) -> list[Segment]:
        """Cut the conversation as one document, in which the marks alone tell what is trained."""
        if not self.marks:
            raise changed
        parts = self._parts(messages, tools, ask)
        wanted = [weight_of(message) for message in messages if message["role"] == "assistant"]
        blocks = sum(inside for _, inside in parts)
        if len(wanted) != blocks:
            unlike = [weight for weight in wanted if weight != 1]
            if unlike:
                raise UserError(
                    f"{self.name} has {blocks} {{% generation %}} blocks for {len(wanted)} answers; which of"
                    f' them has "weight": {abs(unlike[0]):g}?'
                )
            wanted = [1.0] * blocks
        weights = iter(wanted)
        return _full([Segment(text, next(weights) if inside else 0.0) for text, inside in parts])

    def _parts(self, messages: list[dict], tools, ask: bool = False) -> list[tuple[str, bool]]:
        """Render the text in parts, and tell for each whether it stands in {% generation %}."""
        text, *rest = self._render(messages, ask, tools, marks=True).split(BEGIN)
        parts = [(text, False)]
        for part in rest:
            inside, closed, outside = part.partition(END)
            if not closed:
                raise UserError(f"{self.name}: a {{% generation %}} block lies inside another one")
            parts += [(inside, True), (outside, False)]
        return parts

    def _common(self, asked: str, answered: str, before: list[dict], tools) -> int:
        """Count the characters that the prompt for an answer and the text with the answer have in common.

        Raises _Changed unless these are the template's whole text of the messages before it, and a part of
        the words that ask.
        """
        same = _common_beginning(asked, answered)
        if same == len(asked):
            return same
        of_messages = _common_beginning(self._render(before, False, tools), asked)
        if asked[of_messages:same].strip():
            return same
        change = f"({asked[same:][:40]!r} becomes {answered[same:][:40]!r})"
        if before and before[-1]["role"] == "assistant":
            raise _Changed(
                f"{self.name}: two assistant messages follow each other, and the template writes the first"
                f" one otherwise when it is not the last {change}; make one message of them, or enclose the"
                " assistant's words in {% generation %} ... {% endgeneration %}"
            )
        raise _Changed(
            f"{self.name}: what the template writes for the messages before an answer changes when it follows"
            f" {change}, so the assistant's words can't be found; enclose them in {{% generation %}} ..."
            " {% endgeneration %}"
        )

    def _render(self, messages: list[dict], ask: bool = False, tools=None, marks: bool = False) -> str:
        try:
            text = self.template.render(
                messages=messages, tools=tools, add_generation_prompt=ask, bos_token="", eos_token=self.eos
            )
        except Exception as error:  # a template may raise anything that Python does
            raise UserError(f"{self.name}{_line(error)}: {error}") from None
        return text if marks else text.replace(BEGIN, "").replace(END, "")


def _full(segments: list[Segment]) -> list[Segment]:
    return [segment for segment in segments if segment.text]


def _common_beginning(a: str, b: str) -> int:
    return len(os.path.commonprefix([a, b]))


def _raise(message: str):
    raise jinja2.TemplateError(message)


def _to_json(
    value, ensure_ascii: bool = False, indent: int | None = None, separators=None, sort_keys: bool = False
) -> str:
    """Write JSON without escaping < and >, as Jinja's own filter for HTML would."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _line(error: Exception) -> str:
    """Name the template's line of an error, ", line N", from the frames that Jinja makes up for it."""
    line, trace = "", error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = f", line {trace.tb_lineno}"
        trace = trace.tb_next
    return line
