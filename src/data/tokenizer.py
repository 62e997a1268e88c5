"""Tokenizers, for text to ids and back: the World vocabulary, raw bytes, UTF-16 bytes, or a file.

World, bytes, utf16 and vocabulary files in World format are one thing: a table id -> bytes. They differ in
how a text finds its ids. A tokenizer.json is left to the `tokenizers` package.

encode() loses nothing silently. decode() is its inverse, up to what a tokenizer.json normalises: every id
gives its own text. World's end of document, id 0, is in no text and gives "". The others are texts and give
themselves: NUL of bytes and utf16, a file's `</s>`.
"""

from __future__ import annotations

import ast
import bisect
import codecs
import functools
import importlib.metadata
import itertools
import json
from collections.abc import Callable, Iterable

import numpy as np

from rwkv_miss.errors import UserError
from rwkv_miss.files.hf_names import VOCABULARY
from rwkv_miss.progress import Progress

from ..common.files import read_text
from ..common.first_process import is_first_process
from ..ops import native
from ..ops.build import announce
from ..ops.longest_match import LARGEST_ID, LARGEST_TABLE, NativeMatch, PlainMatch
from ..ops.toolchain import FALLBACK, BuildError
from .thoughts import within

CHOICES = "world, bytes, utf16 or a FILE (a tokenizer.json, or a vocabulary in World format)"
WORLD_MODEL = 65536
WORLD_IDS = 65530  # ids of the World vocabulary, from whichever file
END_NAMES = ("<|endoftext|>", "</s>", "<|im_end|>", "<eos>", "[EOS]", "<|eot_id|>", "<|end_of_text|>")
# end of document and encoding; in utf16 the end is two zeros, because one zero is in every ASCII character
RAW = {"bytes": ((0,), "utf-8"), "utf16": ((0, 0), "utf-16-le")}
BUILT_IN = ("world", *RAW)
BROKEN = "\ufffd"
LONG = 1 << 20  # characters of a text that are turned into ids at a time


def load_tokenizer(spec: str, vocab_size: int, eod: str = "") -> Tokenizer:
    """Load the tokenizer `spec` for a model with `vocab_size` ids.

    `spec` is auto, world, bytes, utf16 or the path of a file. `eod` is the text of the token that ends a
    document, for a file that does not tell. Raises UserError for a file that is missing, damaged or has no
    such token, and for a tokenizer with ids that the model lacks. A model may have more ids than the
    tokenizer, because models are padded.
    """
    if spec == "auto":
        if vocab_size != WORLD_MODEL:
            raise UserError(
                f"the model's vocabulary of {vocab_size} is not the World one ({WORLD_MODEL}); give"
                f" --tokenizer {CHOICES}"
            )
        spec = "world"
    if eod and spec in BUILT_IN:
        raise UserError(f"--eod {eod!r} is for a tokenizer file; {spec} has its own end of document")
    if spec == "world":
        tokenizer = _world()
    elif spec in RAW:
        own_eod, encoding = RAW[spec]
        tokenizer = ByteTokenizer(spec, own_eod, {i: bytes([i]) for i in range(256)}, list, encoding)
    else:
        tokenizer = _from_file(spec, eod)
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"tokenizer {tokenizer.name} has a vocabulary of {tokenizer.vocab_size}, more than the model's"
            f" {vocab_size}; give the one that the model was trained with: --tokenizer"
            f" {CHOICES.removeprefix(f'{spec}, ')}"
        )
    tokenizer.origin = spec, vocab_size, eod
    return tokenizer


