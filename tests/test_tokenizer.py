"""Tokenizers: text comes back whole, streaming never shows half a character, and what cannot be encoded is
said, not lost.
"""

import ast
import concurrent.futures
import importlib.metadata
import importlib.util
import json
import pathlib
import pickle
import random
import re
import unicodedata

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from rwkv_miss import read_checkpoint, write_checkpoint
from rwkv_miss.errors import UserError
from src.data import tokenizer as module
from src.data.recorded_tokenizer import recorded_tokenizer
from src.data.tokenizer import load_tokenizer
from src.ops import native
from src.ops.longest_match import LARGEST_TABLE, NativeMatch, PlainMatch
from src.ops.toolchain import FALLBACK, BuildError

FAMILY = "\U0001f468‍\U0001f469‍\U0001f467"  # one visible emoji, three of them joined by ZWJ
TEXTS = [
    "",
    "Hello, world!\n\nUser: hi\r\n\tAssistant: 1 + 1 = 2   ",
    "人工智能会改变世界。\n你好，世界！",
    f"{FAMILY}\U0001f44d\U0001f3fd caf\u00e9 \U00020000 مرحبا नमस्ते",
    "a\x00b\x00\x00\x7f\x80\u2028\ufeff",
    "a mark \ufffd that is real \ufffd\ufffd中",
    "def f(x):\n        return x" + " " * 150 + "-" * 90,
]


@pytest.fixture(scope="module")
def world():
    return load_tokenizer("auto", 65536)


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


def vocabulary(path, table):
    sizes = {i: len(token.encode() if isinstance(token, str) else token) for i, token in table.items()}
    return write(path, "".join(f"{i} {token!r} {sizes[i]}\n" for i, token in table.items()))


def bpe(path, special=("<|endoftext|>", "<|padding|>"), **options):
    """A byte-level BPE as GPT-NeoX's 20B vocabulary: NFC, trimmed offsets, two special tokens."""
    inner = Tokenizer(models.BPE(**options))
    inner.normalizer = normalizers.NFC()
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.post_processor = processors.ByteLevel(trim_offsets=True)
    inner.decoder = decoders.ByteLevel()
    # Chinese in the training text gives merges of parts of two characters, the hard case of streaming
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(special),
        show_progress=False,
    )
    inner.train_from_iterator(TEXTS + ["世界人工智能会改变世界人工" * 5, "Hello world hello"], trainer)
    inner.save(str(path))
    return str(path)


def characters(path, alphabet="0123456789,#", special="#", unknown=None):
    """One id per character: the vocabulary of the 12-id rwkv7-reverse model."""
    options = {"unk_token": unknown} if unknown else {}
    inner = Tokenizer(models.WordLevel({c: i for i, c in enumerate(alphabet)}, **options))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    inner.add_special_tokens(list(special))
    inner.save(str(path))
    return str(path)


