"""The engine: an answer is the same whoever else is answered, and ends as it should."""

import dataclasses
import functools
import math
import random
import types

import pytest
import torch

from rwkv_miss import UserError
from src.data.tokenizer import load_tokenizer
from src.inference import decoders, prompt_logprobs
from src.inference.adapters import Applied
from src.inference.cpu_decoder import Decoder, problem
from src.inference.decoders import fastest
from src.inference.engine import Engine, Request
from src.inference.logit_changes import LogitChanges
from src.inference.prefix_cache import PrefixCache, StateKind
from src.inference.sampling import Sampling
from src.inference.torch_decoder import TorchDecoder
from src.model import RWKV

from .conftest import close, make_arch, random_tensors
from .toy_decoder import Toy, toy_state

WARM = Sampling(1.0, 0.9)


@functools.cache
def tiny(version, vocab_size=256):
    """A model in float64, whose rows do not depend on each other's number in any digit that a token shows."""
    arch = make_arch(version, vocab_size=vocab_size, n_embd=32)
    model = RWKV(arch).double().eval()
    loud = ("att.output.weight", "ffn.value.weight")
    tensors = random_tensors(arch)
    model.load_state_dict({name: t * (6 if name.endswith(loud) else 1) for name, t in tensors.items()})
    return model


@functools.cache
def tokenizer_of(kind):
    return load_tokenizer(kind, 256)


def engine_of(version=7, kind="bytes", rows=4, **options):
    return Engine(TorchDecoder(tiny(version), rows), tokenizer_of(kind), **options)


def finished(engine):
    """Step until all is answered."""
    while not engine.idle:
        engine.step()


def alone(request, version=7, kind="bytes", **options):
    engine = engine_of(version, kind, rows=1, **options)
    answers = engine.submit(request)
    finished(engine)
    return answers


def requests(count, seed=0, **changes):
    """Different requests: lengths, samplings, seeds, limits."""
    rng = random.Random(seed)
    made = []
    for i in range(count):
        tokens = [rng.randrange(1, 256) for _ in range(rng.choice([1, 2, 7, 16, 17, 40]))]
        sampling = rng.choice([Sampling(0), WARM, Sampling(1, 1, 5, 0.5, 0.2)])
        options = {"max_tokens": rng.randrange(1, 25), "sampling": sampling, "seed": i, "stops": ("q", "zz")}
        made.append(Request(tokens, **{**options, **changes}))
    return made


def said(answers):
    return [(answer.tokens, answer.text, answer.finish) for answer in answers]


@pytest.mark.parametrize("version", [6, 7])
@pytest.mark.parametrize("kind", ["bytes", "utf16"])
def test_an_answer_does_not_depend_on_the_others(version, kind):
    """Together, late, after others left: the tokens are those of the request alone."""
    asked = requests(9)
    want = [said(alone(request, version, kind)) for request in asked]
    engine = engine_of(version, kind, rows=3, chunk=16, reads_first=False)
    got = []
    for i, request in enumerate(asked):
        got.append(engine.submit(request))
        for _ in range(i % 4):
            engine.step()
    finished(engine)
    assert [said(answers) for answers in got] == want
    assert engine.waiting == engine.running == 0


@pytest.mark.parametrize("version", [6, 7])
def test_prompts_that_are_read_together_get_the_same_answers(version):
    """Prompts of 1 to 40 tokens, several answers each, fewer rows than answers; one starts elsewhere."""
    asked = requests(16, n=2, max_tokens=4)
    asked[4] = dataclasses.replace(asked[4], start=tiny(version).next_logits(torch.tensor([[3, 5]]))[1])
    engine = engine_of(version, rows=20, together=200)
    read, plain = [], engine.decoder.read_together
    engine.decoder.read_together = lambda ids, reset: read.append(ids.shape) or plain(ids, reset)
    answers = [engine.submit(request) for request in asked]
    finished(engine)
    assert [said(given) for given in answers] == [said(alone(request, version)) for request in asked]
    assert sum(rows for rows, _ in read) > 5 and all(rows > 1 and rows * width <= 200 for rows, width in read)


