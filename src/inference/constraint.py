"""Constraints: answers that can only have a given form, such as JSON of a schema.

The package `llguidance` reads the grammar of a form and tells which tokens may come next. A grammar is of
bytes, so every text has all its encodings. An answer ends as soon as its form is complete. Where the form may
end but need not, the tokens that continue it, the end of document and the stops are allowed.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import re
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from rwkv_miss.errors import UserError

from ..common.formatting import short
from ..data.tokenizer import ByteTokenizer, Tokenizer
from .stop_texts import StopTexts, TokenBytes

# within these limits the worst schemas take 0.3 s and 9 MB: 700 properties with enums, 1,000 numbers
LONGEST = 1 << 16  # bytes of a grammar
SYMBOLS = 10_000
LEXER_STATES = 5000
SEARCH = 0.5  # seconds to find the wrong part of a schema
# seconds of the processor that all answers of one form may take together: 500,000 tokens of a usual schema
DEADLINE = 60.0


class TooSlow(UserError):
    """Error of a form that takes more time than a request may have, which is the request's own fault."""


class Constraint(Protocol):
    """Constraint of one answer, which takes its tokens one after another."""

    ended: bool  # whether the answer is complete
    exhausted: bool  # whether the form became too complex to go on
    # characters at the end of the text: the stop of an ended answer, or the possible beginning of a stop
    held: int

    def mask(self) -> np.ndarray:
        """Return the tokens that may come next, (V,) bool."""

    def accept(self, token: int) -> None:
        """Take the next token, one of the mask's."""


class AnswerForm(Protocol):
    """Form of answers. start() begins one, whose text may end in one of the stops."""

    def start(self, stops: Sequence[str]) -> Constraint: ...


class GrammarCompiler:
    """Compiler of grammars to forms, for one tokenizer.

    Raises UserError without llguidance, and for a tokenizer that does not write UTF-8.
    """

    def __init__(self, tokenizer: Tokenizer):
        try:
            import llguidance
        except ImportError:
            raise UserError(
                f"the form of an answer needs llguidance, not installed for {sys.executable}:"
                " pip install llguidance"
            ) from None
        if tokenizer.encoding != "utf-8":
            raise UserError(f"tokenizer {tokenizer.name} writes no UTF-8, which the form of an answer needs")
        self.package = llguidance
        self.size = tokenizer.vocab_size
        (end,) = tokenizer.eod
        source = _Table(tokenizer) if isinstance(tokenizer, ByteTokenizer) else tokenizer.inner.to_str()
        self.tokens = llguidance.LLTokenizer(source, n_vocab=self.size, eos_token=end)
        self.vocabulary = TokenBytes(
            {token: self.tokens.decode_bytes([token]) for token in tokenizer.ids if token != end}
        )
        # masks are made while the model computes
        self.thread = concurrent.futures.ThreadPoolExecutor(1, "masks")

    def compile(self, lark: str, parts: dict[str, dict[str, Any]] | None = None) -> GrammarForm:
        """Compile a grammar in llguidance's Lark, in which @NAME stands for a part.

        A part is {"json_schema": ...} or {"lark_grammar": ...}. Raises UserError for a grammar that is wrong,
        or too large for 1 s and 10 MB.
        """
        grammars = [{"lark_grammar": lark}, *({"name": name, **part} for name, part in (parts or {}).items())]
        text = json.dumps({"grammars": grammars})
        if len(text) > LONGEST:
            raise UserError(f"the form has {len(text):,} bytes, expected at most {LONGEST:,}")
        limits = self.package.LLParserLimits(
            max_lexer_states=LEXER_STATES, max_grammar_size=SYMBOLS, verbose_errors=False
        )
        matcher = self.package.LLMatcher(self.tokens, text, log_level=0, limits=limits)
        if matcher.is_error():
            reason = matcher.get_error()
            schemas = (part["json_schema"] for part in (parts or {}).values() if "json_schema" in part)
            place = next(filter(None, (self._place(schema, reason) for schema in schemas)), "")
            at = f" at {short(place)}" if place else ""
            raise UserError(f"the form can't be compiled: {short(reason.strip())}{at}")
        return GrammarForm(self, matcher)

    def _place(self, schema: dict[str, Any], reason: str) -> str:
        """Return the JSON pointer to the smallest part of a schema that fails for this reason, or ""."""
        until, options = time.monotonic() + SEARCH, schema.get("x-guidance")
        for place, part in _objects(schema):
            grammar = {"grammars": [{"json_schema": {**part, "x-guidance": options}}]}
            if self.package.LLMatcher.validate_grammar(json.dumps(grammar)) == reason:
                return place
            if time.monotonic() > until:
                break
        return ""

    def regex(self, text: str) -> dict[str, Any]:
        r"""Make a part for compile() from a regular expression, which the whole answer has to match.

        \d and \w are ASCII's, as in the pattern of a schema. Raises UserError for a wrong one.
        """
        grammar = f"start: /{self.package.regex_to_lark(text, 'dw')}/"
        # compile() would show this grammar, and refuses longer ones
        error = self.package.LLMatcher.validate_grammar(grammar) if len(grammar) < LONGEST else ""
        if reason := re.search("^error: (.*)$", error, re.M):
            raise UserError(f"got {short(text)}, expected a regular expression: {reason[1]}")
        return {"lark_grammar": grammar}

    def grammar(self, text: str) -> dict[str, Any]:
        """Make a part for compile() from a grammar in Lark or GBNF. Raises UserError."""
        from llguidance.gbnf_to_lark import any_to_lark

        if (size := len(text.encode(errors="replace"))) > LONGEST:  # the conversion takes many seconds
            raise UserError(f"the grammar has {size:,} bytes, expected at most {LONGEST:,}")
        try:
            return {"lark_grammar": any_to_lark(text)}
        except Exception as error:  # llguidance's own class, and Python's for grammars that are cut off
            raise UserError(f"the grammar is neither Lark nor GBNF: {error}") from None


