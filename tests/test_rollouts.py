"""Answers that the model in training draws: what is drawn, what of it is trained, and when."""

import copy
import dataclasses
import itertools
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback

from rwkv_miss import UserError
from src import ops
from src.config import Config
from src.data.batches import make_schedule
from src.data.encode import Encoder
from src.data.questions import Question, Questions
from src.data.tokenizer import load_tokenizer
from src.distributed.process_group import Processes
from src.evaluation.rewards import Failed, GroupRewards
from src.inference.engine import Engine
from src.inference.torch_decoder import TorchDecoder
from src.model.batch_loss import state_bytes
from src.planning.defaults import choose_loss
from src.planning.draft import Draft
from src.sources import source_of
from src.sources.base import TrainingData
from src.sources.drawn.feed import AllFailed, Reference, RewardFeed, Totals
from src.sources.drawn.rollouts import Rollouts
from src.sources.drawn.sizes import STATE_BYTES, STATES, rows_at_once
from src.sources.policy import policy_of
from src.training.callbacks import Saver, StepReport
from src.training.rollback import LastGood
from src.training.trainer import FineTuning, make_trainer

from .conftest import close, make_arch, read_rows
from .loss_cases import make_model

ENCODER = Encoder(load_tokenizer("bytes", 256))
QUESTIONS = ["ab:", "c", "abcd ab:", "d:", "ab:", "e", "bbb:", "cd:"]


class Judge:
    """Rewards: the mean byte of an answer, and minus its length. Questions of `alike` give all answers the
    same, those of `failing` give none.
    """

    names, digest = ("mean", "brief"), None

    def __init__(self, alike=(), failing=()):
        self.alike, self.failing = alike, failing
        self.asked = []

    def score(self, question, answers):
        self.asked.append(question)
        if question.answer in self.failing:
            return Failed("nonsense", f"no reward for {question.answer}")
        mean = [sum(answer.tokens) / len(answer.tokens) / 255 for answer in answers]
        brief = [-len(answer.tokens) / 10 for answer in answers]
        values = torch.tensor([mean, brief], dtype=torch.float64).T
        if question.answer in self.alike:
            values = values * 0 + 1
        return GroupRewards(values, values.sum(1))


def config_of(**given):
    settings = {
        "load_model": "base.pth", "data_file": "rows.jsonl", "loss": "grpo", "accelerator": "cpu",
        "strategy": "auto", "precision": "fp32", "wkv": "torch", "lr_init": 1e-2, "micro_bsz": 4,
        "ctx_len": 64, "epoch_count": 1, "accumulate_grad_batches": 1, "group_size": 3, "max_tokens": 6,
        "eval_steps": 0, "early_stop": 0, "lr_schedule": "cos",
        "rewards": {"mean": 1.0, "brief": 1.0},
    }  # fmt: skip
    draft = Draft(Config(**settings | given))
    choose_loss(draft)
    return draft.config.settled()


def questions_of(config, prompts=QUESTIONS):
    asked = [Question([prompt], str(place)) for place, prompt in enumerate(prompts)]
    ids = [np.array(question.ids(ENCODER.tokenizer), np.int32) for question in asked]
    return Questions(asked, ids, config.group_size, config.max_tokens)


def policy_model(version=7, dtype=torch.float32, **sizes):
    sizes = {"vocab_size": 256, "n_embd": 40, "head_size": 8} | sizes
    return make_model(version, dtype, **sizes)


@dataclasses.dataclass(frozen=True)
class InTurn(Processes):
    """Processes that run one after the other; `all_have` is what each of them has gathered so far."""

    all_have: dict = dataclasses.field(default_factory=dict)

    def gathered(self, mine):
        self.all_have[self.rank] = mine
        return [self.all_have.get(rank, []) for rank in range(self.world)]


def feed_of(
    config, model, judge, steps=range(1), rank=0, world=1, total=lambda tensor: tensor, all_have=None
):
    questions = questions_of(config)
    rollouts = Rollouts(model, questions, ENCODER, judge, config)
    source, processes = (
        source_of(config),
        InTurn(world, rank, total, {} if all_have is None else all_have),
    )
    policy = policy_of(model, source.chunks, processes)
    schedule = make_schedule(questions, config, world)
    return RewardFeed(rollouts, schedule, steps, source, policy, reference=Reference(source, policy))


def plus(**of_others):
    """Return the totals of all, where another process has these."""
    return lambda mine: mine + Totals(**of_others).tensor()


