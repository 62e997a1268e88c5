"""Constraints of the engine: a random model writes what it is told to, and nothing else."""

import json
import random
import re
import time

import numpy as np
import pytest
import torch

pytest.importorskip("llguidance", reason="NO llguidance (the extra test has it): forms are not tested")

from rwkv_miss import UserError
from src.data.tokenizer import load_tokenizer
from src.inference import constraint
from src.inference.constraint import GrammarCompiler
from src.inference.engine import Request
from src.inference.sampling import FadedCounts, RowInputs, Sampling, choose, runs_native

from .test_engine import WARM, alone, engine_of, finished, said, tokenizer_of
from .test_generate import write_vocabulary

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "age": {"type": "integer", "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
WORDS = "start: /[a-z]{2,9}( [a-z]{1,5})*/"


@pytest.fixture(scope="module")
def compiler():
    return GrammarCompiler(tokenizer_of("bytes"))


def schema(compiler, value):
    return compiler.compile("start: @json", {"json": {"json_schema": value}})


def person(text):
    value = json.loads(text)
    assert list(value) == ["name", "age"] and isinstance(value["age"], int) and value["age"] <= 99
    assert isinstance(value["name"], str) and len(value["name"]) <= 5


def is_words(text):
    assert re.fullmatch(r"[a-z]{2,9}( [a-z]{1,5})*", text)


def is_list(text):
    assert {type(value) for value in json.loads(text)} <= {bool, type(None)}


def several(compiler):
    """(request, check of its complete answers): forms, samplings, seeds, stops, logprobs."""
    forms = [
        (schema(compiler, PERSON), person),
        (compiler.compile(WORDS), is_words),
        (schema(compiler, {"type": "array", "items": {"type": ["boolean", "null"]}}), is_list),
        (compiler.compile('start: "yes" | "no"'), lambda text: ["yes", "no"].index(text)),
        (None, lambda text: None),
    ]
    samplings = [Sampling(0), WARM, Sampling(1, 1, 5, 0.5, 0.2), Sampling(2, 1)]
    for i in range(16):
        form, check = forms[i % 5]
        options = {"sampling": samplings[i % 4], "seed": i, "stops": ("\n\n", "e"), "form": form}
        yield Request([i + 1] * (1 + i % 3), 80, n=1 + i % 2, logprobs=i % 3 or None, **options), check


def test_answers_have_their_forms_and_do_not_depend_on_each_other(compiler):
    asked = list(several(compiler))
    want = [said(alone(request)) for request, _ in asked]
    engine = engine_of(rows=16, chunk=16)
    got = [engine.submit(request) for request, _ in asked]
    finished(engine)
    assert [said(answers) for answers in got] == want
    ends = [answer.finish for answers in got for answer in answers if answer.request.form]
    assert ends.count("stop") > len(ends) / 2
    for answers, (_, check) in zip(got, asked):
        for answer in answers:
            if answer.finish == "stop":
                check(answer.text)
            assert len(answer.logprobs) == (len(answer.tokens) if answer.request.logprobs else 0)


def test_an_answer_ends_as_soon_as_its_form_is_complete(compiler):
    (answer,) = alone(Request([1], 80, form=compiler.compile('start: "yes" | "no"')))
    assert answer.tokens == list(answer.text.encode()) and answer.finish == "stop"
    (answer,) = alone(Request([1], 2, form=schema(compiler, PERSON)))
    assert (answer.text, answer.finish) == ('{"', "length") or answer.text.strip() == "{"


def ended(constraint, tokens):
    """Tell whether it ends, and with how many characters of a stop; every token has to be allowed."""
    for token in tokens:
        assert not constraint.ended and constraint.mask()[token]
        constraint.accept(token)
    return constraint.ended, constraint.held


def test_a_turn_may_end_only_where_the_form_may(compiler):
    words, stops = compiler.compile(WORDS), ["\n\nUser:", "✿"]
    for text, expected in (
        ("ab", (False, 0)),
        ("ab\n", (False, 1)),
        ("ab\n\nUser:", (True, 7)),
        ("ab✿", (True, 1)),
        ("ab cd\n\n", (False, 2)),
    ):
        assert ended(words.start(stops), text.encode()) == expected
    mask = words.start(stops).mask()
    assert not mask[0] and not mask[ord("\n")]  # a letter is no word yet
    begun = words.start(stops)
    ended(begun, b"ab\n")
    assert begun.mask().nonzero()[0].tolist() == [ord("\n")]
    within = schema(compiler, {"type": "string"}).start(["✿"])
    assert ended(within, '"a✿b"'.encode()) == (True, 0)


def test_a_stop_is_found_inside_a_token(tmp_path):
    singles = [bytes([byte]) for byte in range(1, 256)]
    path = write_vocabulary(tmp_path / "vocabulary.txt", [*singles, b".\n\n", b"User", b":\n", b"\n\nUser"])
    tokenizer = load_tokenizer(str(path), 300)
    compiler = GrammarCompiler(tokenizer)
    text = compiler.compile("start: /(?s:.*)/").start(["\n\nUser:"])
    assert ended(text, tokenizer.encode("So.\n\nUser:\n")) == (True, 8)
    dots = compiler.compile("start: /[a-z.]+/").start(["\n\nUser:"])
    ended(dots, tokenizer.encode("so"))
    allowed = {tokenizer.decode([token]) for token in dots.mask().nonzero()[0] if token}
    assert allowed == {*"abcdefghijklmnopqrstuvwxyz.\n", "\n\nUser"}


class Plain:
    """A GrammarConstraint's masks and ends, made from sets of texts: slow, and easy to read."""

    def __init__(self, compiler, form, stops):
        self.pieces, self.ids = compiler.vocabulary.pieces, compiler.vocabulary.ids
        self.matcher, self.size = form.matcher.deep_copy(), compiler.size
        self.stops, self.begun = [stop.encode() for stop in stops], set()
        self.inside, self.ended, self.held = True, False, 0

    def begins(self):
        complete = self.inside and self.matcher.is_accepting()
        return self.begun | {b""} if complete else self.begun

    def mask(self):
        self.allowed = np.zeros(self.size, bool)
        if self.inside:
            bits = np.frombuffer(self.matcher.compute_bitmask(), np.uint8)
            self.allowed = np.unpackbits(bits, count=self.size, bitorder="little").astype(bool)
        mask = self.allowed.copy()
        for begin in self.begins():
            for rest in (stop.removeprefix(begin) for stop in self.stops if stop.startswith(begin)):
                ends = (self.ids.get(rest[: size + 1]) for size in range(len(rest)))
                mask[[token for token in ends if token is not None]] = True
        return mask

    def accept(self, token):
        fits, text = self.inside and self.allowed[token], self.pieces[token]
        single = [self.ids.get(text[i : i + 1]) for i in range(len(text))]
        split = None not in single and any(stop[:1] in text[1:] for stop in self.stops)
        pieces = single if split else [token]
        for place, piece in enumerate(pieces):
            begun = {begin + self.pieces[piece] for begin in self.begins()}
            self.inside = fits and self.matcher.consume_token(piece)
            rest = b"".join(self.pieces[one] for one in pieces[place + 1 :])
            if done := [text for text in begun if text.startswith(tuple(self.stops))]:
                self.ended, self.held = True, characters(max(done, key=len) + rest)
                return
            self.begun = {text for text in begun if any(stop.startswith(text) for stop in self.stops)}
        self.held = max(map(characters, self.begun), default=0)
        if self.inside and self.matcher.is_stopped():
            self.ended, self.held = True, 0


def characters(text):
    return len(text.decode(errors="ignore"))


@pytest.mark.parametrize("singles", [True, False], ids=["tokens of single bytes", "none of some bytes"])
def test_masks_and_ends_are_those_of_the_plain_computation(tmp_path, singles):
    rng = random.Random(singles)

    def text(most):
        return "".join(rng.choice("aab\n\u273f") for _ in range(rng.randrange(1, most)))

    bytes_ = [bytes([byte]) for byte in range(1, 256) if singles or byte not in b"b\n"]
    longer = {text(6).encode() for _ in range(60)} | {b"\xbfa", b"\x9c\xbf", b"b", b"\n"}
    vocabulary = [*bytes_, *sorted(longer - set(bytes_))]
    path = write_vocabulary(tmp_path / "vocabulary.txt", vocabulary)
    compiler = GrammarCompiler(load_tokenizer(str(path), len(vocabulary) + 1))
    regexes = "a*", "(?s:.*)", "(a|ba|\u273f)*", "[ab]{3,9}"
    forms = [compiler.compile(f"start: /{regex}/") for regex in regexes]
    forms.append(schema(compiler, {"type": "string"}))
    ends = steps = 0
    for _ in range(100):
        form, stops = rng.choice(forms), [text(8) for _ in range(rng.randrange(6))]
        ours, plain = form.start(stops), Plain(compiler, form, stops)
        for _ in range(20):
            want = plain.mask()
            assert ours.mask().tolist() == want.tolist()
            allowed = want.nonzero()[0].tolist()
            likely = [token for token in allowed if token and vocabulary[token - 1][0] in b'ab\n"\xe2']
            token = rng.choice(likely or allowed)
            if not token:
                break
            ours.accept(token)
            plain.accept(token)
            steps += 1
            assert (ours.ended, ours.held) == (plain.ended, plain.held)
            if ours.ended:
                ends += 1
                break
    assert ends > 20 and steps > 300


def test_the_work_of_a_token_does_not_grow_with_the_stops_that_may_have_begun(compiler):
    """16 stops of 500 letters may begin at each of these letters: issue 59, one request stopped everybody."""
    stops = ["a" * 499 + letter for letter in "bcdefghijklmnopq"]
    begun, began = compiler.compile("start: /a*/").start(stops), time.process_time()
    assert ended(begun, b"a" * 450) == (False, 450)
    assert time.process_time() - began < 3  # 0.2 s; it was more than 100 s


def test_a_form_that_takes_too_long_ends_its_request_and_no_other(compiler, monkeypatch):
    other = Request([2], 20, WARM, seed=3)
    want, form = said(alone(other)), compiler.compile(WORDS)
    monkeypatch.setattr(constraint, "DEADLINE", 0.0)
    engine = engine_of(rows=4)
    slow, goes_on = engine.submit(Request([1], 20, form=form, n=2)), engine.submit(other)
    finished(engine)
    assert [answer.finish for answer in slow] == ["error"] * 2 and said(goes_on) == want
    for word in ("the form of this request took", "expected at most 0 s", "simpler form"):
        assert all(word in str(answer.error) for answer in slow)


def test_a_tokenizer_json_has_forms_too(tmp_path):
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["</s>"], initial_alphabet=alphabet)
    inner.train_from_iterator(['{"name": "Bo", "age": 3}'] * 9, trainer)
    inner.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"), 400)
    begun = schema(GrammarCompiler(tokenizer), PERSON).start(["\n\nUser:"])
    ids = tokenizer.encode('{"name": "é✿ Bo", "age": 33}')
    assert len(ids) < 25 and ended(begun, ids) == (True, 0)