@pytest.mark.parametrize("version", [6, 7])
@pytest.mark.parametrize("native", [False, True])
def test_prompt_logprobs_are_those_of_a_whole_forward_pass(version, native, monkeypatch):
    """In float64, or by the CPU's decoder; also where a prompt's states are in the cache."""
    monkeypatch.setattr(prompt_logprobs, "LOGITS_AT_ONCE", 5 * 256)
    model = tiny(version)
    engine = engine_of(version, chunk=16, cache_bytes=1 << 24)
    if native:
        copy = RWKV(model.arch, "cpu").eval().requires_grad_(False)
        copy.load_state_dict(model.state_dict())
        if reason := problem(copy):
            pytest.skip(f"NO CPU DECODER: {reason}")
        engine.decoder = Decoder(copy, 4)
    near = 1e-4 if native else 1e-9
    ids = torch.randint(256, (50,), generator=torch.Generator().manual_seed(3)).tolist()
    for length in (1, 2, 16, 17, 35):
        with torch.no_grad():
            logits = model(torch.tensor([ids[:length]]))[0][0]
        want = logits.log_softmax(-1)
        plain, _, scored = (
            engine.submit(Request(ids[:length], most, WARM, 7, prompt_logprobs=count))[0]
            for most, count in ((6, None), (6, 0), (0, 3))
        )
        finished(engine)
        asked = engine.submit(Request(ids[:length], 6, WARM, 7, n=2, prompt_logprobs=0))
        finished(engine)
        assert asked[0].tokens == plain.tokens != asked[1].tokens, "the answer stays the same"
        assert (scored.finish, scored.tokens, scored.cached_tokens) == ("length", [], 0)
        assert asked[1].prompt_logprobs[0] == (ids[0], None, 0, []) and len(scored.prompt_logprobs) == length
        for place, (token, one) in enumerate(zip(ids[1:length], scored.prompt_logprobs[1:], strict=True)):
            row = want[place]
            assert one.token == token and one.logprob == pytest.approx(row[token].item(), abs=near)
            assert abs(one.rank - 1 - int((row > row[token]).sum())) <= native
            assert [p for _, p in one.likeliest] == pytest.approx(row.topk(3)[0].tolist(), abs=near)
            assert all(p == pytest.approx(row[id].item(), abs=near) for id, p in one.likeliest)
            assert {id: p for id, p in one.likeliest}.get(token, one.logprob) == one.logprob
        assert all(not one.likeliest for one in asked[0].prompt_logprobs[1:])


def test_a_state_alone_comes_without_prompt_logprobs():
    with pytest.raises(UserError, match="leave out prompt_logprobs"):
        alone(Request([5, 6], 0, prompt_logprobs=0, keep_state=True))


def test_prompt_logprobs_of_a_model_in_bf16_are_exact():
    """Other prompts are read in bf16, where the CPU multiplies in it."""
    half = RWKV(tiny(7).arch, "cpu").eval().requires_grad_(False)
    half.load_state_dict(tiny(7).state_dict())
    half = half.bfloat16()
    if reason := problem(half):
        pytest.skip(f"NO CPU DECODER: {reason}")
    exact = RWKV(half.arch).double().eval()
    exact.load_state_dict(half.state_dict())
    engine = Engine(Decoder(half, 1), tokenizer_of("bytes"), chunk=16)
    ids = torch.randint(256, (40,), generator=torch.Generator().manual_seed(4))
    (answer,) = engine.submit(Request(ids.tolist(), 0, prompt_logprobs=0))
    finished(engine)
    with torch.no_grad():
        want = exact(ids[None, :-1])[0][0].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    assert [one.logprob for one in answer.prompt_logprobs[1:]] == pytest.approx(want.tolist(), abs=1e-4)


def test_a_prompt_that_overflows_has_no_logprobs():
    engine = engine_of()
    state = engine.decoder.read(torch.tensor([[1]]), None)[1]
    bad = [layer._replace(att_x=layer.att_x + math.inf) for layer in state]
    (answer,) = engine.submit(Request([5, 6], 0, start=bad, prompt_logprobs=1))
    finished(engine)
    assert answer.finish == "error" and "overflows" in str(answer.error)


