"""The loss of GRPO against its formula, written out for one token after the other in float64."""

import json
import math
import statistics

import pytest
import torch

from src.common.batch import Batch
from src.config import parse
from src.losses import loss_of
from src.losses._drawn import SUMS
from src.losses.grpo import CAP, Grpo, advantages, dead
from src.planning.defaults import choose_loss
from src.planning.draft import Draft

from .conftest import ROOT


def grpo(**options):
    given = {"clip_low": 0.2, "clip_high": 0.3, "beta": 0.0, "max_tokens": 17}
    return Grpo(Grpo.Options(**given | {"rewards": {"exact": 1, "own": 1}} | options))


LOSS = grpo()
KINDS = {
    f"{kind}{' with KL' if beta else ''}": grpo(grpo_type=kind, beta=beta)
    for kind in ("dapo", "grpo", "dr_grpo")
    for beta in (0.0, 0.04)
}


def make_batch(counts, seed=0, dtype=torch.float32, spread=0.3):
    """(log_probs, batch): answers of `counts` tokens, which stand among each other."""
    random = torch.Generator().manual_seed(seed)
    answer = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    answer = answer[torch.randperm(len(answer), generator=random)]
    log_probs = -3 * torch.rand(len(answer), generator=random)

    def near(values, spread):
        return (values + spread * torch.randn(len(answer), generator=random)).to(dtype)

    batch = Batch(
        answer=answer,
        advantage=torch.randn(len(counts), generator=random).to(dtype),
        old=near(log_probs, spread),
        reference=near(log_probs, 0.5),
    )
    batch.drawn = near(batch.old, 0.6)
    return log_probs.to(dtype).requires_grad_(), batch


def by_the_formula(loss, log_probs, batch):
    """(the summed loss, sums) with the numbers of one token after the other, and ratios of probabilities."""
    total, count = torch.zeros((), dtype=torch.float64), len(log_probs)
    sums = dict.fromkeys(("clipped", "gap", "kl"), 0.0) | {
        "gap_max": 0.0,
        "tokens": count,
        "kl_tokens": count,
    }
    sizes = batch.answer.tolist()
    for i, answer in enumerate(batch.answer.tolist()):
        p = log_probs[i].double().exp()
        old = p.item() if batch.old is None else math.exp(batch.old[i])
        drawn, reference = math.exp(batch.drawn[i]), math.exp(batch.reference[i])
        advantage, ratio = batch.advantage[answer].item(), p / old
        gain = ratio * advantage
        if advantage > 0 and ratio > 1 + loss.options.clip_high:
            gain, sums["clipped"] = (1 + loss.options.clip_high) * advantage, sums["clipped"] + 1
        if advantage < 0 and ratio < 1 - loss.options.clip_low:
            gain, sums["clipped"] = (1 - loss.options.clip_low) * advantage, sums["clipped"] + 1
        kl = ratio * (reference / p - (reference / p).log() - 1)
        token = -min(old / drawn, 2.0) * gain + loss.options.beta * kl
        total = total + (token / sizes.count(answer) if loss.options.grpo_type == "grpo" else token)
        gap = abs(math.log(old) - math.log(drawn))
        sums["gap"], sums["gap_max"] = sums["gap"] + gap, max(sums["gap_max"], gap)
        sums["kl"] += kl.item()
    return total, sums


def gradient(of, log_probs):
    return torch.autograd.grad(of, log_probs)[0]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("counts", [[1], [3, 1, 13, 5, 7], [17, 2, 9, 1, 1, 11, 4, 8]])