def test_thoughts_are_free_before_a_form(compiler):
    form = compiler.compile(
        'start: h @json\nh[lazy]: T "</think>"\nT: /(?s:.*)/', {"json": {"json_schema": PERSON}}
    )
    begun = form.start(["\n\nUser:"])
    assert ended(begun, b">\nIs { </thin good?\n\nUser: hm") == (False, 0)
    assert ended(begun, b'</think>{"name": "Bo", "age": 3}') == (True, 0)


def test_native_code_and_numpy_draw_the_same(compiler):
    if not runs_native("cpu"):
        pytest.skip("NO NATIVE CODE HERE")
    form = schema(compiler, PERSON)
    torch.manual_seed(0)
    logits = torch.randn(8, 256)
    for sampling in (Sampling(0), WARM, Sampling(1, 1), Sampling(1, 0.5, 200, 3.0, 1.0)):
        seen = FadedCounts(sampling)
        for token in b"a {{":
            seen.add(token)
        native, plain = (
            choose(
                logits,
                [
                    RowInputs(sampling, seen, torch.Generator().manual_seed(i), 3, form.start(()))
                    for i in range(8)
                ],
                native_code,
            )
            for native_code in (True, False)
        )
        assert [one.token for one in native] == [one.token for one in plain]
        assert {one.token for one in plain} <= set(b" \n\t\r{")
        for one, other in zip(native, plain):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-5)
            assert [i for i, _ in one.likeliest] == [i for i, _ in other.likeliest]
        exact = logits.double().log_softmax(1)
        for row, one in enumerate(native):
            assert one.logprob == pytest.approx(exact[row, one.token].item(), abs=1e-5)