@pytest.mark.parametrize("version, kernel", [(6, "torch"), (7, "cpu")])
def test_answers_are_those_of_the_engine_one_by_one(version, kernel):
    """And ln p of the training is that of the draw, prompts read once or by every answer."""
    config, model = config_of(), policy_model(version)
    model.set_kernel(kernel)
    rollouts = Rollouts(model, questions_of(config), ENCODER, Judge(), config)
    groups = rollouts.groups(3, [2, 1, 4])
    for group, place in zip(groups, (2, 1, 4), strict=True):
        engine = Engine(TorchDecoder(model, 1), ENCODER.tokenizer)
        alone = engine.submit(rollouts.request(3, place))
        while not engine.idle:
            engine.step()
        assert [answer.tokens for answer in alone] == [answer.tokens for answer in group.answers]
        assert [answer.finish == "length" for answer in alone] == [answer.cut for answer in group.answers]
        for one, other in zip(alone, group.answers):
            said, drawn = ([token.logprob for token in each.logprobs] for each in (one, other))
            assert said == pytest.approx(drawn, abs=1e-5)
    lengths = {len(answer.tokens) for group in groups for answer in group.answers}
    assert len(groups[0].answers) == 3 and max(lengths) == 6
    for chunk in (0, 16):
        config = config_of(chunk_ctx=chunk)
        feed, chunks = feed_of(config, model, Judge()), source_of(config).chunks
        for batch in feed:
            found = chunks.log_probs(model, batch)
            assert len(found) > 50
            torch.testing.assert_close(found.detach(), batch.drawn, rtol=0, atol=1e-5)


def test_an_end_of_document_is_trained_and_no_answer_is_cut_that_has_it():
    config, model = config_of(max_tokens=6, group_size=8), policy_model()
    with torch.no_grad():
        model.ln_out.bias.copy_(8 * model.head.weight[0] / model.head.weight[0].square().sum())
    groups = Rollouts(model, questions_of(config), ENCODER, Judge(), config).groups(0, [0, 3])
    answers = [answer for group in groups for answer in group.answers]
    assert {answer.cut for answer in answers} == {True, False}
    for answer in answers:
        assert answer.cut == (0 not in answer.tokens) and len(answer.logprobs) == len(answer.tokens)
        assert not answer.cut or len(answer.tokens) == 6
    assert all(0 not in answer.tokens[:-1] and "\0" not in answer.text for answer in answers)


def test_a_draw_is_a_function_of_seed_number_and_place():
    config, model = config_of(), policy_model()

    def drawn(draw, places, **given):
        changed = config_of(**given)
        groups = Rollouts(model, questions_of(changed), ENCODER, Judge(), changed).groups(draw, places)
        return [[answer.tokens for answer in group.answers] for group in groups]

    both = drawn(5, [0, 4])
    assert drawn(5, [4, 7, 0])[::2] == both[::-1], "whoever else is asked"
    assert both[0] != both[1] and len({tuple(tokens) for tokens in both[0]}) == 3, "the same prompt"
    assert drawn(6, [0]) != both[:1] != drawn(5, [0], random_seed=config.random_seed + 1)


def test_rows_at_once_depend_on_sizes_alone():
    arch = make_arch(7, n_layer=32, n_embd=4096, head_size=64)
    for accelerator, most in (("cpu", 128), ("gpu", 512)):
        rows = rows_at_once(arch, 2, accelerator, 1000)
        assert 1 <= rows < most and rows * STATES * state_bytes(arch, 1, 2) <= STATE_BYTES[accelerator]
        assert rows_at_once(make_arch(7), 4, accelerator, 1000) == most
    assert rows_at_once(make_arch(7), 4, "cpu", 5) == 5


def formula(model, config, groups):
    """The loss of a step in float64, answer by answer after its own prompt, of groups (prompt, [(tokens,
    ln p when drawn)], rewards).
    """
    tokens = sum(len(answer) for _, answers, _ in groups for answer, _ in answers)
    loss = 0.0
    for prompt, answers, rewards in groups:
        rewards = np.array(rewards)
        advantages = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-4)
        for (answer, drawn), advantage in zip(answers, advantages):
            ids = torch.tensor([[*prompt, *answer]])
            table = F.log_softmax(model(ids[:, :-1])[0][0], -1)
            new = table[torch.arange(len(prompt) - 1, ids.shape[1] - 1), torch.tensor(answer)]
            weight = (new.detach() - torch.tensor(drawn, dtype=torch.float64)).exp().clamp(max=2.0)
            loss = loss - (weight * advantage * (new - new.detach()).exp()).sum() / tokens
    return loss