class Tokenizer:
    """Tokenizer. `name` is for an adapter's metadata; `eod` are the ids that end a document.

    Every id is below `vocab_size`.
    """

    encoding = "utf-8"

    def __init__(self, name: str, eod: tuple[int, ...], ids: Iterable[int]):
        self.name, self.eod, self.ids = name, eod, frozenset(ids)
        self.vocab_size = max(self.ids) + 1

    def __reduce__(self):
        # another process loads it again, because the packages' own objects can't be pickled
        return load_tokenizer, self.origin

    def encode(self, text: str) -> list[int]:
        """Encode `text` to ids, with nothing added.

        Raises UserError for a character that the vocabulary cannot express.
        """
        try:
            data = text.encode(self.encoding)
        except UnicodeEncodeError as error:
            raise UserError(
                f"half a surrogate pair, {text[error.start]!r}, is no text (character {error.start + 1})"
            ) from None
        return self._encode(text, data)

    def decode(self, ids: Iterable[int]) -> str:
        """Decode `ids` to text; bytes that are no text give U+FFFD.

        Raises UserError for an id outside the vocabulary.
        """
        ids = list(ids)
        self.check(ids)
        return self._decode(ids)

    def check(self, ids: Iterable[int]) -> None:
        ids = list(ids)
        if not self.ids.issuperset(ids):
            token = next(token for token in ids if token not in self.ids)
            raise UserError(
                f"id {token} is not in the vocabulary of tokenizer {self.name}, whose size is"
                f" {self.vocab_size}"
            )

    def cannot_encode(self, text: str, place: int) -> UserError:
        return UserError(f"tokenizer {self.name} has no token for {text[place]!r} (character {place + 1})")


class ByteTokenizer(Tokenizer):
    """Tokenizer by a table id -> bytes. `find(bytes)` returns ids, and ends early if none fits."""

    def __init__(
        self,
        name: str,
        eod: tuple[int, ...],
        table: dict[int, bytes],
        find: Callable[[bytes], list[int]],
        encoding: str,
    ):
        super().__init__(name, eod, table)
        self.table, self.find, self.encoding = table, find, encoding
        self.sizes = {token: len(piece) for token, piece in table.items()}

    def _encode(self, text: str, data: bytes) -> list[int]:
        return self._encode_long(text) if len(text) > LONG else self._rest(text, data)

    def _encode_long(self, text: str) -> list[int]:
        """Find the same ids in one part of the text after another.

        The next token depends on no more text than the longest token has.
        """
        ids: list[int] = []
        done, size, beyond = 0, LONG, max(self.sizes.values())  # characters
        millions = len(text) / 1e6
        with Progress("tokenising a long text", millions, "million characters", is_first_process()) as bar:
            while done + size < len(text):
                part = text[done : done + size + beyond]
                data, length = part.encode(self.encoding), len(part[:size].encode(self.encoding))
                found = self.find(data)
                ends = [0, *itertools.accumulate(map(self.sizes.__getitem__, found))]
                if ends[-1] < length:
                    break  # no token fits; the rest says where
                count = bisect.bisect_right(ends, length) - 1
                # a token may end inside a character
                while not _is_text(data[: ends[count]], self.encoding):
                    count -= 1
                size = LONG if count else 2 * size
                ids += found[:count]
                characters = len(data[: ends[count]].decode(self.encoding))
                done += characters
                bar.update(characters / 1e6)
            return ids + self._rest(text, text[done:].encode(self.encoding), done)

    def _rest(self, text: str, data: bytes, start: int = 0) -> list[int]:
        """Encode the text from character `start` on, whose bytes are `data`."""
        ids = self.find(data)
        reached = sum(map(self.sizes.__getitem__, ids))
        if reached < len(data):
            raise self.cannot_encode(text, start + len(data[:reached].decode(self.encoding, "ignore")))
        return ids

    def inside(self, text: str, ids: list[int], spans: list[tuple[int, int]]) -> np.ndarray:
        """Tell which of a text's tokens `ids` lie wholly in one of the spans of characters, (n,) bool."""
        ends = np.cumsum([self.sizes[token] for token in ids], dtype=np.int64)
        in_bytes, place, before = [], 0, 0
        for begin, end in spans:
            first = before + len(text[place:begin].encode(self.encoding))
            before, place = first + len(text[begin:end].encode(self.encoding)), end
            in_bytes.append((first, before))
        return within(np.append(0, ends)[:-1], ends, in_bytes)

    def _decode(self, ids: list[int]) -> str:
        return b"".join(map(self.table.__getitem__, ids)).decode(self.encoding, "replace")

    def decoder(self) -> ByteDecoder:
        return ByteDecoder(self)


def _is_text(data: bytes, encoding: str) -> bool:
    try:
        data.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True