@pytest.mark.parametrize(
    "schema, words",
    [
        ({"type": "strin"}, "strin'$"),
        (
            {"properties": {"a": {"$ref": "#/$defs/b"}}, "$defs": {"b": {"items": {"type": "strin"}}}},
            r"Invalid type: strin' at '/\$defs/b/items'$",
        ),
        (
            {"anyOf": [{"type": "null"}, {"properties": {"c": {"pattern": "("}}}]},
            "at '/anyOf/1/properties/c'$",
        ),
        ({"properties": {"a": {"const": 1}, "b": {"$ref": "#/none"}}}, "not exist\" at '/properties/b'$"),
    ],
)
def test_a_wrong_schema_is_refused_with_the_place(compiler, schema, words):
    with pytest.raises(UserError, match=words):
        compiler.compile("start: @it", {"it": {"json_schema": {**schema, "x-guidance": {"lenient": True}}}})


def test_wrong_and_large_forms_are_refused(compiler, monkeypatch):
    for value, word in (
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "objekt"}, "objekt"),
        ({"$ref": "http://example.com/a"}, "example.com"),
        ({"type": "string", "pattern": "("}, "pattern|regex"),
        ({"enum": [str(i) for i in range(9999)]}, "65,536"),
    ):
        with pytest.raises(UserError, match=word):
            schema(compiler, value)
    with pytest.raises(UserError, match="grammar has 70,000 bytes, expected at most 65,536"):
        compiler.grammar("(" * 70_000)
    with pytest.raises(UserError, match="start: /"):
        compiler.compile("start: /[a-z/")
    monkeypatch.setattr(constraint, "LEXER_STATES", 20)
    form = compiler.compile("start: /(.*a.{50}b.*|.*c.{60}d.*)/")
    (answer,) = alone(Request([1], 500, WARM, form=form))
    assert answer.finish == "length" and len(answer.tokens) < 500 and not answer.error
    with pytest.raises(UserError, match="utf16 writes no UTF-8"):
        GrammarCompiler(tokenizer_of("utf16"))