@pytest.mark.parametrize("chunk", [0, 16])
def test_a_steps_gradient_is_the_formulas_in_float64(chunk):
    """A step of all questions: two have equal rewards, and one has none. One of three batches stays empty."""
    config = config_of(micro_bsz=3, accumulate_grad_batches=3, chunk_ctx=chunk)
    model, judge = policy_model(), Judge(alike="25", failing="6")
    exact = copy.deepcopy(model).double()
    feed = feed_of(config, model, judge)
    for batch in feed:
        source_of(config).loss(model, batch, source_of(config).chunks)[0].div(batch.step_weight).backward()
    groups = Rollouts(model, questions_of(config), ENCODER, judge, config).groups(0, range(8))
    asked = [
        (
            group.prompt.tolist(),
            list(zip([answer.tokens for answer in group.answers], group.log_probs, strict=True)),
            group.scored.total.tolist(),
        )
        for group in groups
        if not group.failed
    ]
    assert len(asked) == 7
    formula(exact, config, asked).backward()
    gradients = [(name, p.grad) for name, p in model.named_parameters() if p.requires_grad]
    for (name, found), p in zip(gradients, (p for p in exact.parameters() if p.requires_grad), strict=True):
        close(name, found, p.grad, 2e-5)
    # the five live groups are in as few batches as hold them
    assert [len(batch.advantage) // 3 for batch in feed.batches] == [2, 3, 0]
    assert feed.batches[0].step_weight == sum(len(t) for _, answers, _ in asked for t, _ in answers)


def test_the_metrics_are_of_all_scored_answers():
    config = config_of()
    feed = feed_of(config, policy_model(), Judge(alike="25", failing="6"))
    feed.schedule = make_schedule(questions_of(config), config_of(micro_bsz=8), 1)
    batch = next(iter(feed))
    sums = dict(zip(feed.loss.sum_names, feed.step_sums.tolist(), strict=True))
    groups = Rollouts(feed.policy.model, questions_of(config), ENCODER, feed.rewards, config).groups(
        0, range(8)
    )
    answers = [answer for group in groups if not group.failed for answer in group.answers]
    totals = torch.cat([group.scored.total for group in groups if not group.failed])
    means = torch.cat([group.scored.values[:, 0] for group in groups if not group.failed])
    assert (sums["groups"], sums["dead_groups"], sums["failed_groups"], sums["answers"]) == (7, 2, 1, 21)
    assert sums["reward"] == pytest.approx(float(totals.sum()))
    assert sums["reward_mean"] == pytest.approx(float(means.sum()))
    assert sums["spread"] == pytest.approx(float(totals.view(7, 3).std(1).sum()))
    assert sums["length"] == sum(len(answer.tokens) for answer in answers)
    assert sums["cut"] == sum(answer.cut for answer in answers)
    drawn = [token.logprob for answer in answers for token in answer.logprobs]
    assert sums["entropy"] == pytest.approx(-sum(drawn))
    assert sums["drawn_tokens"] == sum(group.tokens for group in groups)
    assert sums["draws"] == 1 and sums["draw_seconds"] > 0
    assert feed.size(0).targets == len(batch.targets) and feed.size(0).weight == 8
    assert feed.first_group.question.answer == "1", "the shortest comes first"


@pytest.mark.parametrize("dead", [None, 0, 1])
def test_two_ranks_share_the_questions_out_and_then_the_live_groups(dead):
    """Each draws its own, as one process draws all, and trains on half of the live ones, wherever they were
    drawn: on one rank all, or all but one, may be dead.
    """
    config = config_of(micro_bsz=2, accumulate_grad_batches=2)
    model, all_have = policy_model(), {}
    schedule = make_schedule(questions_of(config), config, 2)
    of_rank = [schedule.rows[row] for micro in range(2) for row in schedule.micro_rows(0, micro, dead or 0)]
    alike = [str(place) for row in of_rank for place in row]
    judge = Judge(alike=[] if dead is None else alike[dead:])
    alone = feed_of(config_of(micro_bsz=8), model, judge)
    whole = next(iter(alone))
    for _ in range(2):  # the first rank knows in the second turn what the second rank has
        found, groups = [], []
        for rank in range(2):
            others = {"rank": rank, "world": 2, "total": plus(groups=3, failed=1), "all_have": all_have}
            feed = feed_of(config, model, judge, **others)
            batches = list(feed)
            found += [batch.targets.tolist() for batch in batches]
            groups.append(sum(len(batch.advantage) // 3 for batch in batches))
            assert feed.totals.groups == 4 + 3 and feed.totals.failed == 1
    assert groups == {None: [4, 4], 0: [2, 2], 1: [3, 2]}[dead]
    assert len(found) == 4 and sorted(sum(found, [])) == sorted(whole.targets.tolist())


def test_no_rewards_at_all_end_a_run_on_every_rank():
    config, model = config_of(), policy_model()
    feed = feed_of(config, model, Judge(failing="01234567"))
    with pytest.raises(
        AllFailed, match="step 1: the rewards of all 4 groups failed, .*no reward for .*resume"
    ):
        next(iter(feed))
    # the other rank has one that did not fail
    other = feed_of(config, model, Judge(failing="01234567"), world=2, total=plus(groups=1))
    assert len(next(iter(other)).targets) == 0


def test_a_model_that_overflows_is_an_error_on_every_rank(monkeypatch):
    config, model = config_of(), policy_model()
    with torch.no_grad():
        model.head.weight.mul_(torch.nan)
    with (
        ops.nan_passes(),
        pytest.raises(UserError, match="draw 1: the largest logit is nan.*lower --lr_init"),
    ):
        next(iter(feed_of(config, model, Judge())))
    other = feed_of(config, policy_model(), Judge(), world=2, total=plus(broken=1))
    with pytest.raises(UserError, match="another process overflows in the rollouts of step 1"):
        next(iter(other))


class Record(Callback):
    """Keeps the model's weights after each step."""

    def __init__(self):
        self.weights = []

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        if (index + 1) % module.accumulate == 0:
            self.weights.append(weights_of(module.model))


def weights_of(model):
    return torch.cat([p.detach().flatten().clone() for p in model.parameters() if p.requires_grad])


@pytest.fixture
def train(tmp_path, monkeypatch):
    """train(judge, steps, **settings) -> (module, weights before, after each step, [weights at each draw],
    lines of metrics.jsonl).
    """

    def run(judge, steps, callbacks=(), model=None, spoil=None, **settings):
        config = config_of(rollback_steps=1, **settings)
        model = model or policy_model()
        at_draws = []
        groups = Rollouts.groups

        def counted(self, draw, places):
            at_draws.append((draw, weights_of(self.model)))
            return groups(self, draw, places)

        monkeypatch.setattr(Rollouts, "groups", counted)
        questions = questions_of(config)
        data = TrainingData(questions, questions.take([]), encoder=ENCODER, rewards=judge)
        module = FineTuning(model, source_of(config), data, steps)
        if spoil:
            step_of = module.training_step
            module.training_step = lambda *given: spoil(module, step_of(*given))
        record, path = Record(), tmp_path / "metrics.jsonl"
        path.write_text("")
        last_good = LastGood(1, 0)
        report = StepReport(str(path), steps, time.time(), last_good, [])
        saver = Saver(str(tmp_path / "kept"), str(tmp_path / "a.pth"), 0, 1, lambda *_: None, last_good)
        before = weights_of(model)
        trainer = make_trainer(config, steps, [report, record, *callbacks, saver])
        error = None
        try:
            with ops.nan_passes():
                trainer.fit(module)
        except UserError as caught:
            error = caught
        lines = read_rows(path)
        return module, [before, *record.weights], at_draws, lines, error

    return run


def test_every_draw_is_by_the_model_after_the_step_before(train):
    """A batch that was fetched ahead would be drawn by an older one. Two micro-batches, three inner steps."""
    settings = {"micro_bsz": 2, "accumulate_grad_batches": 2, "inner_steps": 3}
    module, weights, at_draws, lines, _ = train(Judge(), 6, **settings)
    assert [draw for draw, _ in at_draws] == [0, 1]
    for draw, seen in at_draws:
        assert torch.equal(seen, weights[3 * draw])
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(weights))
    assert [line["units"] for line in lines] == [4] * 6
    rewards = [line["reward"] for line in lines]
    assert rewards[:3] == rewards[:1] * 3 != rewards[3:]
    # drawing takes time once, and only later steps have moved away from the answers
    assert ["draw_seconds" in line for line in lines] == [True, False, False] * 2
    assert [line["loss"] for line in lines[:3]] != [lines[0]["loss"]] * 3
    assert all(line["engine_gap_max"] < 1e-5 for line in lines)


def test_inner_steps_are_compared_with_the_first_one(train):
    """old is what the training had at the first step on the answers, for each micro-batch its own."""
    seen = []

    def look(module, loss):
        seen.append(module.feed.batches[len(seen) % 2].old.clone())
        return loss

    train(Judge(), 2, spoil=look, micro_bsz=2, accumulate_grad_batches=2, inner_steps=2)
    assert len(seen) == 4 and not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2]) and torch.equal(seen[1], seen[3])