def byte_fallback(path):
    """As in Llama: a space is `▁`, one is stripped at the start, unknown characters are such as <0xE4>."""
    vocab = {
        token: i
        for i, token in enumerate(["<unk>", "</s>", "▁", *"abcdefgh", *(f"<0x{b:02X}>" for b in range(256))])
    }
    steps = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    prepared = [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ]
    flags = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
    special = [dict(id=i, content=text, special=True, **flags) for i, text in enumerate(["<unk>", "</s>"])]
    steps = [*steps, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    content = {
        "version": "1.0",
        "added_tokens": special,
        "normalizer": {"type": "Sequence", "normalizers": prepared},
        "decoder": {"type": "Sequence", "decoders": steps},
        "model": dict(type="BPE", vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True),
    }
    return write(path, content)


@pytest.fixture(params=["world", "bytes", "utf16", "vocabulary", "bpe", "byte_fallback"])
def tokenizer(request, tmp_path, world):
    """Every kind that can express any text."""
    if request.param == "world":
        return world
    if request.param == "vocabulary":
        table = {i + 1: bytes([i]) for i in range(256)} | {
            300: "人工",
            70000: "中",
            301: "    ",
            302: "人工".encode()[1:4],
        }
        return load_tokenizer(vocabulary(tmp_path / "vocabulary.txt", table), 70001)
    if request.param in ("bpe", "byte_fallback"):
        return load_tokenizer(
            {"bpe": bpe, "byte_fallback": byte_fallback}[request.param](tmp_path / "tokenizer.json"), 1000
        )
    return load_tokenizer(request.param, 256)


def random_text(seed):
    rng = random.Random(seed)
    ranges = [(0, 0x80), (0x80, 0x800), (0x4E00, 0x9FFF), (0x1F300, 0x1FAFF), (0x10000, 0x110000)]
    text = "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(1, 40)))
    return unicodedata.normalize("NFC", text)  # some tokenizer files normalise


@pytest.mark.parametrize("text", [*TEXTS, *map(random_text, range(10))], ids=range(len(TEXTS) + 10))
def test_text_comes_back_and_streams_in_whole_characters(tokenizer, text):
    ids = tokenizer.encode(text)
    assert all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.decode(ids) == text
    decoder = tokenizer.decoder()
    pieces = [decoder.push(i) for i in ids]
    pieces.append(decoder.flush())
    assert "".join(pieces) == text
    assert sum(piece.count("\ufffd") for piece in pieces) == text.count("\ufffd")
    # text arrives when it is complete, not at the end
    assert pieces[-1] == "" or text.endswith("\ufffd")


@pytest.mark.parametrize("text", TEXTS[1:4])
def test_no_character_waits_longer_than_its_own_ids(tokenizer, text):
    decoder, ids, shown, complete = tokenizer.decoder(), tokenizer.encode(text), "", ""
    for n, token in enumerate(ids, 1):
        shown += decoder.push(token)
        # byte fallback decodes a whole run of bytes to marks while its end is open, so the longest text so
        # far counts
        complete = max(complete, tokenizer.decode(ids[:n]).rstrip("\ufffd"), key=len)
        assert shown == complete


@pytest.mark.parametrize("seed", range(5))
def test_any_ids_stream_to_what_they_decode_to(world, seed):
    rng = random.Random(seed)
    for tokenizer, size in (
        (world, 300),
        (load_tokenizer("bytes", 256), 256),
        (load_tokenizer("utf16", 256), 256),
    ):
        ids = [rng.randrange(size) for _ in range(200)]
        decoder = tokenizer.decoder()
        assert "".join(map(decoder.push, ids)) + decoder.flush() == tokenizer.decode(ids)


def test_half_a_character_is_a_mark_at_the_end_and_is_forgotten(tokenizer):
    ids = tokenizer.encode("\U0001fae0")
    assert len(ids) > 1, "this test needs a character of several ids"
    decoder = tokenizer.decoder()
    assert "".join(map(decoder.push, ids[:-1])) == ""
    assert set(decoder.flush()) == {"\ufffd"} == set(tokenizer.decode(ids[:-1]))
    assert "".join(map(decoder.push, tokenizer.encode("ab"))) + decoder.flush() == "ab"


def naive_greedy(table, data):
    """The longest token at each place, by trying every length."""
    ids, place, longest = {token: i for i, token in table.items()}, 0, max(map(len, table.values()))
    found = []
    while place < len(data):
        size = next(
            n for n in range(longest, 0, -1) if data[place : place + n] in ids and place + n <= len(data)
        )
        found.append(ids[data[place : place + size]])
        place += size
    return found


def test_world_is_the_longest_match_over_its_file(world):
    path = pathlib.Path(importlib.util.find_spec("rwkv").origin).with_name("rwkv_vocab_v20230424.txt")
    table = {}
    for line in path.read_text(encoding="utf-8").rstrip("\n").split("\n"):
        token = ast.literal_eval(line[line.index(" ") + 1 : line.rindex(" ")])
        table[int(line[: line.index(" ")])] = token.encode() if isinstance(token, str) else token
    for text in [*TEXTS, *map(random_text, range(100))]:
        assert world.encode(text) == naive_greedy(table, text.encode())
    assert all(
        world.encode(token.decode()) == [i]
        for i, token in table.items()
        if token.decode(errors="ignore").encode() == token
    )
    # ids that RWKV people know by heart
    assert world.encode("\n\n") == [261] and world.encode("User:") == [24281, 59]


@pytest.mark.parametrize("seed", range(8))
def test_a_vocabulary_file_is_the_longest_match_whatever_its_ids(tmp_path, seed):
    rng = random.Random(seed)
    alphabet = "ab中\n'\\"
    words = {"".join(rng.choices(alphabet, k=rng.randrange(1, 5))).encode() for _ in range(12)} | {
        bytes([b]) for b in alphabet.encode()
    }
    # ids from 0, with gaps, and beyond 16 bits
    ids = sorted(rng.sample(range(100_000), len(words) - 1)) + [0]
    table = dict(zip(ids, sorted(words, key=lambda word: rng.random()), strict=True))
    tokenizer = load_tokenizer(vocabulary(tmp_path / "v.txt", table), 100_000, eod="a")
    for _ in range(20):
        text = "".join(rng.choices(alphabet, k=rng.randrange(20)))
        assert tokenizer.encode(text) == naive_greedy(table, text.encode())


def test_a_vocabulary_file_says_what_it_cannot_express(tmp_path):
    table = {1: "a", 2: "abcd", 3: "b", 4: "中", 5: "人".encode()[:2]}
    tokenizer = load_tokenizer(vocabulary(tmp_path / "v.txt", table), 6)
    assert tokenizer.encode("abab中abcd") == [1, 3, 1, 3, 4, 2]
    for text, character, place in (
        ("abc", "c", 3),
        ("x", "x", 1),
        ("中人a", "人", 2),
        ("中丁", "丁", 2),
        ("\0", "\0", 1),
    ):
        with pytest.raises(
            UserError, match=rf"no token for {re.escape(repr(character))} \(character {place}\)"
        ):
            tokenizer.encode(text)


@pytest.mark.parametrize(
    "line",
    [
        *"hello|1 'a' 2|1 'a'|-1 'a' 1|1 '' 0|1 5 5|x 'a' 1|1 __import__('os') 1||7 'c' 1|8 'b' 1".split("|"),
        f"{1 << 31} 'a' 1",
    ],
)
def test_a_damaged_vocabulary_file_names_its_line(tmp_path, line):
    path = write(tmp_path / "v.txt", f"7 'b' 1\n{line}\n9 'd' 1\n")
    with pytest.raises(UserError, match="line 2"):
        load_tokenizer(path, 100)


def test_a_vocabulary_file_has_any_number_of_tokens_up_to_a_size(tmp_path, monkeypatch):
    table = {i: i.to_bytes(3, "big") for i in range(1, 70_001)}
    path = vocabulary(tmp_path / "v.txt", table)
    tokenizer = load_tokenizer(path, 100_000)
    # `encode` takes text, and most of these bytes are none
    assert tokenizer.find(b"".join(table.values())) == list(table)
    monkeypatch.setattr(module, "LARGEST_TABLE", 210_000)
    with pytest.raises(UserError, match="tokens of 210,000 bytes together; .* may have 209,999"):
        load_tokenizer(path, 100_000)
    for wrong in ({1: bytes(LARGEST_TABLE)}, {1: b"a", 1 << 31: b"b"}, {-1: b"a"}):
        with pytest.raises(ValueError, match=f"expected fewer than {LARGEST_TABLE} bytes and ids from 0"):
            NativeMatch(wrong)


def any_text(draw, pieces):
    """Characters of any language, whole tokens, beginnings of tokens, or noise read as UTF-8."""
    size = draw.choice((1, 2, 5, 17, 60))
    if draw.random() < 0.4:
        starts = [0x20, 0xC0, 0x400, 0x5D0, 0x900, 0xE00, 0x3040, 0x4E00, 0xAC00, 0xFFF0, 0x1F300, 0x10FF00]
        start = draw.choice(starts)
        return "".join(chr(start + draw.randrange(draw.choice((8, 96)))) for _ in range(size))
    if draw.random() < 0.3:
        return draw.randbytes(size).decode(errors="replace")
    tokens = draw.choices(pieces, k=size)
    if draw.random() < 0.5:
        tokens = [piece[: draw.randint(1, len(piece))] for piece in tokens]
    return b"".join(tokens).decode(errors="replace")


def match_all(world, seed, count):
    """Compare the ids of random texts with those of the plain form, and of pyrwkv where it is installed.

    Returns the number of different texts.
    """
    draw, table = random.Random(seed), {token: piece for token, piece in world.table.items() if piece}
    plain, pieces, texts = PlainMatch(table), list(table.values()), set()
    pyrwkv = importlib.util.find_spec("pyrwkv_tokenizer") and importlib.import_module("pyrwkv_tokenizer")
    other = pyrwkv.RWKVTokenizer() if pyrwkv else None
    for _ in range(count):
        text = any_text(draw, pieces)
        texts.add(text)
        data = text.encode()
        ids = world.encode(text)
        assert ids == plain(data), data
        assert other is None or ids == other.encode(text), data
    return len(texts)


def test_native_and_plain_and_pyrwkv_have_the_same_ids(world):
    assert isinstance(world.find, NativeMatch)
    assert match_all(world, seed=0, count=3000) > 2500


@pytest.mark.parametrize("seed", range(20))
def test_native_and_plain_end_at_the_same_byte(seed):
    """Tables of random bytes, in which some bytes have no piece; all of it, or up to where none fits."""
    draw = random.Random(seed)
    alphabet = bytes(draw.sample(range(256), draw.randint(1, 5)))
    words = lambda most: bytes(draw.choices(alphabet, k=draw.randint(1, most)))  # noqa: E731
    pieces = list({words(draw.choice((2, 4, 40))) for _ in range(draw.randint(1, 60))})
    table = dict(zip(draw.sample(range(1 << 20), len(pieces)), pieces))
    native_match, plain = NativeMatch(table), PlainMatch(table)
    for _ in range(100):
        data = b"".join(draw.choices([*pieces, words(3)], k=draw.randrange(12)))
        assert native_match(data) == plain(data)
    assert native_match(b"") == [] == NativeMatch({})(b"abc") == PlainMatch({})(b"abc")
    # in memory a NUL follows the bytes
    assert NativeMatch({1: b"a", 2: b"a\0"})(b"a") == [1] == PlainMatch({1: b"a", 2: b"a\0"})(b"a")


def test_without_a_compiler_encoding_is_slow_and_one_line_says_so(monkeypatch, tmp_path, capsys, world):
    def fails(device):
        raise BuildError(f"no C++ compiler: install one, {FALLBACK}")

    monkeypatch.setattr(native, "library", fails)
    module._builds.cache_clear()
    try:
        slow, again = (load_tokenizer("world", 65536) for _ in range(2))
    finally:
        module._builds.cache_clear()
    assert isinstance(slow.find, PlainMatch) and isinstance(again.find, PlainMatch)
    for text in [*TEXTS, *map(random_text, range(50))]:
        assert slow.encode(text) == world.encode(text)
    said = capsys.readouterr().err
    assert said == ("text is encoded in plain Python, 10 times slower: no C++ compiler: install one\n")


def test_threads_and_other_processes_share_a_tokenizer(world):
    texts = list(map(random_text, range(200)))
    ids = list(map(world.encode, texts))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(world.encode, texts * 5)) == ids * 5
    copy = pickle.loads(pickle.dumps(world))
    assert copy is not world and list(map(copy.encode, texts)) == ids
    del copy  # frees its own trie only
    assert list(map(world.encode, texts)) == ids