@pytest.mark.parametrize("first", [True, False])
def test_losses_gradients_and_sums_are_those_of_the_formula(name, counts, first):
    log_probs, batch = make_batch(counts, seed=len(counts))
    batch = batch.having(old=None) if first else batch
    loss, sums = KINDS[name].from_log_probs(log_probs, batch)
    wanted, of = by_the_formula(KINDS[name], log_probs, batch)
    assert loss.dtype == sums.dtype == torch.float64 and not sums.requires_grad
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-9, abs=1e-12)
    got, want = gradient(loss, log_probs), gradient(wanted, log_probs)
    assert (got - want).norm() <= 1e-6 * want.norm() and want.norm() > 0
    found = dict(zip(LOSS.sum_names, sums.tolist(), strict=True))
    assert {key: found[key] for key in of} == pytest.approx(of, abs=1e-9)


def test_both_ends_of_the_clip_and_of_the_weights_are_tried_above():
    _, batch = make_batch([17, 2, 9, 1, 1, 11, 4, 8], seed=8)
    log_probs, _ = make_batch([17, 2, 9, 1, 1, 11, 4, 8], seed=8)
    ratio, advantage = (log_probs.detach() - batch.old).exp(), batch.advantage[batch.answer]
    weight = (batch.old - batch.drawn).exp()
    for some in (
        (ratio > 1.3) & (advantage > 0),
        (ratio > 1.3) & (advantage < 0),
        (ratio < 0.8) & (advantage > 0),
        (ratio < 0.8) & (advantage < 0),
        (ratio > 1.2) & (ratio < 1.3) & (advantage > 0),
        weight > CAP,
        weight < 1,
    ):
        assert some.any()


@pytest.mark.parametrize("name", KINDS)
def test_the_gradient_is_that_of_the_loss(name):
    log_probs, batch = make_batch([3, 1, 5], seed=2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: KINDS[name].from_log_probs(x, batch)[0], log_probs)


@pytest.mark.parametrize("name", KINDS)
def test_a_step_in_parts_is_the_step(name):
    """The divisor is that of the whole step, so that it does not matter how answers are shared out."""
    loss = KINDS[name]
    log_probs, batch = make_batch([3, 1, 13, 5, 7, 2], seed=3)
    whole, sums = loss.from_log_probs(log_probs, batch)
    total, joined = 0.0, loss.sums()
    for of in ([0, 4], [3], [], [1, 2, 5]):
        taken = torch.isin(batch.answer, torch.tensor(of, dtype=torch.int64))
        part = Batch(old=batch.old[taken], reference=batch.reference[taken], drawn=batch.drawn[taken])
        part.answer = torch.tensor([of.index(i) for i in batch.answer[taken].tolist()], dtype=torch.int64)
        part.advantage = batch.advantage[of]
        each, of_part = loss.from_log_probs(log_probs[taken], part)
        total, joined = total + each, loss.joined(joined, of_part)
    assert total.item() == pytest.approx(whole.item(), rel=1e-12)
    assert torch.equal(gradient(total, log_probs), gradient(whole, log_probs))
    assert joined.tolist() == pytest.approx(sums.tolist(), rel=1e-12)


def test_divisors():
    assert [grpo(grpo_type=kind).divisor(6, 31) for kind in ("dapo", "grpo", "dr_grpo")] == [
        31,
        6,
        6 * 17,
    ]
    assert grpo(grpo_type="grpo").divisor(0, 0) == 1, "a step of failed groups"


@pytest.mark.parametrize("name", KINDS)
def test_answers_without_an_advantage_change_nothing_without_a_kl(name):
    """Dead groups may be left out of the forward: their gradient is 0. With a KL they have one."""
    loss = KINDS[name]
    log_probs, batch = make_batch([3, 1, 13, 5], seed=4)
    batch.advantage[[1, 3]] = 0
    got = gradient(loss.from_log_probs(log_probs, batch)[0], log_probs)
    theirs = (batch.answer == 1) | (batch.answer == 3)
    assert bool(got[theirs].any()) == bool(loss.options.beta) and got[~theirs].any()