def test_a_step_without_anything_to_learn_moves_no_weight(train):
    module, weights, _, lines, _ = train(Judge(alike="01234567"), 2)
    assert torch.equal(weights[2], weights[0])
    assert [(line["loss"], line["trained_tokens"], line["dead_groups"]) for line in lines] == [(0, 0, 1)] * 2
    assert [line["kl"] for line in lines if "kl" in line] == [], "of no answer"


def test_a_kl_is_trained_where_all_rewards_are_equal(train):
    """MiSS is not zero at first here."""
    _, weights, _, lines, _ = train(Judge(alike="01234567"), 1, beta=0.5)
    assert lines[0]["kl"] > 1e-3 and lines[0]["loss"] == pytest.approx(0.5 * lines[0]["kl"], rel=1e-5)
    assert not torch.equal(weights[1], weights[0]) and lines[0]["trained_tokens"] > 0


def test_a_kl_that_is_not_trained_is_measured_at_every_tenth_draw(train, monkeypatch):
    monkeypatch.setattr("src.sources.drawn.feed.KL_EVERY", 2)
    _, _, _, lines, _ = train(Judge(), 6, inner_steps=2, lr_init=1e-3)
    assert [line.get("kl", 0) > 1e-3 for line in lines] == [True, True, False, False, True, True]