def test_a_missing_vocabulary_says_what_to_install(monkeypatch):
    def fails(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", fails)
    with pytest.raises(UserError, match="in the package rwkv, .*; pip install rwkv, or give its file"):
        load_tokenizer("world", 65536)


def test_end_of_document_of_each_kind(tmp_path, world):
    assert (world.name, world.eod, world.vocab_size) == ("world", (0,), 65530)
    assert world.decode([*world.encode("hi"), *world.eod]) == "hi"
    for name, eod in (("bytes", (0,)), ("utf16", (0, 0))):
        tokenizer = load_tokenizer(name, 256)
        assert (tokenizer.name, tokenizer.eod, tokenizer.vocab_size) == (name, eod, 256)
        assert tokenizer.decode(eod) == "\0"
    assert load_tokenizer("utf16", 256).encode("a中") == [0x61, 0, 0x2D, 0x4E]

    free = vocabulary(tmp_path / "free.txt", {1: "a", 2: "b"})
    assert (load_tokenizer(free, 3).name, load_tokenizer(free, 3).eod, load_tokenizer(free, 3, "b").eod) == (
        free,
        (0,),
        (2,),
    )
    assert load_tokenizer(free, 3).decode([1, 0, 2]) == "ab"
    used = vocabulary(tmp_path / "used.txt", {0: "a", 1: "b"})
    assert load_tokenizer(used, 2, "b").eod == (1,)
    for path, eod in ((used, ""), (used, "c"), (free, "c")):
        with pytest.raises(UserError, match="--eod"):
            load_tokenizer(path, 3, eod)
    for name in ("auto", "world", "bytes", "utf16"):
        with pytest.raises(UserError, match="--eod"):
            load_tokenizer(name, 65536, "a")


@pytest.mark.parametrize(
    "special, eod, end",
    [
        (["<pad>", "</s>", "<|endoftext|>"], "", "<|endoftext|>"),
        (["<pad>", "<|im_end|>", "</s>"], "", "</s>"),
        (["<one>"], "", "<one>"),
        (["<pad>", "</s>"], "<pad>", "<pad>"),
        (["<pad>", "</s>"], "a", "a"),
    ],
)
def test_end_of_document_of_a_tokenizer_json(tmp_path, special, eod, end):
    tokenizer = load_tokenizer(bpe(tmp_path / "tokenizer.json", special), 1000, eod)
    assert tokenizer.decode(tokenizer.eod) == end
    # a token that the text spells is that token; none is added
    assert tokenizer.encode(f"b{end}b") == [*tokenizer.encode("b"), *tokenizer.eod, *tokenizer.encode("b")]


@pytest.mark.parametrize(
    "special, eod", [([], ""), (["<a>", "<b>"], ""), (["<a>", "</s>"], "<c>"), (["<unk>"], "")]
)
def test_a_tokenizer_json_without_end_lists_what_it_has(tmp_path, special, eod):
    path = bpe(
        tmp_path / "tokenizer.json", special, **({"unk_token": "<unk>"} if special == ["<unk>"] else {})
    )
    with pytest.raises(UserError, match=f"special tokens: {', '.join(special) or 'none'}. .*--eod"):
        load_tokenizer(path, 1000, eod)


def test_the_digits_of_the_reverse_model(tmp_path):
    tokenizer = load_tokenizer(characters(tmp_path / "tokenizer.json"), 12)
    assert (tokenizer.eod, tokenizer.vocab_size) == ((11,), 12)
    assert tokenizer.encode("12345,") == [1, 2, 3, 4, 5, 10]
    assert tokenizer.decode([5, 4, 3, 2, 1, 11]) == "54321#"


@pytest.mark.parametrize("kind", ["WordLevel", "WordLevel with unknown", "BPE"])
@pytest.mark.parametrize(
    "text, missing", [("x", "x"), ("1x2", "x"), ("12 3", " "), ("1中", "中"), ("12\n", "\n")]
)
def test_a_character_without_token_is_an_error(tmp_path, kind, text, missing):
    path = characters(
        tmp_path / "tokenizer.json", "0123456789,#?", unknown="?" if "unknown" in kind else None
    )
    if kind == "BPE":  # drops what it does not know
        content = json.loads(pathlib.Path(path).read_text())
        write(
            pathlib.Path(path),
            content | {"model": {"type": "BPE", "vocab": content["model"]["vocab"], "merges": []}},
        )
    tokenizer = load_tokenizer(path, 13)
    assert tokenizer.encode("1,2#") == [1, 10, 2, 11]
    with pytest.raises(UserError, match=re.escape(f"no token for {missing!r}")):
        tokenizer.encode(text)


def test_tokenizers_that_change_the_text_still_encode_all_of_it(tmp_path):
    twenty = load_tokenizer(bpe(tmp_path / "bpe.json"), 1000)
    assert twenty.decode(twenty.encode("e\u0301  e\u0301")) == "\u00e9  \u00e9"
    # a space put in front, and offsets that leave spaces out
    path = pathlib.Path(bpe(tmp_path / "prefixed.json"))
    content = json.loads(path.read_text(encoding="utf-8"))
    content["pre_tokenizer"]["add_prefix_space"] = True
    prefixed = load_tokenizer(write(path, content), 1000)
    assert prefixed.decode(prefixed.encode("a  b c")) == " a  b c"
    # without a decoder the tokens are joined by spaces
    path = pathlib.Path(characters(tmp_path / "spaced.json"))
    tokenizer = load_tokenizer(write(path, json.loads(path.read_text()) | {"decoder": None}), 12)
    assert tokenizer.encode("12,") == [1, 2, 10]
    with pytest.raises(UserError, match="no token for 'x'"):
        tokenizer.encode("12x")


def test_what_a_file_adds_and_cuts_is_off(tmp_path):
    path = bpe(tmp_path / "tokenizer.json")
    inner = Tokenizer.from_file(path)
    inner.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    inner.enable_truncation(4)
    inner.enable_padding(length=64)
    inner.save(path)
    tokenizer = load_tokenizer(path, 1000)
    assert tokenizer.decode(tokenizer.encode("a long text that is longer")) == "a long text that is longer"


@pytest.mark.parametrize(
    "kind, ids",
    [("world", (65530, 65535, 65536, -1)), ("bytes", (256, -1)), ("utf16", (256,)), ("json", (12, -1))],
)
def test_an_id_outside_the_vocabulary_is_named(tmp_path, world, kind, ids):
    tokenizer = {"world": world}.get(kind) or load_tokenizer(
        characters(tmp_path / "t.json") if kind == "json" else kind, 256
    )
    for token in ids:
        message = rf"id {token} .*size is {tokenizer.vocab_size}"
        with pytest.raises(UserError, match=message):
            tokenizer.decode([1, token])
        with pytest.raises(UserError, match=message):
            tokenizer.decoder().push(token)


def test_half_a_surrogate_pair_is_no_text(tokenizer):
    with pytest.raises(UserError, match=r"surrogate.*character 3"):
        tokenizer.encode("ab\ud83d")


def test_the_model_must_have_the_tokenizers_ids(tmp_path):
    files = {vocabulary(tmp_path / "v.txt", {1: "a", 99: "b"}): 100, characters(tmp_path / "t.json"): 12}
    for spec, size in {"world": 65530, "bytes": 256, "utf16": 256, **files}.items():
        with pytest.raises(UserError, match=f"{size}, more than the model's {size - 1}; .*--tokenizer"):
            load_tokenizer(spec, size - 1)
        if spec != "world":
            assert load_tokenizer(spec, size).vocab_size == load_tokenizer(spec, size + 50).vocab_size == size


def test_auto_is_world_or_a_question():
    for size in (256, 50277, 65530, 65537):
        with pytest.raises(UserError, match=rf"{size}.*--tokenizer world, bytes, utf16 or a FILE"):
            load_tokenizer("auto", size)


def test_a_file_that_is_absent_or_no_tokenizer(tmp_path):
    binary = tmp_path / "model.pth"
    binary.write_bytes(b"PK\x03\x04\xff\xfe")
    with pytest.raises(UserError, match="no such file"):
        load_tokenizer(str(tmp_path / "absent.json"), 256)
    with pytest.raises(UserError, match="did you mean bytes\\?"):
        load_tokenizer("byte", 256)
    for path in (tmp_path, binary):
        with pytest.raises(UserError, match=re.escape(str(path))):
            load_tokenizer(str(path), 256)
    for content in ("{", "{}", '{"model": 3}', "", "[1]"):
        with pytest.raises(UserError, match="t.json"):
            load_tokenizer(write(tmp_path / "t.json", content), 256)


def test_a_long_text_is_encoded_part_by_part_to_the_same_ids(tmp_path, monkeypatch):
    """Also where tokens end inside characters; what cannot be expressed is refused in the same place."""
    pieces = ["a", "ab", "abab", "b", "é", b"\xe4", b"\xbd\xa0", b"\xa0a", b"\xbd", b"\xbd\xa0\xe4", "你b"]
    size = lambda piece: len(piece.encode() if isinstance(piece, str) else piece)  # noqa: E731
    (tmp_path / "vocabulary.txt").write_text(
        "".join(f"{i} {piece!r} {size(piece)}\n" for i, piece in enumerate(pieces, 1))
    )
    rng, parts = random.Random(0), []
    for tokenizer in [
        load_tokenizer(name, 65536) for name in ("world", "utf16", str(tmp_path / "vocabulary.txt"))
    ]:
        for _ in range(40):
            words = rng.choice([["a", "b", "é", "你", "ab"], ["a", "🙂", "\n\n", " hello", "你", "x"]])
            text = "".join(rng.choices(words, k=rng.randint(20, 60)))
            results = []
            for length in (1 << 20, 1, 5, 17):
                monkeypatch.setattr(module, "LONG", length)
                try:
                    results.append(tokenizer.encode(text))
                except UserError as error:
                    results.append(str(error))
            parts.append(len(text) > 17)
            assert results == results[:1] * 4
    assert all(parts)


@pytest.mark.parametrize(
    "recorded,given,warned",
    [
        ("bytes", "utf16", True),
        ("bytes", "bytes", False),
        ("bytes", "auto", False),
        ("mine.json", "bytes", True),
        (None, "utf16", False),
    ],
)
def test_another_tokenizer_than_the_recorded_one_is_warned_of(checkpoint, recorded, given, warned, capsys):
    base = checkpoint(7, vocab_size=256)
    path = base.with_name("recorded.pth")
    write_checkpoint(path, read_checkpoint(base).items(), {"tokenizer": recorded} if recorded else None)
    assert recorded_tokenizer(given, "", 256, None, base, path).name == (
        "bytes" if given == "auto" else given
    )
    words = (
        f"WARNING: {path} was trained with the tokenizer {recorded}, {given} is another one; leave"
        " --tokenizer out"
    )
    assert (words in capsys.readouterr().err) == warned