@pytest.mark.parametrize("kind", ["bytes", "utf16"])
def test_an_end_is_held_back(kind):
    """The likeliest token is the end, which comes after min_tokens tokens, or never; a stop, too."""

    def answered(bias, stops=(), **changes):
        changed = LogitChanges(bias, **changes)
        return alone(Request([5], 40, WARM, stops=stops, changes=changed), kind=kind)[0]

    size = len(tokenizer_of(kind).eod)
    assert answered({0: 100}).tokens == [0] * size
    held = answered({0: 100}, min_tokens=7)
    assert held.finish == "stop" and len(held.tokens) == 8 and 0 not in held.tokens[size - 1 : 7 : size]
    never = answered({0: 100}, ignore_eos=True)
    assert never.finish == "length" and 0 not in never.tokens[size - 1 :: size]
    assert len(never.tokens) == 40
    if kind == "bytes":
        a = {ord("a"): 100}
        for least in (0, 6):
            stopped = answered(a, ("a",), min_tokens=least)
            assert (stopped.text, stopped.finish) == ("a" * least, "stop")
    with pytest.raises(UserError, match="min_p 2: expected 0 to 1"):
        answered({}, min_p=2)


def test_run_gives_each_request_its_answers_and_keeps_the_rows_busy():
    asked = requests(4, n=2)
    engine = engine_of(rows=3)
    got = {id(answers[0].request): said(answers) for answers in engine.run(iter(asked))}
    assert [got[id(request)] for request in asked] == [said(alone(request)) for request in asked]
    assert len({tuple(one[0]) for both in got.values() for one in both}) > 4


def test_senseless_requests_are_refused_before_anything_runs():
    engine = engine_of()
    for bad, words in (
        (Request([]), "no token"),
        (Request([5, 256]), "256 is not in the vocabulary"),
        (Request([5], n=0), "n 0"),
        (Request([5], max_tokens=-1), "max_tokens -1"),
        (Request([5], prompt_logprobs=-1), "prompt_logprobs -1"),
        (Request([5], stops=("",)), "stop is empty"),
        (Request([5], logprobs=-1), "logprobs -1: expected 0 or more"),
        (Request([5], sampling=Sampling(-1)), "temperature -1"),
    ):
        with pytest.raises(UserError, match=words):
            engine.submit(bad)
    assert engine.idle


def test_a_row_that_overflows_ends_with_an_error_and_the_others_go_on():
    engine = engine_of(rows=3)
    bad = [
        layer._replace(att_x=layer.att_x + math.inf)
        for layer in engine.decoder.read(torch.tensor([[1]]), None)[1]
    ]
    first, second = requests(2, max_tokens=9)
    answers = [engine.submit(one) for one in (first, Request([3], start=bad), second)]
    finished(engine)
    (broken,) = answers[1]
    assert broken.finish == "error" and "overflows" in str(broken.error)
    assert [said(answers[0]), said(answers[2])] == [said(alone(first)), said(alone(second))]


@pytest.mark.parametrize("part", ["step", "read", "move"])
def test_after_a_step_that_failed_the_next_answers_are_right(part, monkeypatch):
    engine = engine_of(rows=2, chunk=8, reads_first=False, cache_bytes=1 << 20)
    first, *others = requests(4, max_tokens=9)
    for one in others:
        engine.submit(one)
    with monkeypatch.context() as planted, pytest.raises(TypeError):
        for _ in range(3):
            engine.step()
        planted.setattr(engine.decoder, part, None)
        finished(engine)
    engine.reset()
    assert engine.idle
    answers = engine.submit(first)
    finished(engine)
    assert said(answers) == said(alone(first, chunk=8))


@pytest.mark.parametrize("device, expected", [("cpu", 256), ("cuda", 1024)])
def test_the_chunk_of_prompts_depends_on_the_device_alone(device, expected):
    """A timing at the start would need a decoder that reads."""
    weight = types.SimpleNamespace(device=torch.device(device))
    model = types.SimpleNamespace(emb=types.SimpleNamespace(weight=weight))
    assert decoders.prompt_chunk(types.SimpleNamespace(model=model)) == expected


# any order of requests, on a decoder whose states are numbers