def _objects(value: Any, place: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the objects in a JSON value with their places, such as /anyOf/0, the inner ones first."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield from _objects(inner, f"{place}/{key}")
    if isinstance(value, dict):
        yield place, value


class GrammarForm:
    """Form by a compiled grammar, of the answers to one client's request.

    Its answers share `spent`, the seconds of the processor so far, and have an error after DEADLINE of them.
    """

    def __init__(self, compiler: GrammarCompiler, matcher: Any):
        self.compiler, self.matcher = compiler, matcher
        self.stop_texts: dict[tuple[str, ...], StopTexts] = {}
        self.spent = 0.0
        self.adding = threading.Lock()  # the engine's thread and that of the masks add to it

    def start(self, stops: Sequence[str]) -> GrammarConstraint:
        if (key := tuple(stops)) not in self.stop_texts:
            self.stop_texts[key] = StopTexts(self.compiler.vocabulary, stops)
        return GrammarConstraint(self, self.stop_texts[key])

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Add the time of this block to `spent`. Raises TooSlow at its beginning if that is too much."""
        if self.spent > DEADLINE:
            raise TooSlow(
                f"the form of this request took {self.spent:.0f} s of the processor so far, expected at most"
                f" {DEADLINE:g} s; ask for a simpler form, for fewer answers or for fewer tokens"
            )
        began = time.thread_time()
        try:
            yield
        finally:
            with self.adding:
                self.spent += time.thread_time() - began


class GrammarConstraint:
    """Constraint by a grammar.

    `begun` are the stops that the text has begun, each from a place where the form was complete, as a set of
    StopTexts. A stop inside the form, such as in a JSON string, is text.
    """

    def __init__(self, form: GrammarForm, stops: StopTexts):
        self.form, self.stops = form, stops
        self.compiler, self.matcher = form.compiler, form.matcher.deep_copy()
        self.begun = 0
        self.inside = True  # whether the text so far may still be the form's own
        self.ended = self.exhausted = False
        self.held = 0
        self.coming = self.compiler.thread.submit(self._mask)

    def mask(self) -> np.ndarray:
        return self.coming.result()

    def accept(self, token: int) -> None:
        with self.form.timed():
            self._take(token)
        if not self.ended:
            self.coming = self.compiler.thread.submit(self._mask)

    def _take(self, token: int) -> None:
        fits = self.inside and bool(self.allowed[token])
        pieces, texts = list(self._pieces(token)), self.compiler.vocabulary.pieces
        for place, piece in enumerate(pieces):
            self.begun, end = self.stops.after(self.begun, texts[piece], self._is_complete())
            self.inside = fits and self.matcher.consume_token(piece)
            if end:
                rest = b"".join(map(texts.__getitem__, pieces[place + 1 :]))
                self.ended, self.held = True, _characters(end + rest)
                return
        self.held = _characters(self.stops.longest(self.begun))
        if self.matcher.is_error():
            self.exhausted = not self.begun
        elif self.inside and self.matcher.is_stopped():
            self.ended, self.held = True, 0

    def _pieces(self, token: int) -> Iterator[int]:
        """Yield the token, or its bytes one by one if a stop may begin inside it."""
        ids, text = self.compiler.vocabulary.ids, self.compiler.vocabulary.pieces[token]
        single = [ids.get(text[i : i + 1]) for i in range(len(text))]
        inside = not self.stops.first_bytes.isdisjoint(text[1:])
        yield from single if inside and None not in single else [token]

    def _is_complete(self) -> bool:
        """Tell whether the form may end here."""
        return self.inside and self.matcher.is_accepting()

    def _mask(self) -> np.ndarray:
        with self.form.timed():
            if self.inside:
                bits = np.frombuffer(self.matcher.compute_bitmask(), np.uint8)
                self.allowed = np.unpackbits(bits, count=self.compiler.size, bitorder="little").view(bool)
                self.exhausted = self.matcher.is_error()
            else:
                self.allowed = np.zeros(self.compiler.size, bool)
            allowed = self.allowed | self.exhausted
            allowed[self.stops.next_tokens(self.begun, self._is_complete())] = True
        return allowed


def _characters(text: bytes) -> int:
    return len(text.decode("utf-8", "ignore"))


class _Table:
    """Table of a tokenizer as llguidance reads it."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: ByteTokenizer):
        self.eos_token_id = tokenizer.eod[0]
        self.special_token_ids = list(tokenizer.eod)
        self.tokens = [tokenizer.table.get(token, b"") for token in range(tokenizer.vocab_size)]
        self.find = tokenizer.find

    def __call__(self, text: str | bytes) -> list[int]:
        return self.find(text if isinstance(text, bytes) else text.encode())