@pytest.mark.parametrize("name", KINDS)
def test_an_empty_batch_has_a_loss_of_0_with_a_graph(name):
    weights = torch.ones(3, requires_grad=True)
    empty = torch.zeros(0)
    batch = Batch(answer=empty.long(), advantage=empty, drawn=empty)
    for old, reference in ((empty, empty), (None, None)):
        loss, sums = KINDS[name].from_log_probs(weights[:0] * 2, batch.having(old=old, reference=reference))
        assert loss.item() == 0 and not sums.any() and gradient(loss, weights).tolist() == [0, 0, 0]


def over_all_tokens(loss, logits, drawn, reference, advantage):
    """The mean loss of an answer of one token that is drawn with the probabilities `drawn` (V,), exactly."""
    new, total = logits.log_softmax(0), 0.0
    for token, chance in enumerate(drawn):
        one = slice(token, token + 1)
        batch = Batch(answer=torch.tensor([0]), advantage=advantage[one], old=None)
        batch = batch.having(drawn=drawn[one].log(), reference=reference[one].log())
        total = total + chance * loss.from_log_probs(new[one], batch)[0]
    return total


def some_distributions():
    """(logits, what the reference has, what the engine has, advantages) of five tokens, in float64."""
    random = torch.Generator().manual_seed(6)
    logits, reference, apart, advantage = torch.randn(4, 5, generator=random, dtype=torch.float64)
    drawn = (logits + 0.2 * apart).softmax(0)
    assert 0.02 < (logits.softmax(0) / drawn - 1).abs().max() < CAP - 1, "no weight is cut"
    return logits.requires_grad_(), reference.softmax(0), drawn, advantage


def test_the_kl_has_the_gradient_of_the_kl_to_the_reference():
    logits, reference, _, advantage = some_distributions()
    p = logits.softmax(0)
    found = over_all_tokens(grpo(beta=1.0), logits, p.detach(), reference, torch.zeros_like(advantage))
    kl = (p * (p / reference).log()).sum()
    assert found.item() == pytest.approx(kl.item(), rel=1e-12)
    got, wanted = (torch.autograd.grad(of, logits, retain_graph=True)[0] for of in (found, kl))
    assert (got - wanted).norm() <= 1e-12 * wanted.norm()


def test_weights_make_up_for_an_engine_that_draws_with_other_probabilities():
    """The gradient is that of the reward of answers by the training's model; without them it is not."""
    logits, reference, drawn, advantage = some_distributions()
    reward = -(logits.softmax(0) * advantage).sum()
    got = gradient(over_all_tokens(LOSS, logits, drawn, reference, advantage), logits)
    wanted = gradient(reward, logits)
    assert (got - wanted).norm() <= 1e-12 * wanted.norm()
    unweighted = (drawn * advantage * logits.log_softmax(0)).sum()
    assert (gradient(-unweighted, logits) - wanted).norm() > 0.02 * wanted.norm()


def test_a_kl_without_its_reference_is_told():
    log_probs, batch = make_batch([2])
    with pytest.raises(ValueError, match="has no `reference`"):
        KINDS["grpo with KL"].from_log_probs(log_probs, batch.having(reference=None))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("apart", [-1000.0, -80.0, 80.0, 1000.0])
@pytest.mark.parametrize("of", ["old", "drawn", "reference"])
def test_nothing_is_infinite_or_no_number_however_far_apart_the_models_are(name, apart, of):
    """A ratio above e^20 counts as e^20, value and gradient, and a weight as 2. The gradient of a token that
    became so much likelier and is bad is huge, for --grad_clip, and never 0: it is still pushed down.
    """
    log_probs, batch = make_batch([3, 2, 4], seed=5)
    batch.advantage = torch.tensor([1.5, -1.5, 0.0])
    log_probs = (log_probs.detach() - 90).requires_grad_()
    for key in ("old", "drawn", "reference"):
        setattr(batch, key, log_probs.detach() + (apart if key == of else 0))
    if of == "old":
        batch.drawn = batch.old
    loss, sums = KINDS[name].from_log_probs(log_probs, batch)
    got = gradient(loss, log_probs)
    assert loss.isfinite() and sums.isfinite().all() and got.isfinite().all() and got.norm().isfinite()
    bad = got[batch.answer == 1]
    if of == "old" and apart < 0:
        assert (bad > 1e7).all(), "-e^20"
    if of == "drawn" and apart < 0:
        weighed = KINDS[name].from_log_probs(log_probs, batch.having(drawn=log_probs.detach() - 1))[0]
        assert loss.item() == pytest.approx(weighed.item(), rel=1e-9)