class ByteDecoder:
    """Decoder of one id after another: push() returns the characters that an id completes.

    flush() returns U+FFFD for a character that is left incomplete. `pending` tells whether part of a
    character waits for its other ids.
    """

    def __init__(self, tokenizer: ByteTokenizer):
        self.tokenizer = tokenizer
        self.codec = codecs.getincrementaldecoder(tokenizer.encoding)("replace")

    def push(self, token: int) -> str:
        self.tokenizer.check([token])
        return self.codec.decode(self.tokenizer.table[token])

    @property
    def pending(self) -> bool:
        return bool(self.codec.getstate()[0])

    def flush(self) -> str:
        return self.codec.decode(b"", final=True)


def _world() -> ByteTokenizer:
    try:
        # not find_spec(), which takes any folder called rwkv for the package
        path = importlib.metadata.distribution("rwkv").locate_file(f"rwkv/{VOCABULARY}")
        content = path.read_text(encoding="utf-8")
    except (importlib.metadata.PackageNotFoundError, OSError) as error:
        raise UserError(
            f"the World vocabulary is in the package rwkv, which cannot be read ({error}); pip install"
            f" rwkv, or give its file: --tokenizer {VOCABULARY}"
        ) from None
    return _from_vocabulary("world", content, "")


def _from_file(path: str, eod: str) -> Tokenizer:
    content = read_text(path, "a tokenizer", f"--tokenizer takes auto, {CHOICES}", ("auto", *BUILT_IN))
    if content.lstrip().startswith("{"):
        return JsonTokenizer(path, content, eod)
    return _from_vocabulary(path, content, eod)


def _from_vocabulary(name: str, content: str, eod: str) -> ByteTokenizer:
    """Read a vocabulary in World format, with lines `id literal length`.

    The literal is a Python str or bytes; the length is in bytes.
    """
    table: dict[int, bytes] = {}
    owners: dict[bytes, int] = {}  # the id of each text
    for number, line in enumerate(content.rstrip("\n").split("\n"), 1):
        parsed = _parse_line(line)
        if parsed is None:
            raise UserError(f"{name}, line {number}: expected `id 'text' length in bytes`, got {line[:80]!r}")
        token, piece = parsed
        if token in table or piece in owners:
            raise UserError(
                f"{name}, line {number}: id {token} or its text {piece!r} stands in an earlier line too"
            )
        table[token], owners[piece] = piece, token
    find = _longest_match(name, table)
    if eod:
        end = owners.get(eod.encode())
        if end is None:
            raise UserError(f"{name} has no token {eod!r}; --eod takes the text of one of its tokens")
    elif 0 in table:
        raise UserError(
            f"{name} uses id 0 for {table[0]!r} and does not tell its end of document; give the token's text"
            " with --eod"
        )
    else:
        end, table[0] = 0, b""
    return ByteTokenizer(name, (end,), table, find, "utf-8")


def _parse_line(line: str) -> tuple[int, bytes] | None:
    """Parse a line of a vocabulary to (id, bytes); None for a wrong one."""
    try:
        number, rest = line.split(" ", 1)
        literal, length = rest.rsplit(" ", 1)
        token, piece = int(number), ast.literal_eval(literal)
        if isinstance(piece, str):
            piece = piece.encode()
        if 0 <= token <= LARGEST_ID and isinstance(piece, bytes) and 0 < len(piece) == int(length):
            return token, piece
    except (ValueError, SyntaxError, TypeError):
        pass
    return None


def _longest_match(name: str, table: dict[int, bytes]) -> Callable[[bytes], list[int]]:
    """Make a greedy longest match, in C++ if that can be built."""
    size = sum(map(len, table.values()))
    if size >= LARGEST_TABLE:
        raise UserError(
            f"{name} has tokens of {size:,} bytes together; a vocabulary in World format may have"
            f" {LARGEST_TABLE - 1:,}"
        )
    if _builds():
        return NativeMatch(table)
    return PlainMatch(table)


@functools.cache
def _builds() -> bool:
    """Tell whether the native code can be built; if not, one line says that encoding is slow."""
    try:
        native.library("cpu")
    except BuildError as error:
        if is_first_process():
            reason = str(error).replace(f", {FALLBACK}", "")
            announce(f"text is encoded in plain Python, 10 times slower: {reason}")
        return False
    return True


