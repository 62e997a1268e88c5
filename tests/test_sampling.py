"""Choosing tokens: the native code and NumPy, against exact probabilities in float64."""

import dataclasses
import math
import random
import types

import numpy as np
import pytest
import torch

from rwkv_miss.errors import UserError
from src.inference import sampling as module
from src.inference.logit_changes import ChangedLogits, LogitChanges
from src.inference.sampling import (
    GREEDY,
    FadedCounts,
    RowInputs,
    Sampling,
    choose,
    choose_native,
    choose_numpy,
    runs_native,
)
from src.ops import self_test

FOUND = self_test.status("cpu")
NATIVE = pytest.mark.skipif(bool(FOUND.reason), reason="the CPU's library does not run here")
BY = [pytest.param(choose_native, id="native", marks=NATIVE), pytest.param(choose_numpy, id="numpy")]
by = pytest.mark.parametrize("by", BY)


def seen_tokens(sampling, tokens):
    seen = FadedCounts(sampling)
    for token in tokens:
        seen.add(token)
    return seen


def exact(logits, row, top_p):
    """Token -> probability, by sorting everything in float64."""
    sampling, x = row.sampling, logits.double()
    if sampling.penalises:
        for token, count in zip(row.seen.ids, row.seen.counts):
            x[token] -= np.float32(sampling.presence_penalty + sampling.frequency_penalty * count)
    x, order = x.sort(descending=True, stable=True)
    k = min(sampling.top_k or len(x), len(x))
    p = x[:k].softmax(0)
    kept = max(1, int((p.cumsum(0) - p < top_p).sum()))
    shares = (x[:kept] / sampling.temperature).softmax(0)
    return dict(zip(order[:kept].tolist(), shares.tolist()))


def random_row(choice, vocabulary):
    sampling = Sampling(
        choice([0.5, 1, 1.3, 50]),
        choice([0.1, 0.5, 0.9, 0.999, 1]),
        choice([0, 0, 0, 1, 5, 32, 700, 10**6]),
        choice([0, 0.5]),
        choice([0, 0.2]),
        0.99,
    )
    tokens = [choice(range(vocabulary)) for _ in range(choice([0, 10, 100]))]
    return RowInputs(sampling, seen_tokens(sampling, tokens), logprobs=choice([None, 0, 1, 20]))