# advantages


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("groups, size", [(1, 2), (5, 3), (7, 8)])
def test_an_advantage_is_what_an_answer_has_more_than_its_group(scale, groups, size):
    rewards = torch.randn(groups, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    found = advantages(rewards, scale)
    for group, of in zip(rewards.tolist(), found.tolist(), strict=True):
        by = statistics.stdev(group) + 1e-4 if scale else 1
        assert of == pytest.approx([(reward - statistics.fmean(group)) / by for reward in group], rel=1e-12)


def test_equal_rewards_have_no_advantage_at_all():
    """The mean of equal numbers may be off by its rounding, and so may sums of weighted rewards."""
    rewards = torch.full((3, 7), 0.1, dtype=torch.float64)
    rewards[1, 2] = 0.2
    rewards[2, 1::2] += 1e-16
    assert rewards[2].unique().numel() == 2
    assert (rewards[0] - rewards[0].mean()).any()
    assert dead(rewards).tolist() == [True, False, True]
    for scale in (True, False):
        found = advantages(rewards, scale)
        assert not found[[0, 2]].any() and found[1].all() and found[1].sum().abs() < 1e-12


# metrics


def test_metrics_are_means_of_what_was_summed():
    loss = LOSS
    sums = loss.sums(
        gap_max=0.5, answers=16, groups=2, dead_groups=1, failed_groups=3, reward=12, reward_exact=4,
        reward_own=32, spread=0.5, length=64, cut=4, entropy=16, draws=2, draw_seconds=3, drawn_tokens=90,
        tokens=32, clipped=8, gap=4, kl=16, kl_tokens=32,
    )  # fmt: skip
    assert sums.shape == (len(SUMS) + 2,)
    wanted = dict(
        reward=0.75, reward_exact=0.25, reward_own=2, reward_std=0.25, dead_groups=0.5, failed_groups=3
    )
    wanted |= dict(length=4, cut=0.25, entropy=0.25, clip=0.25, engine_gap=0.125, engine_gap_max=0.5, kl=0.5)
    assert loss.means(sums.tolist()) == wanted | dict(draw_seconds=1.5, draw_tokens_per_second=60)
    joined = loss.joined(sums, loss.sums(gap_max=0.25, cut=3, reward_own=1))
    assert torch.equal(joined - sums, loss.sums(cut=3, reward_own=1))
    assert (
        loss.means(loss.joined(loss.sums(), loss.sums(gap_max=0.75, tokens=1)).tolist())["engine_gap_max"]
        == 0.75
    )


def test_means_of_nothing_are_no_numbers_and_what_was_not_done_is_not_there():
    found = LOSS.means(LOSS.sums().tolist())
    assert found.pop("failed_groups") == 0 and all(map(math.isnan, found.values()))
    assert not found.keys() & {"kl", "draw_seconds", "draw_tokens_per_second"}
    with pytest.raises(KeyError, match="rewards"):
        LOSS.sums(rewards=1)


def test_the_loss_has_all_its_settings():
    flags = (
        "--load_model b.pth --data_file d.jsonl --loss grpo --grpo_type dr_grpo --clip_low 0.1 --beta 0.04"
    )
    draft = Draft(parse([*flags.split(), "--rewards", "number=1,partial=0.5", "--max_tokens", "33"]))
    choose_loss(draft)
    loss = loss_of(draft.config)
    options, names = loss.options, ("grpo_type", "clip_low", "clip_high", "beta", "max_tokens")
    assert [getattr(options, name) for name in names] == ["dr_grpo", 0.1, 0.1, 0.04, 33]
    assert loss.reward_names == ("number", "partial")


# Losses and advantages of TRL 1.16.0 on random numbers; docs/worklog.md names the commit that wrote them.
TRL = json.loads((ROOT / "tests/fixtures/grpo_losses.json").read_text(encoding="utf-8"))
OF_TRL = [
    pytest.param(case, name, id=f"{name}, {len(case['old'])} answers")
    for case in TRL["cases"]
    for name in case["losses"]
]


def flat(answers, dtype=torch.float32):
    return torch.tensor([number for answer in answers for number in answer], dtype=dtype)


@pytest.mark.parametrize("case, name", OF_TRL)
def test_losses_and_gradients_are_those_of_trl(case, name):
    """To 1e-6, in as many micro-batches as there, which begin with whole answers."""
    settings, wanted, gradients = case["losses"][name].values()
    loss = grpo(grpo_type=settings["kind"], beta=settings["beta"], **TRL["settings"])
    counts = [len(answer) for answer in case["old"]]
    each, total, found = len(counts) // case["micro_batches"], 0.0, []
    for begin in range(0, len(counts), each):
        part = slice(begin, begin + each)
        batch = Batch(**{key: flat(case[key][part]) for key in ("old", "drawn", "reference")})
        batch = batch.having(answer=torch.repeat_interleave(torch.tensor(counts[part])))
        batch = batch.having(advantage=torch.tensor(case["advantage"][part]))
        if not settings["corrected"]:
            batch.drawn = batch.old
        log_probs = flat(case["log_probs"][part]).requires_grad_()
        mean = loss.from_log_probs(log_probs, batch)[0] / loss.divisor(len(counts), sum(counts))
        found.append(gradient(mean, log_probs))
        total += mean.item()
    want = flat(gradients, torch.float64)
    assert total == pytest.approx(wanted, rel=1e-6)
    assert (torch.cat(found) - want).norm() <= 1e-6 * want.norm()


def test_what_was_asked_of_trl_has_every_clip():
    asked = {name for case in TRL["cases"] for name in case["losses"]}
    assert {*(f"{kind}, KL, corrected" for kind in ("grpo", "bnpo", "dr_grpo", "dapo"))} < asked
    assert {case["micro_batches"] for case in TRL["cases"]} == {1, 3}
    clips = set()
    for case in TRL["cases"]:
        new, old, drawn = (flat(case[key]) for key in ("log_probs", "old", "drawn"))
        counts = torch.tensor([len(answer) for answer in case["old"]])
        good = torch.repeat_interleave(torch.tensor(case["advantage"]) > 0, counts)
        for name, of in (("high", new - old > math.log(1.3)), ("low", new - old < math.log(0.8))):
            clips |= {(name, bool(is_good)) for is_good in good[of]}
        clips |= {"cap"} if (old - drawn > math.log(CAP)).any() else set()
    assert clips == {("high", True), ("high", False), ("low", True), ("low", False), "cap"}


@pytest.mark.parametrize("case", TRL["advantages"], ids=lambda of: f"{of['scale']} of {of['group_size']}")
def test_advantages_are_those_of_trl(case):
    totals = torch.tensor(case["rewards"], dtype=torch.float64) @ torch.tensor(
        case["weights"], dtype=torch.float64
    )
    found = advantages(totals.view(-1, case["group_size"]), case["scale"] == "group")
    assert found.flatten().tolist() == pytest.approx(case["advantages"], rel=1e-6), "fp32 in TRL"
    assert not found[0].any() and found[1].any(), "a group of equal rewards, and others"