@functools.cache
def byte_names() -> tuple[str, ...]:
    """Return the character for each byte in every byte-level tokenizer (GPT-2's table).

    Bytes that Latin-1 shows stand for themselves, the others for the characters from U+0100 on.
    """
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in shown]
    return tuple(chr(byte if byte in shown else 256 + hidden.index(byte)) for byte in range(256))


class JsonTokenizer(Tokenizer):
    """Tokenizer of a tokenizer.json, by its path and content."""

    def __init__(self, path: str, content: str, eod: str):
        import tokenizers

        try:
            # leave out three parts, which add tokens, trim offsets or lose text
            described = json.loads(content) | {"post_processor": None, "truncation": None, "padding": None}
            self.inner = tokenizers.Tokenizer.from_str(json.dumps(described))
        except Exception as error:  # `tokenizers` raises nothing narrower
            raise UserError(
                f"{path} is no tokenizer.json that the tokenizers package can read: {error}"
            ) from None
        unknown = described["model"].get("unk_token")
        self.unknown = self.inner.token_to_id(unknown) if unknown else described["model"].get("unk_id")
        special = [token["content"] for token in described.get("added_tokens") or () if token["special"]]
        named = [name for name in END_NAMES if name in special]
        only = special if len(special) == 1 and special[0] != unknown else []
        end = next(map(self.inner.token_to_id, [eod] if eod else only or named), None)
        if end is None:
            seen = f"has no token {eod!r}" if eod else "does not tell which token ends a document"
            raise UserError(
                f"{path} {seen}; its special tokens: {', '.join(special) or 'none'}. Give the text of the"
                " token with --eod"
            )
        super().__init__(path, (end,), self.inner.get_vocab(with_added_tokens=True).values())

    def _encode(self, text: str, data: bytes) -> list[int]:
        try:
            encoded = self.inner.encode(text, add_special_tokens=False)
        except Exception:  # WordLevel without an unknown token, which does not say where it failed
            missing = "".join(sorted(set(text).difference(*self.inner.get_vocab())))
            raise UserError(f"tokenizer {self.name} has no token for {missing or text[:80]!r}") from None
        back = self._decode(encoded.ids)
        if back != text and not (self.inner.normalizer and back == self.inner.normalizer.normalize_str(text)):
            self._check_covered(text, encoded)
        return encoded.ids

    def _check_covered(self, text: str, found) -> None:
        """Raise UserError for a character that is in no token: BPE, for one, drops what it does not know.

        A comparison of texts would not do, because not every decoder gives the very text back.
        """
        reached = 0
        for token, (start, end) in zip(found.ids, found.offsets, strict=True):
            if start > reached or token == self.unknown:
                break
            reached = max(reached, end)
        if reached < len(text):
            raise self.cannot_encode(text, reached)

    def inside(self, text: str, ids: list[int], spans: list[tuple[int, int]]) -> np.ndarray:
        """Do as ByteTokenizer.inside()."""
        offsets = self.inner.encode(text, add_special_tokens=False).offsets
        begins, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
        return within(begins, ends, spans)

    def _decode(self, ids: list[int]) -> str:
        return self.inner.decode(ids, skip_special_tokens=False)

    def decoder(self) -> WindowDecoder:
        return WindowDecoder(self)


class WindowDecoder:
    """ByteDecoder for a tokenizer.json: it decodes a short window and returns text that later ids can't
    change.

    The bytes of an id are not known. The window has the ids of the last piece too, because an id may decode
    differently at the start of a text. U+FFFD at its end may be half a character. It waits for what follows,
    or for flush().
    """

    def __init__(self, tokenizer: JsonTokenizer):
        self.tokenizer = tokenizer
        self.window: list[int] = []
        self.context = 0  # ids of the last piece
        self.shown = 0  # characters of the window that were returned
        self.pending = False

    def push(self, token: int) -> str:
        text = self.tokenizer.decode([*self.window, token])
        self.window.append(token)
        piece = text.rstrip(BROKEN)[self.shown :]
        self.shown += len(piece)
        self.pending = text.endswith(BROKEN)
        if piece and not self.pending:
            self.window = self.window[self.context :]
            self.context, self.shown = len(self.window), len(self.tokenizer.decode(self.window))
        return piece

    def flush(self) -> str:
        piece = self.tokenizer.decode(self.window)[self.shown :]
        self.window, self.context, self.shown, self.pending = [], 0, 0, False
        return piece