def random_logits(choice, rows, vocabulary, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = choice([0, 0.01, 1, 3, 6]) * torch.randn(rows, vocabulary + choice([0, 5]), generator=generator)
    # rounded ones have many equals
    return (logits.round() if choice([0, 0, 1]) else logits)[:, :vocabulary]


@by
def test_a_token_is_the_one_whose_share_holds_the_number_that_was_drawn(by):
    """In the order of the ids; 1e-6 is for the rounding of fp32."""
    choice, drawn = random.Random(0).choice, 0
    for seed in range(60):
        vocabulary = choice([1, 2, 17, 64, 300, 1025, 5003, 65531 if seed < 20 else 40])
        logits = random_logits(choice, 3, vocabulary, seed)
        rows = [random_row(choice, vocabulary) for _ in logits]
        uniform = np.random.default_rng(seed).random(3).tolist()
        for x, row, number, got in zip(logits, rows, uniform, by(logits, rows, uniform, 2)):
            shares, more = (exact(x, row, row.sampling.top_p + 1e-6 * sign) for sign in (-1, 1))
            if shares.keys() != more.keys():
                continue  # rounding decides who is the last
            low = sum(shares[token] for token in shares if token < got.token)
            assert low - 1e-6 <= number <= low + shares[got.token] + 1e-6, (row.sampling, vocabulary)
            drawn += 1
    assert drawn > 140


@by
def test_logprobs_are_of_the_raw_distribution(by):
    choice = random.Random(1).choice
    for seed in range(30):
        vocabulary = choice([1, 5, 63, 300, 4099])
        logits = random_logits(choice, 3, vocabulary, seed)
        rows = [random_row(choice, vocabulary) for _ in logits]
        for x, row, got in zip(logits, rows, by(logits, rows, [0.4] * 3, 1)):
            if row.logprobs is None:
                assert got.logprob is None and got.likeliest == []
                continue
            want = x.double().log_softmax(0)
            assert got.logprob == pytest.approx(want[got.token].item(), abs=1e-6)
            order = want.sort(descending=True, stable=True)[1][: row.logprobs].tolist()
            assert [token for token, _ in got.likeliest] == order
            assert [p for _, p in got.likeliest] == pytest.approx(want[order].tolist(), abs=1e-6)


@by
def test_tokens_come_as_often_as_they_are_likely(by):
    """Pearson's chi-square of 5,000 draws, below the value that chance exceeds once in 10,000; by Wilson and
    Hilferty's approximation (1931): k (1 - 2 / 9k + z sqrt(2 / 9k))^3, z = 3.719 for k degrees of freedom.
    """
    logits = 1.5 * torch.randn(400, generator=torch.Generator().manual_seed(0))
    for sampling in (Sampling(1, 1), Sampling(1.5, 0.8), Sampling(0.9, 0.9), Sampling(1.3, 0.95, 20)):
        row = RowInputs(sampling)
        numbers = torch.rand(5000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        batch = logits.expand(500, -1)
        tokens = [
            drawn.token for part in numbers.split(500) for drawn in by(batch, [row] * 500, part.tolist(), 1)
        ]
        counts = np.bincount(tokens, minlength=400)
        shares = exact(logits, row, sampling.top_p)
        assert set(np.flatnonzero(counts)) <= shares.keys()
        expected = np.array([5000 * shares.get(token, 0) for token in range(400)])
        # tokens that are expected less than five times count together
        often = expected >= 5
        counts, expected = (np.append(x[often], x[~often].sum()) for x in (counts, expected))
        some = expected > 0
        chi_square = ((counts - expected)[some] ** 2 / expected[some]).sum()
        k = some.sum() - 1
        assert k > 5 and chi_square < k * (1 - 2 / (9 * k) + 3.719 * math.sqrt(2 / (9 * k))) ** 3, sampling


def changed_exactly(logits, row, changes, prompt, answer, allowed):
    """The logits in float64 from which a row's token is drawn, change by change."""
    x = logits.double()
    for token, bias in changes.bias.items():
        x[token] += bias
    if changes.ignore_eos or len(answer) < changes.min_tokens:
        x[0] = -math.inf
    for token in {*prompt, *answer}:
        x[token] = (
            x[token] / changes.repetition_penalty if x[token] > 0 else x[token] * changes.repetition_penalty
        )
    for token, count in zip(row.seen.ids, row.seen.counts):
        x[token] -= np.float32(row.sampling.presence_penalty + row.sampling.frequency_penalty * count)
    if allowed is not None:
        x[~torch.from_numpy(allowed)] = -math.inf
    # 1e-6 is for the rounding of fp32
    low, high = (
        torch.where(x < x.max() + math.log(changes.min_p or 1e-300) + sign, -math.inf, x)
        for sign in (-1e-6, 1e-6)
    )
    return low if torch.equal(low, high) else None


@pytest.mark.parametrize("native_code", [pytest.param(True, marks=NATIVE), False])
def test_changed_logits_are_those_of_the_definitions(native_code):
    """Bias, a held end, repetition_penalty, min_p: alone and together, also with penalties and a form."""
    choice, drawn, changed = random.Random(2).choice, 0, 0
    for seed in range(120):
        vocabulary = choice([2, 17, 64, 300, 1025])
        logits = random_logits(choice, 1, vocabulary, seed)
        prompt, answer = ([choice(range(vocabulary)) for _ in range(choice([1, 9, 70]))] for _ in range(2))
        changes = LogitChanges(
            {choice(range(vocabulary)): choice([-100, -1.5, 2, 100]) for _ in range(choice([0, 1, 4]))},
            choice([0, 0, 9, 10]),
            choice([False, False, True]),
            choice([1, 0.7, 1.3, 2]),
            choice([0, 0.05, 0.5, 1]),
        )
        allowed = choice([None, np.random.default_rng(seed).random(vocabulary) < 0.7])
        if allowed is not None:
            allowed[-1] = True
        plain = random_row(choice, vocabulary)
        row = RowInputs(
            plain.sampling,
            seen_tokens(plain.sampling, answer),
            torch.Generator().manual_seed(seed),
            choice([None, 2]),
            types.SimpleNamespace(mask=lambda allowed=allowed: allowed) if allowed is not None else None,
            ChangedLogits(changes, prompt, answer, vocabulary, (0,)),
        )
        x = changed_exactly(logits[0], row, changes, prompt, answer, allowed)
        before = logits.clone()
        got, other = choose(torch.cat([logits, logits]), [row, RowInputs(GREEDY)], native_code)
        assert torch.equal(logits, before) and other.token == logits.argmax(), "others are as they were"
        number = torch.rand((), dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).item()
        if x is None:
            continue  # rounding decides who is the last
        bare = RowInputs(dataclasses.replace(row.sampling, presence_penalty=0.0, frequency_penalty=0.0))
        shares, more = (exact(x, bare, row.sampling.top_p + 1e-6 * sign) for sign in (-1, 1))
        if shares.keys() != more.keys():
            continue
        low = sum(shares[token] for token in shares if token < got.token)
        assert low - 1e-5 <= number <= low + shares[got.token] + 1e-5, (row.sampling, changes)
        drawn, changed = drawn + 1, changed + (got.token != logits.argmax())
        if row.logprobs:
            want = logits[0].double().log_softmax(0)
            assert got.logprob == pytest.approx(want[got.token].item(), abs=1e-6)
    assert drawn > 80 and changed > 20


@by
def test_of_equal_logits_the_first_are_taken(by):
    logits = torch.zeros(1, 200)
    logits[0, 3::2] = -0.0
    assert by(logits, [RowInputs(GREEDY)], [0.0], 1)[0].token == 0
    for sampling, kept in (
        (Sampling(1, 1, 5), 5),
        (Sampling(1, 0.5), 100),
        (Sampling(2, 1), 200),
        (Sampling(1, 0.75, 200), 150),
    ):
        tokens = {by(logits, [RowInputs(sampling)], [i / 997], 1)[0].token for i in range(997)}
        assert tokens == set(range(kept)), sampling


@by
def test_a_row_that_overflows_disturbs_no_other(by):
    logits = torch.randn(6, 131, generator=torch.Generator().manual_seed(0))
    logits[0, 130] = torch.nan
    logits[2, 7] = torch.inf
    logits[3] = -torch.inf
    logits[4, :100] = -torch.inf
    for sampling in (GREEDY, Sampling(), Sampling(1e-3, 1), Sampling(1e300, 1), Sampling(1, 1, 131)):
        rows = [RowInputs(sampling, logprobs=2)] * 6
        found = by(logits, rows, [0.3] * 6, 1)
        for i, seen in ((0, "nan"), (2, "inf"), (3, "-inf")):
            assert found[i].token is None
            with pytest.raises(ValueError, match=f"the largest logit is {seen}, .*overflows"):
                raise found[i].error
        for i in (1, 4, 5):
            assert found[i].error is None
            assert found[i] == by(logits[i : i + 1], rows[:1], [0.3], 1)[0], "alone it is the same"
        assert found[4].token >= 100, "a token without a chance is none"


def test_a_row_whose_constraint_fails_disturbs_no_other():
    class Broken:
        def mask(self):
            raise RuntimeError("no room")

    logits = torch.randn(2, 131, generator=torch.Generator().manual_seed(0))
    broken, other = choose(logits, [RowInputs(GREEDY, constraint=Broken()), RowInputs(GREEDY)], False)
    assert broken.token is None and other.token == logits[1].argmax()
    with pytest.raises(UserError, match="which tokens fit the answer's form is unknown: RuntimeError: no ro"):
        raise broken.error


@by
def test_a_penalty_lowers_what_the_answer_holds(by):
    sampling = Sampling(0, 1, 0, presence_penalty=0.5, frequency_penalty=0.25, penalty_decay=0.5)
    logits = torch.tensor([[1.0, 1.9, 1.5]])
    for tokens, chosen in (
        ([], 1),
        ([1], 2),  # 1.9 - 0.75 < 1.5
        ([1, 0, 0], 2),  # 1.9 - 0.5625 < 1.5
        ([1, 2, 2, 2], 1),  # 1.9 - 0.53 > 1.5 - 0.94
    ):
        found = by(logits, [RowInputs(sampling, seen_tokens(sampling, tokens), logprobs=1)], [0.0], 1)[0]
        assert found.token == chosen
        assert found.likeliest[0][0] == 1, "logprobs know no penalty"
    assert logits.tolist() == torch.tensor([[1.0, 1.9, 1.5]]).tolist()


def test_counts_fade():
    sampling = Sampling(1, 1, frequency_penalty=0.3, penalty_decay=0.9)
    tokens = random.Random(0).choices(range(300), k=500)
    seen = seen_tokens(sampling, tokens)
    want = {}
    for age, token in enumerate(reversed(tokens)):
        want[token] = want.get(token, 0) + 0.9**age
    assert dict(zip(seen.ids.tolist(), seen.counts.tolist())) == pytest.approx(want)
    assert len(seen_tokens(Sampling(), tokens).ids) == 0, "nothing is counted where nothing is lowered"


@pytest.mark.parametrize("native_code", [pytest.param(True, marks=NATIVE), False])
def test_a_seed_gives_the_same_tokens_in_any_company(native_code):
    logits = torch.randn(5, 1000, generator=torch.Generator().manual_seed(0))
    samplings = [Sampling(1, 0.9), GREEDY, Sampling(0.8, 1), Sampling(1.2, 0.9, 50), Sampling(3, 0.99)]

    def tokens(rows, native_code=native_code):
        generators = {i: torch.Generator().manual_seed(i) for i in rows}
        inputs = [RowInputs(samplings[i], generator=generators[i]) for i in rows]
        return [[x.token for x in choose(logits[rows], inputs, native_code)] for _ in range(20)]

    together = tokens([0, 1, 2, 3, 4])
    for i in range(5):
        assert [[turn[i]] for turn in together] == tokens([i])
    reversed_rows = tokens([4, 3, 2, 1, 0])
    assert [turn[::-1] for turn in reversed_rows] == together
    assert tokens([0, 1, 2, 3, 4], native_code=False) == together, "NumPy draws the same"


@pytest.mark.parametrize("kernel, builds", [("torch", 0), ("reference", 0), ("cpu", 1), ("cuda", 1)])
def test_native_code_is_asked_for_with_native_kernels_only(kernel, builds, monkeypatch):
    asked = []
    monkeypatch.setattr(module.self_test, "status", lambda device: asked.append(device) or FOUND)
    assert runs_native(kernel) == bool(builds) and asked == ["cpu"] * builds
    monkeypatch.setattr(module.self_test, "status", lambda device: FOUND._replace(reason="no compiler"))
    assert not runs_native(kernel)


@pytest.mark.parametrize("shape, rows", [((3, 5), 2), ((5,), 1), ((0, 5), 0)])
def test_logits_that_do_not_fit_are_named(shape, rows):
    with pytest.raises(
        ValueError, match=rf"logits are \({shape[0]},.*expected \(B, V\) with B = {rows} rows"
    ):
        choose(torch.zeros(shape), [RowInputs(GREEDY)] * rows, native_code=False)


def test_a_decay_outside_of_0_to_1_is_refused():
    with pytest.raises(ValueError, match="penalty_decay 1.5: expected 0 to 1"):
        Sampling(penalty_decay=1.5).check()
