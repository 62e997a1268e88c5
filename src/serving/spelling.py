"""Spelling of a text by its tokens: the characters, and the bytes, that each of them gives to it."""

from __future__ import annotations

import codecs
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..data.tokenizer import ByteTokenizer, Tokenizer
from ..inference.answer_text import ends_document


class Spelled(NamedTuple):
    """Token with its part of a text.

    A character has the token that completes it, while bytes have their own. So the parts of a text's tokens,
    joined, are the text.
    """

    begin: int  # character of the text
    text: str
    bytes: list[int]
    token: Any  # sampling.Drawn or prompt_logprobs.Scored


class _Placed(NamedTuple):
    """Token in the text of all tokens so far, of which a part may be cut."""

    begin: int
    text: str
    bytes: list[tuple[int, int]]  # (the character that a byte belongs to, the byte)
    token: Any

    @property
    def end(self) -> int:
        """Return the end of its characters, one that is only begun included."""
        return max([self.begin + max(1, len(self.text)), *(place + 1 for place, _ in self.bytes)])

    def cut(self, begin: int, end: int) -> Spelled:
        first, last = (min(max(place - self.begin, 0), len(self.text)) for place in (begin, end))
        data = [byte for place, byte in self.bytes if begin <= place < end]
        return Spelled(max(self.begin, begin), self.text[first:last], data, self.token)


class Spelling:
    """Tokens of an answer, whose text begins at character `length`, or of a prompt.

    push() takes tokens, take() gives those that are known to be in a text. An end of document is text in a
    prompt, but not in an answer. Finding the bytes takes twice as long.
    """

    def __init__(self, tokenizer: Tokenizer, with_bytes: bool, length: int = 0, is_prompt: bool = False):
        self.tokenizer, self.with_bytes, self.is_prompt = tokenizer, with_bytes, is_prompt
        self.ids: list[int] = []
        self.length = length
        self.waiting: list[_Placed] = []
        self.is_table = isinstance(tokenizer, ByteTokenizer) and tokenizer.encoding == "utf-8"
        self.codec = codecs.getincrementaldecoder("utf-8")("replace")
        self.decoder = tokenizer.decoder()

    def push(self, tokens: Sequence[Any]) -> None:
        for token in tokens:
            self.ids.append(token.token)
            begin, data = self.length, []
            ended = not self.is_prompt and ends_document(self.ids, self.tokenizer.eod)
            text = "" if ended else self._text(token.token, data)
            self.length = begin + len(text)
            self.waiting.append(_Placed(begin, text, data, token))

    def _text(self, token: int, data: list[tuple[int, int]]) -> str:
        """Return the characters that a token completes, and add its bytes to `data`, if they are wanted."""
        if not (self.with_bytes and self.is_table):
            text = self.decoder.push(token)
            for place, character in enumerate(text if self.with_bytes else "", self.length):
                data += [(place, byte) for byte in character.encode("utf-8", "replace")]
            return text
        text = ""
        for byte in self.tokenizer.table[token]:
            text += self.codec.decode(bytes([byte]))
            begins = bool(self.codec.getstate()[0])  # or goes on with a character that is incomplete
            data.append((self.length + len(text) - (not begins), byte))
        return text

    def take(self, begin: int, end: int, is_whole: bool, with_end: bool = False) -> list[Spelled]:
        """Give the next tokens of the characters from `begin` to `end`, cut to these.

        Unless the text is whole, a token waits until all of its characters are known. `with_end`: tokens
        behind the text are given too, if none of them has a character, such as the end of document.
        """
        # complete tokens come first: while a chat thinks, no other one is looked at
        complete = [*itertools.takewhile(lambda one: is_whole or one.end <= end, self.waiting)]
        del self.waiting[: len(complete)]
        inside = [one for one in complete if begin < one.end and one.begin < end]
        behind = [one for one in complete if one.begin >= end]
        if with_end and not any(one.text for one in behind):
            inside += behind
        return [one.cut(begin, end) for one in inside]


def spelled_prompt(tokenizer: Tokenizer, tokens: Sequence[Any], text: str) -> list[Spelled]:
    """Spell a prompt's text. Half a character at its end is a broken one."""
    spelling = Spelling(tokenizer, with_bytes=False, is_prompt=True)
    spelling.push(tokens)
    if spelling.waiting:
        last = spelling.waiting[-1]
        spelling.waiting[-1] = last._replace(text=last.text + text[spelling.length :])
    return spelling.take(0, len(text), True, with_end=True)