def test_what_was_done_is_saved_where_all_rewards_fail(train, tmp_path):
    judge = Judge()
    score, judge.score = (
        judge.score,
        lambda *asked: Failed("late", "no more") if len(judge.asked) >= 8 else score(*asked),
    )
    module, weights, _, lines, error = train(judge, 5)
    assert isinstance(error, AllFailed) and "step 3" in str(error) and len(lines) == 2
    (kept,) = (tmp_path / "kept").iterdir()
    assert kept.name == "step-00000002.pth"
    # before the first step there is nothing to be saved
    _, _, _, _, error = train(Judge(failing="01234567"), 2)
    assert isinstance(error, AllFailed)
    assert [path.name for path in (tmp_path / "kept").iterdir()] == [kept.name]


def test_steps_on_a_draw_that_went_wrong_move_nothing(train):
    """A loss that is NaN in the second of three inner steps: the state before them is back, as that after the
    first one led to it. The third step moves nothing, and the next draw is by the state that is back.
    """

    def spoil(module, loss):
        if module.trainer.global_step != 1:
            return loss
        module.step_loss = module.step_loss * torch.nan
        return loss * torch.nan

    module, weights, at_draws, lines, _ = train(Judge(), 6, spoil=spoil, inner_steps=3)
    assert lines[1]["rolled_back_to"] == 0 and lines[1]["loss"] is None
    assert torch.equal(weights[2], weights[0]) and torch.equal(weights[3], weights[0])
    assert lines[2]["trained_tokens"] == 0 < lines[3]["trained_tokens"]
    assert torch.equal(at_draws[1][1], weights[0]) and not torch.equal(weights[4], weights[3])


def test_a_stop_waits_for_the_end_of_a_draw(train):
    class Stop(Callback):
        def on_train_batch_start(self, trainer, module, batch, index):
            if trainer.global_step == 3:
                trainer.callbacks[0].stop = True

    _, weights, _, lines, _ = train(Judge(), 9, callbacks=[Stop()], inner_steps=3)
    assert len(lines) == 6


def test_a_failure_is_told_once_for_each_kind(capsys):
    feed = feed_of(config_of(micro_bsz=8), policy_model(), Judge(failing="356"), range(1))
    next(iter(feed))
    assert capsys.readouterr().out.count("is left out, as its reward failed: no reward for") == 1