LETTERS = [0, *b"abqz\n", *"é".encode()]


def any_request(rng, kinds):
    prompt = kinds[rng.randrange(len(kinds))][: rng.choice([1, 20, 40, 55])]
    prompt = prompt + [rng.choice(LETTERS) for _ in range(rng.randrange(4))]
    return Request(
        prompt,
        max_tokens=rng.randrange(1, 30),
        sampling=rng.choice([Sampling(0), WARM, Sampling(1, 1, 5, 0.5, 0.2)]),
        seed=rng.randrange(-5, 5),
        stops=rng.choice([(), ("q",), ("\n\n", "ab", "a\nb"), ("éé", "zzz")]),
        applied=rng.choice(
            [Applied(), Applied(), Applied(("a",), 0.5), Applied(("b",)), Applied(("a", "b"))]
        ),
        start=rng.choice([None, None, STARTS[0], STARTS[1]]),
        n=rng.choice([1, 1, 1, 2, 5]),
        logprobs=rng.choice([None, 0, 2]),
        keep_state=rng.random() < 0.5,
        characters=rng.choice([math.inf, math.inf, 3, 9]),
        continues=rng.random() < 0.3,
    )


STARTS = [toy_state(3), toy_state(4)]


@pytest.mark.parametrize("kind, tokens", [("bytes", LETTERS), ("utf16", [0, *b"ab"])])
def test_any_schedule_gives_every_request_its_own_answers(kind, tokens):
    """Orders of submit, cancel and step, with all settings of the engine, against each answer by hand."""
    tokenizer, finishes, cached, kept = tokenizer_of(kind), {}, 0, 0
    for seed in range(100):
        rng = random.Random(seed)
        decoder = Toy(tokens, 256, rows=rng.choice([1, 2, 3, 8]))
        size = rng.choice([0, 5000, 10**6])
        engine = Engine(decoder, tokenizer, rng.choice([1, 7, 16, 999]), rng.random() < 0.5, size)
        prompts = [[rng.choice(LETTERS) for _ in range(64)] for _ in range(3)]
        answers, victims = [], []
        for _ in range(rng.randrange(10, 25)):
            what = rng.random()
            if what < 0.25:
                answers += engine.submit(any_request(rng, prompts))
            elif what < 0.32 and answers:
                victim = rng.choice(answers)
                if not victim.finish:
                    victims.append((victim, len(victim.tokens), victim.text))
                engine.cancel(victim)
            else:
                check_changes(engine, answers)
            assert engine.running <= decoder.rows and engine.cache.size <= size
        while not engine.idle:
            check_changes(engine, answers)
        for victim, count, text in victims:
            assert (victim.finish, len(victim.tokens), victim.text) == ("cancelled", count, text)
        for answer in answers:
            finishes[answer.finish] = finishes.get(answer.finish, 0) + 1
            cached += answer.cached_tokens > 0
            kept += check_by_hand(answer, decoder, tokenizer)
    assert min(finishes[name] for name in ("stop", "length", "cancelled", "error")) > 5, finishes
    assert cached > 20 and kept > 50, (cached, kept)


def check_changes(engine, answers):
    """A step names the answers that changed, and no others."""
    before = [(len(answer.tokens), answer.finish) for answer in answers]
    changed = engine.step()
    for answer, was in zip(answers, before, strict=True):
        now = (len(answer.tokens), answer.finish)
        assert (now == was) == (answer not in changed)
        assert now != was or answer.finish or len(answer.tokens) == was[0]


def check_by_hand(answer, decoder, tokenizer):
    """Tell whether its state was compared, too."""
    tokens, text, finish, state = decoder.by_hand(answer, tokenizer)
    if answer.finish == "cancelled":
        assert answer.tokens == tokens[: len(answer.tokens)]
        return False
    assert (answer.tokens, answer.finish) == (tokens, finish)
    assert len(answer.logprobs) == (0 if answer.request.logprobs is None else len(tokens))
    if finish == "error":
        assert "not finite" in str(answer.error) or "overflows" in str(answer.error)
        return False
    assert answer.text == text
    if not answer.request.keep_state or state is None:
        return False
    assert int(answer.state[0].att_x) == state
    return True


