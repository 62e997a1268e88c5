"""tokenizer.json of a table of bytes: the greedy longest match for any bytes, against a plain loop."""

import json
import random

import pytest

from src.data.tokenizer import load_tokenizer
from src.export import fast_tokenizer

tokenizers = pytest.importorskip("tokenizers", reason="the test extra is absent: pip install tokenizers")
LANGUAGES = (
    "The quick brown fox, naïve façade: 1234567.89\r\n\tGröße und Straße. Это русский текст. Ελληνικά. "
    "这是一个用多种语言写成的文本。これは日本語の文章です。한국어 문장입니다. यह हिन्दी है। นี่คือภาษาไทย "
    "هذا نص عربي. זה עברית. Tiếng Việt. မြန်မာ ქართული አማርኛ தமிழ் 🎉🌍👩‍👩‍👧"
    "\n    def f(x):\n        return x\n\n\n"
)


def greedy(table, data):
    """Ids of bytes by the definition: at each place the longest token."""
    ids, place = [], 0
    while place < len(data):
        size = next(n for n in table.sizes[data[place]] if data[place : place + n] in table.ids)
        ids.append(table.ids[data[place : place + size]])
        place += size
    return ids


class Table:
    """The ids of all tokens; byte -> the sizes of the tokens that begin with it, the largest first."""

    def __init__(self, table):
        self.ids = {piece: token for token, piece in table.items() if piece}
        sizes = {}
        for piece in self.ids:
            sizes.setdefault(piece[0], set()).add(len(piece))
        self.sizes = {byte: sorted(found, reverse=True) for byte, found in sizes.items()}


@pytest.fixture(scope="module")
def world():
    return load_tokenizer("world", 65536)


@pytest.fixture(scope="module")
def table(world):
    return Table(world.table)


@pytest.fixture(scope="module")
def content(world):
    assert fast_tokenizer.no_form(world) == ""
    return fast_tokenizer.tokenizer_json(world)


@pytest.fixture(scope="module")
def fast(content):
    return tokenizers.Tokenizer.from_str(content.decode())


def random_text(draw, size):
    """Characters of one to four bytes, no surrogates."""
    ranges = [(0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000)]
    return "".join(chr(draw.randrange(*draw.choice(ranges))) for _ in range(size))


def test_any_bytes(world, table, content):
    """A str holds no lone bytes, so the names of the bytes go in directly, without ByteLevel."""
    described = json.loads(content)
    described["pre_tokenizer"] = described["pre_tokenizer"]["pretokenizers"][1]
    matching = tokenizers.Tokenizer.from_str(json.dumps(described))
    names, draw, pieces = fast_tokenizer.byte_names(), random.Random(0), list(world.table.values())
    for _ in range(100):
        tokens = draw.choices(pieces, k=50)
        # whole tokens in a row, beginnings of tokens, where a longer match almost fits, and noise
        starts = [piece[: draw.randint(1, len(piece))] for piece in tokens if piece]
        for data in (b"".join(tokens), b"".join(starts), draw.randbytes(150)):
            assert matching.encode("".join(names[byte] for byte in data)).ids == greedy(table, data), data


def test_texts_of_many_languages_and_random_ones(world, table, fast):
    draw = random.Random(1)
    texts = [LANGUAGES, "", " ", "a" * 1000, " " * 1000, "<|endoftext|>", "Ġ Ċ Ā"]
    texts += [random_text(draw, 60) for _ in range(100)]
    for text in texts:
        ids = fast.encode(text).ids
        assert ids == world.encode(text) == greedy(table, text.encode()), text
        assert fast.decode(ids) == text


def test_every_token_decodes_to_its_bytes(world, fast):
    for token, piece in world.table.items():
        if token:
            assert fast.decode([token]) == piece.decode(errors="replace"), token
    assert fast.get_vocab_size() == 65530 and fast.token_to_id("<|endoftext|>") == 0


def test_a_token_of_a_row_of_tokens_that_begin_with_each_other():
    """The longest match fails late and falls back."""
    table = {i: bytes([i]) for i in range(256)} | {256: b"ab", 257: b"abcde", 258: b"abcdefgh", 259: b"cd"}
    expression = fast_tokenizer.longest_match([piece.decode("latin-1") for piece in table.values()])
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(expression), "isolated")
    for text, pieces in (
        ("abcdefg", ["abcde", "f", "g"]),
        ("abcd", ["ab", "cd"]),
        ("a]-^\\b", list("a]-^\\b")),
    ):
        assert [piece for piece, _ in split.pre_tokenize_str(text)] == pieces


@pytest.mark.parametrize(
    "lines,reason",
    [
        ([], "has no token for the byte 65, so some texts would be lost"),
        (["1 'A' 1", f"300 {'a' * 600!r} 600"], "has a token of 600 bytes, more than 512"),
        (["1 'A' 1", "300 '<|endoftext|>' 13"], "has a token <|endoftext|>, which is the name"),
        (["1 'A' 1", "300 'AB' 2"], ""),
    ],
)
def test_vocabularies_without_the_form_are_named(tmp_path, lines, reason):
    bytes_but_a = [f"{i + 2} {bytes([i])!r} 1" for i in range(256) if i != ord("A")]
    (tmp_path / "v.txt").write_text("\n".join(bytes_but_a + lines) + "\n")
    assert reason in fast_tokenizer.no_form(load_tokenizer(str(tmp_path / "v.txt"), 65536))
    assert bool(reason) == bool(fast_tokenizer.no_form(load_tokenizer(str(tmp_path / "v.txt"), 65536)))


def test_utf16_has_no_such_form():
    assert "utf16, whose end of document is two bytes" in fast_tokenizer.no_form(load_tokenizer("utf16", 256))
