"""The engine: an answer is the same whoever else is answered, and ends as it should."""

import functools
import math
import random

import pytest
import torch

from rwkv_miss import UserError
from src.data.tokenizer import load_tokenizer
from src.inference import decoders
from src.inference.engine import Engine, Request
from src.inference.sampling import Sampling
from src.inference.torch_decoder import TorchDecoder
from src.model import RWKV

from .conftest import make_arch, random_tensors

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
        given = {"max_tokens": rng.randrange(1, 25), "sampling": sampling, "seed": i, "stops": ("q", "zz")}
        made.append(Request(tokens, **{**given, **changes}))
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


def test_run_gives_each_request_its_answers_and_keeps_the_rows_busy():
    asked = requests(7, n=2)
    engine = engine_of(rows=3)
    got = {id(answers[0].request): said(answers) for answers in engine.run(iter(asked))}
    assert [got[id(request)] for request in asked] == [said(alone(request)) for request in asked]
    assert len({tuple(one[0]) for both in got.values() for one in both}) > 7


def test_senseless_requests_are_refused_before_anything_runs():
    engine = engine_of()
    for bad, words in (
        (Request([]), "no token"),
        (Request([5, 256]), "256 is not in the vocabulary"),
        (Request([5], n=0), "n 0"),
        (Request([5], max_tokens=0), "max_tokens 0"),
        (Request([5], stops=("",)), "stop is empty"),
        (Request([5], sampling=Sampling(-1)), "temperature -1"),
    ):
        with pytest.raises(UserError, match=words):
            engine.submit(bad)
    assert engine.idle


@pytest.mark.parametrize("phase", ["waiting", "reading", "running", "complete"])
def test_a_cancelled_answer_frees_its_row_and_disturbs_nobody(phase):
    asked = requests(5, max_tokens=20)
    engine = engine_of(rows=2, chunk=4, reads_first=False)
    if phase == "waiting":
        others = [engine.submit(request) for request in asked[:4]]
        (victim,) = engine.submit(asked[4])
    else:
        (victim,) = engine.submit(Request(list(range(1, 30)), max_tokens=8))
        others = [engine.submit(request) for request in asked[:4]]
    for _ in range({"waiting": 3, "reading": 2, "running": 10, "complete": 40}[phase]):
        engine.step()
    engine.cancel(victim)
    assert victim.finish == ("length" if phase == "complete" else "cancelled")
    engine.cancel(victim)
    while not engine.idle:
        assert victim not in engine.step()
    for request, answers in zip(asked, others):
        assert said(answers) == said(alone(request))


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


class Clocked:
    """A decoder that reads a token in 2 ms of a clock of its own."""

    def __init__(self, monkeypatch):
        self.model, self.now = tiny(7), 0.0
        monkeypatch.setattr(decoders.time, "perf_counter", lambda: self.now)

    def read(self, ids, state):
        self.now += 0.002 * ids.shape[1]
        return torch.zeros(1, 1), None


@pytest.mark.parametrize("seconds, expected", [(0.06, 16), (0.0641, 32), (0.3, 128), (1e-9, 16), (99, 4096)])
def test_a_chunk_is_the_largest_that_is_read_in_time(seconds, expected, monkeypatch):
    assert decoders.measured_chunk(Clocked(monkeypatch), seconds) == expected