@pytest.mark.parametrize("phase", ["waiting", "reading", "running", "complete"])
def test_a_cancelled_answer_frees_its_row_and_disturbs_nobody(phase):
    tokenizer, decoder = tokenizer_of("bytes"), Toy(LETTERS, 256, rows=2, overflows=False)
    engine = Engine(decoder, tokenizer, chunk=4, reads_first=False)
    others = [Request([seed] * 9, 20, WARM, seed) for seed in range(1, 5)]
    if phase == "waiting":
        answers = [engine.submit(request)[0] for request in others]
        (victim,) = engine.submit(Request([7] * 9))
    else:
        (victim,) = engine.submit(Request([7] * 29, 12, WARM, n=1))
        answers = [engine.submit(request)[0] for request in others]
    engine.step()
    while (phase == "running" and len(victim.tokens) < 3) or (phase == "complete" and not victim.finish):
        engine.step()
    assert bool(victim.tokens) == (phase in ("running", "complete"))
    engine.cancel(victim)
    assert (victim.finish == "cancelled") == (phase != "complete")
    engine.cancel(victim)
    while not engine.idle:
        assert victim not in engine.step()
    assert all(check_by_hand(answer, decoder, tokenizer) is False for answer in answers)


def test_a_long_prompt_does_not_keep_a_short_one_waiting():
    engine = Engine(Toy(LETTERS, 256, rows=3), tokenizer_of("bytes"), chunk=4, reads_first=False)
    (long,) = engine.submit(Request([1] * 400))
    (short,) = engine.submit(Request([2] * 7, max_tokens=2, sampling=Sampling(0)))
    for _ in range(6):
        engine.step()
    assert short.finish and not long.tokens
    assert max(engine.decoder.read_tokens) == 4
    finished(engine)
    assert long.finish


def test_several_answers_share_the_reading_of_their_prompt():
    decoder = Toy([*b"abqz"], 256, rows=2, overflows=False)
    engine = Engine(decoder, tokenizer_of("bytes"), chunk=16)
    answers = engine.submit(Request([1] * 40, 9, WARM, n=5))
    finished(engine)
    assert decoder.read_tokens == [16, 16, 8] and len({tuple(one.tokens) for one in answers}) == 5


def test_the_next_turn_of_a_conversation_reads_only_what_is_new():
    """With `continues`; without it nothing of an answer is used."""
    tokenizer, decoder = tokenizer_of("bytes"), Toy([*b"abqz"], 256, rows=1, overflows=False)
    prompt = [*b"User: hello, what is it?"]
    for continues, expected in ((False, 16), (True, None)):
        engine = Engine(decoder, tokenizer, chunk=16, cache_bytes=10**6)
        (answer,) = engine.submit(Request(prompt, 9, WARM, stops=("zqz",), continues=continues))
        finished(engine)
        more = [*prompt, *answer.text.encode(), *b"\n\nUser: and?"]
        (later,) = engine.submit(Request(more, 5, WARM, continues=continues))
        finished(engine)
        assert later.cached_tokens == (expected or len(prompt) + len(answer.text.encode()))
        check_by_hand(later, decoder, tokenizer)
    assert len(answer.text) > 1


def test_what_changed_is_not_answered_from_the_cache():
    engine = Engine(Toy(LETTERS, 256, rows=1), tokenizer_of("bytes"), chunk=4, cache_bytes=10**6)
    for expected in (0, 20):
        (answer,) = engine.submit(Request([1] * 20, 1))
        finished(engine)
        assert answer.cached_tokens == expected
    engine.refresh()
    (answer,) = engine.submit(Request([1] * 20, 1))
    finished(engine)
    assert answer.cached_tokens == 0


@pytest.mark.parametrize("version", [6, 7])
def test_a_hit_has_the_bits_that_reading_has(version):
    arch = make_arch(version, n_embd=32)
    model = RWKV(arch).eval()
    model.load_state_dict(random_tensors(arch))
    prompt, states = [i % 67 for i in range(21)], []
    for tokens, size in (
        (prompt, 0),
        (prompt[:8], 10**6),
        (prompt[:17], 10**6),
        (prompt, 10**6),
        (prompt, 10**6),
    ):
        if len(states) < 2:
            engine = Engine(TorchDecoder(model, 1), tokenizer_of("bytes"), chunk=4, cache_bytes=size)
        (answer,) = engine.submit(Request(tokens, 3, keep_state=True))
        finished(engine)
        states.append((answer.cached_tokens, answer.tokens, answer.state))
    assert [cached for cached, *_ in states] == [0, 0, 4, 16, 21]
    for _, tokens, state in states[3:]:
        assert tokens == states[0][1]
        for got, want in zip(state, states[0][2], strict=True):
            assert all(map(torch.equal, got, want))


def test_the_bound_of_the_cache_holds_and_the_one_used_last_stays():
    cache, kind = PrefixCache(100), StateKind(Applied(), None)
    for number in range(5):
        cache.add(kind, [number], toy_state(number), torch.zeros(1, 2))  # 3 * 8 + 8 bytes
        assert cache.longest(kind, [0], [1])[0] == 1
        assert cache.size == 32 * len(cache.entries) <= 100
    assert [cache.longest(kind, [number], [1])[0] for number in range(5)] == [1, 0, 0, 1, 1]
    cache.add(kind, [7], toy_state(7), torch.zeros(1, 99))
    assert cache.size == 96, "what has no room is not kept, and drops nothing"
    for other in (
        StateKind(Applied(("a",)), None),
        StateKind(Applied(), STARTS[0]),
        StateKind(Applied(), None, True),
    ):
        assert cache.longest(other, [4], [1]) == (0, None)
    assert cache.longest(kind, [4, 9], [1, 2]) == (0, None), "the last token of a whole prompt is read alone"
    cache.add(kind, [4], toy_state(1), None)
    assert cache.longest(kind, [4, 9], [1, 2])[0] == cache.longest(kind, [4], [1])[0] == 1


@pytest.mark.parametrize("version", [6, 7])
def test_bits_of_a_row_are_those_of_the_request_alone_on_a_cpu(version):
    """With the CPU's own decoder: the final state, to the last bit, among others and alone."""
    arch = make_arch(version, n_embd=48, vocab_size=256)
    model = RWKV(arch, "cpu").eval()
    model.load_state_dict(random_tensors(arch))
    if why := problem(model):
        pytest.skip(f"THE CPU'S DECODER DOES NOT RUN HERE: {why}")
    asked = requests(7, keep_state=True, stops=())
    want = [next(Engine(Decoder(model), tokenizer_of("bytes"), 8).run([request]))[0] for request in asked]
    engine = Engine(Decoder(model, 4), tokenizer_of("bytes"), 8, reads_first=False, cache_bytes=10**6)
    for answers in engine.run(asked):
        (answer,), (alone,) = answers, [one for one in want if one.request is answers[0].request]
        assert answer.tokens == alone.tokens
        for got, state in zip(answer.state, alone.state, strict=True):
            assert all(map(torch.equal, got, state))


@pytest.mark.parametrize("version", [6, 7])
@pytest.mark.parametrize("kernel", ["torch", "cpu"])
def test_a_prompt_in_chunks_is_the_prompt(version, kernel):
    """Tokens and state, against the model's forward in float64 on prompt and answer at once."""
    arch = make_arch(version, n_embd=48, vocab_size=256)
    model, exact = RWKV(arch, kernel).eval(), RWKV(arch).double().eval()
    for one in (model, exact):
        one.load_state_dict(random_tensors(arch))
    decoder = fastest(model)[0]
    request = Request([*range(1, 24)], 6, keep_state=True)
    for chunk in (1, 5, 23, 99):
        (answer,) = next(Engine(decoder, tokenizer_of("bytes"), chunk).run([request]))
        with torch.no_grad():
            logits, state = exact(torch.tensor([[*request.tokens, *answer.tokens]]))
        assert logits[0, 22:-1].argmax(-1).tolist() == answer.tokens
        for got, want in zip(answer.state, state, strict=True):
            for name in got._fields:
                close(f"{name}, chunks of {chunk}", getattr(got, name), getattr(want, name), 2e-5)
