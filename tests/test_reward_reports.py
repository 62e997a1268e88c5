"""Reports of a training on rewards: lines, bar, picture, card, samples and evaluation."""

import dataclasses
import json
import math
import statistics
import types

import numpy as np
import pytest
import torch

from rwkv_miss import UserError
from src.config import Config
from src.data.questions import Question, Questions
from src.data.rwkv_template import DEFAULT
from src.data.tokenizer import load_tokenizer
from src.distributed.process_group import ALONE, Processes
from src.evaluation.rewards import Failed, GroupRewards
from src.model import RWKV
from src.reporting import curves, model_card, run_card, run_end
from src.reporting.diagnosis import verdict
from src.reporting.run_log import RunLog
from src.sources import source_of
from src.sources.drawn import evaluation as reward_evaluation
from src.sources.drawn import rollouts
from src.sources.drawn.evaluation import RewardEvaluation
from src.sources.drawn.samples import SampleWriter, is_due
from src.training.validation_log import best, best_trained, describe, is_over

from .conftest import make_arch
from .test_preference_reports import begun_report

GRPO = Config(
    load_model="base.pth",
    loss="grpo",
    rewards={"exact": 1.0, "partial": 0.5},
    lr_init=3e-3,
    max_tokens=24,
    beta=0.0,
    precision="fp32",
).settled()
DESCRIBED = source_of(GRPO).loss.metrics
ANSWERS = dict(reward=0.75, reward_exact=0.5, reward_partial=0.625, reward_std=0.25, length=9.5, cut=0.03125)
GROUPS = dict(dead_groups=0.4375, failed_groups=0.0, entropy=0.3125, kl=0.02, clip=0.0)
ENGINE = dict(engine_gap=1e-6, engine_gap_max=8e-6, draw_seconds=0.15, draw_tokens_per_second=8000.0)
METRICS = {**ANSWERS, **GROUPS, **ENGINE, "train_tokens_per_second": 9000.0}


def line(step, **changed):
    """A line of metrics.jsonl."""
    spent = {"lr": 1e-3, "tokens": 900, "trained_tokens": 700, "seconds": 0.3, "tokens_per_second": 3000.0}
    return {"step": step, "loss": 0.01, **spent, **DESCRIBED.fields(16, METRICS | changed)}


def evaluation(step, reward, answer="dcba", units=64):
    """A line of validation.jsonl."""
    sample = {"prompt": "abcd?", "answer": answer, "right": "dcba", "reward": reward}
    metrics = {"reward": reward, "reward_exact": reward, "length": 6.0, "cut": 0.0, "failed": 0.0}
    return {"step": step, "loss": -reward, **DESCRIBED.fields(units, metrics), "samples": [sample]}


def test_a_run_is_described_by_its_reward():
    """The names of the rewards that the run has, too."""
    assert METRICS.keys() <= DESCRIBED.titles.keys()
    other = source_of(dataclasses.replace(GRPO, rewards={"exact": 1.0})).loss.metrics
    assert "reward_exact" not in other.titles
    found = line(1, kl=math.nan)
    assert found["kl"] is None and found["units"] == 16
    sent = {f"train/{name}": value for name, value in METRICS.items() if name != "kl"}
    assert DESCRIBED.numbers("train", found) == sent
    assert DESCRIBED.score_of(-0.5) == 0.5 and DESCRIBED.score_text(evaluation(3, 0.875)) == "0.8750"
    assert DESCRIBED.score_text({"loss": None, "reward": None}) == "not known"


def test_the_bar_shows_reward_dead_groups_and_entropy(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    total = 9999
    report = begun_report(DESCRIBED, total)
    report._show(line(total // 2 + 1), 0.01, 1.0)
    text = report.bar.text(0.2 * total)
    assert len(text) <= 79 and text.endswith(" left, reward 0.75, equal rewards 44%"), text
    report._show(line(total, reward=-1.25, dead_groups=1.0, entropy=0.0123, kl=math.nan), 0.0, 1e9)
    text = report.bar.text(0.2 * total)
    assert len(text) <= 79 and text.endswith("reward -1.25, equal rewards 100%"), text
    monkeypatch.setenv("COLUMNS", "130")
    assert report.bar.text(0.2 * total).endswith("equal rewards 100%, entropy 0.01, 3,000 tokens/s")
    *_, said = capsys.readouterr().out.splitlines()
    words = (
        "reward -1.250, groups of equal rewards 100 %, length 9.5 tokens, cut at --max_tokens 3.12 %,"
        " entropy 0.0123 per token, lr 1.00e-03, 3,000 tokens/s"
    )
    assert said.startswith(f"step {total}/{total} {words}")
    report._show(line(total, dead_groups=1.0) | {"tokens": 0, "tokens_per_second": 0.0}, 0.0, 1e12)
    assert " 8,000 tokens/s drawn" in capsys.readouterr().out


def test_the_best_evaluation_has_the_highest_reward():
    history = [evaluation(step, reward) for step, reward in ((0, 0.5), (10, 0.875), (20, 0.75))]
    assert best(history) is history[1] and is_over(history, 1) and not is_over(history, 2)
    said, sample = describe(history, 30, DESCRIBED)
    begin = "step 20/30 validation reward 0.7500, best 0.8750 at step 10, length 6 tokens, "
    assert said == f"{begin}cut at --max_tokens 0 %" and sample == "    | 'abcd?' -> 'dcba', reward 0.75"
    failed = evaluation(30, 0.5) | {"failed": 7.0}
    assert describe([*history, failed], 30, DESCRIBED)[0].endswith(
        "length 6 tokens, cut at --max_tokens 0 %, rewards failed 7 of 64"
    )
    unknown = evaluation(30, 0.5) | {"loss": None, "reward": None}
    assert describe([*history, unknown], 30, DESCRIBED)[0].startswith(
        "step 30/30 validation reward not known"
    )


def test_the_picture_of_the_rewards_takes_the_place_of_the_losses(tmp_path, plotted):
    metrics = [line(step, reward=step / 10, kl=0.1 if step == 1 else math.nan) for step in range(1, 9)]
    curves.draw_pictures(DESCRIBED, metrics, [evaluation(0, 0.5), evaluation(8, 0.75)], str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["rewards.png"]
    drawn = {label: tuple(map(list, line.get_data())) for label, line in plotted.items()}
    assert drawn["reward"] == ([*range(1, 9)], [step / 10 for step in range(1, 9)])
    assert drawn["reward, held out"] == ([0, 8], [0.5, 0.75]) and drawn["kl"] == ([1], [0.1])
    assert {"dead groups", "length", "length, held out", "entropy", "cut", "reward exact"} <= drawn.keys()
    assert curves.pictures(DESCRIBED)[0].endswith("](rewards.png)") and len(curves.pictures(DESCRIBED)) == 1


# the cards and the last words


def drawn_line(step):
    answers = [
        dict(answer="dcba", tokens=5, cut=False, reward=1.5, reward_exact=1.0, advantage=0.9),
        dict(answer="d|b\n", tokens=24, cut=True, reward=0.25, reward_exact=0.0, advantage=-0.9),
    ]
    return {"step": step, "prompt": "abcd?", "right": "dcba", "answers": answers}


def finished(tmp_path, metrics, history, drawn=()):
    """(run card, what the model card says was measured, last words) of a run with these lines."""
    config = dataclasses.replace(GRPO, proj_dir=str(tmp_path))
    summary = {"steps": 20, "planned_steps": 20, "loss_first": 0.1, "loss_last": 0.01, "output": "a.pth"}
    summary |= run_end._validation_summary(DESCRIBED, config.proj_dir, history)
    if best_trained(history):
        summary |= {"best": "best.pth", "best_step": 10, "validation_reward_best": 0.875}
    summary |= run_end._metrics_summary(DESCRIBED, metrics, history)
    judged = verdict(config, metrics, 10, history)
    card = run_card.card(config, ["a plan"], summary, RunLog(metrics, history, list(drawn)), judged)
    state = run_end._state(20, 20, history, config.early_stop, by_loss=False)
    said = run_end._last_words(config, state, summary, history, judged)
    return card, "\n".join(model_card._measured(source_of(config).loss, summary, history)), said


def test_the_cards_tell_rewards_and_drawn_answers(tmp_path):
    metrics = [line(step, reward=0.5 + step / 100) for step in range(1, 21)]
    history = [evaluation(0, 0.5, "abcd"), evaluation(10, 0.875), evaluation(20, 0.75)]
    card, measured, said = finished(tmp_path, metrics, history, [drawn_line(step) for step in (1, 11, 20)])
    for words in (
        "| training reward | 0.515 to 0.695 |",
        "| greedy answers | right 50 % to 87.5 %; reward 0.5 to 0.875 of at most 1.5, on 64 held-out",
        "![reward, groups of equal rewards, length, entropy and KL over the steps](rewards.png)",
        "| groups of equal rewards, which teach nothing | 43.8 % | 43.8 % |",
        "|  | before, step 0 | after, step 20 | best, step 10 |",
        "| reward of an answer | 0.5 | 0.75 | 0.875 |",
        "`best.pth` is the state of step 10, reward 0.8750.",
        "before, reward 0.5:\n\n    abcd",
        "after, reward 0.75:\n\n    dcba",
        "### Answers drawn in step 1\n",
        "### Answers drawn in step 20\n",
        "    reward 1.5, advantage 0.9, 5 tokens: 'dcba'\n"
        "    reward 0.25, advantage -0.9, 24 tokens, cut: 'd|b\\n'",
    ):
        assert words in card, f"{words}\n\n{card}"
    assert "step 11" not in card and "loss.png" not in card and "per token, of the" not in card
    assert "| verdict | learnt: the reward on held-out questions rose from 0.5 to 0.875; it fell" in card
    assert "failed" not in card and "failed" not in measured
    assert "| training reward | 0.515 to 0.695 |" in measured
    assert run_card.evaluations_table(DESCRIBED, history) in measured
    assert said[0] == "done: step 20 of 20, reward of drawn answers 0.515 to 0.695; wrote a.pth"
    assert said[1] == (
        "held out:  right 50 % to 75 %; reward 0.5 to 0.75 of at most 1.5, on 64 held-out questions; length 6"
        " tokens, cut at --max_tokens 0 %"
    )
    [top] = [text for text in said if text.startswith("best:")]
    assert top.endswith("step 10, validation reward 0.8750; before training 0.5000, at the end 0.7500")
    ended = run_end._state(20, 40, history, early_stop=1, by_loss=False)
    assert ended == "ended early, as the held-out reward rose no further"
    ended = run_end._state(20, 40, [evaluation(0, 1.0), *history[1:]], early_stop=1, by_loss=False)
    assert ended == "ended early, as the held-out reward did not rise"


def test_failures_are_told_of_how_many_and_a_reward_of_ones_own_has_no_right_answers(tmp_path):
    history = [evaluation(0, 0.5), evaluation(10, 0.875) | {"failed": 52.0}, evaluation(20, 0.75)]
    card, _, _ = finished(tmp_path, [line(1)], history)
    assert "| answers whose reward failed | 0 of 64 | 0 of 64 | 52 of 64 |" in card
    own = dataclasses.replace(GRPO, rewards={"own": 1.0})
    assert run_card.held_out_words(own.rewards, 20, history) == "reward 0.5 to 0.75, on 64 held-out questions"
    assert DESCRIBED.step_text(line(1, failed_groups=14.0), 0.0).endswith("rewards failed 14 of 16")
    assert DESCRIBED.value_text("kl", None) == "not measured"


def test_run_json_has_the_rewards(tmp_path):
    """The best evaluation has the highest reward, not the lowest."""
    history = [evaluation(0, 0.5), evaluation(10, 0.875), evaluation(20, 0.75)]
    found = run_end._metrics_summary(DESCRIBED, [line(step) for step in range(1, 21)], history)
    assert json.loads(json.dumps(found)) == found and found["metrics_last"]["dead_groups"] == 0.4375
    rewards = [found[f"validation_metrics_{name}"]["reward"] for name in ("first", "last", "best")]
    assert rewards == [0.5, 0.75, 0.875]
    ends = run_end._validation_summary(DESCRIBED, str(tmp_path), history)
    assert ends == {"validation_reward_first": 0.5, "validation_reward_last": 0.75}


def test_a_lost_run_offers_no_file_and_says_what_to_do(tmp_path):
    metrics = [
        line(step, reward=1.2 * (step < 5), dead_groups=1.0 if step > 5 else 0.4) for step in range(1, 21)
    ]
    history = [evaluation(0, 0.5), evaluation(10, 0.0), evaluation(20, 0.0)]
    card, _, said = finished(tmp_path, metrics, history)
    assert not any(text.startswith(("merge it:", "try it:")) for text in said)
    [verdict_line] = [text for text in said if text.startswith("verdict:")]
    assert verdict_line.startswith(
        "verdict:   made worse: the reward on held-out questions fell from 0.5 to 0; right answers"
    )
    assert (
        verdict_line.count("--lr_init") == 1 == verdict_line.count("starting again")
        and "best.pth" not in verdict_line
    )
    assert "No evaluated state is better than the model before the training." in card
    assert "best:      the base, validation reward 0.5000; at the end 0.0000" in said
    assert said[-1] == "keep:      the base; a.pth is not worth using"
    first = describe(history[:2], 20, DESCRIBED)[0]
    assert first.startswith("step 10/20 validation reward 0.0000, best 0.5000 before training, ")
    not_known = history[:2] + [evaluation(20, math.nan) | {"loss": None}]
    assert not any(text.startswith("best:") for text in finished(tmp_path, metrics, not_known)[2])


# samples.jsonl


@dataclasses.dataclass
class Drawn:
    text: str
    tokens: list
    cut: bool = False


def group(failed=False):
    values = torch.tensor([[1.0, 0.5], [0.0, 0.25]], dtype=torch.float64)
    return types.SimpleNamespace(
        question=Question(["abcd?"], "dcba"),
        answers=[Drawn("dcba", [1, 2, 3, 4, 0]), Drawn("x" * 999, [5] * 24, True)],
        scored=Failed("nan", "it gave nan") if failed else GroupRewards(values, values.sum(1)),
        advantages=None if failed else torch.tensor([0.75, -0.75], dtype=torch.float64),
    )


def test_drawn_answers_are_written_now_and_then_and_a_resumed_run_writes_them_again(tmp_path):
    def steps(first, last, inner=1):
        config = dataclasses.replace(GRPO, inner_steps=inner)
        feed = types.SimpleNamespace(first_group=group())
        module = types.SimpleNamespace(accumulate=2, total_steps=60, config=config, feed=feed)
        module.data = types.SimpleNamespace(rewards=types.SimpleNamespace(names=("exact", "partial")))
        trainer = types.SimpleNamespace(is_global_zero=True, global_step=first)
        written = SampleWriter(str(tmp_path))
        written.on_train_start(trainer, module)
        for step in range(first + 1, last + 1):
            written.on_train_batch_end(trainer, module, None, None, 0)
            trainer.global_step = step
            written.on_train_batch_end(trainer, module, None, None, 1)
        return (tmp_path / "samples.jsonl").read_text()

    def step_of(text):
        return [json.loads(each)["step"] for each in text.splitlines()]

    whole = steps(0, 60)
    assert step_of(whole) == [*range(1, 60, 3), 60]
    assert step_of(steps(0, 31))[-1] == 31 and steps(30, 60) == whole, "step 31 is done again"
    assert step_of(steps(0, 60, inner=4)) == [1 + 4 * draw for draw in range(15)]
    first = json.loads(whole.splitlines()[0])
    assert first["answers"][0] == dict(
        answer="dcba", tokens=5, cut=False, reward=1.5, reward_exact=1.0, reward_partial=0.5, advantage=0.75
    )
    assert len(first["answers"][1]["answer"]) <= 300
    assert (first["prompt"], first["right"]) == ("abcd?", "dcba")
    assert len(whole) < 60 * 800
    assert sum(is_due(step, 100_000, 2) for step in range(1, 100_001)) <= 22


# the evaluation

BYTES = load_tokenizer("bytes", 256, "")


class Awarded:
    """Stands in for Rewards: what an answer is worth depends on its question; some fail, or take long."""

    names = ("exact", "partial")

    def __init__(self, fails=(), seconds=0.0):
        self.fails, self.seconds, self.asked, self.now = fails, seconds, [], 0.0

    def score(self, question, answers):
        [answer] = answers
        number = int(question.answer)
        self.asked.append(number)
        if number in self.fails:
            self.now += self.seconds
            return Failed("time out", f"question {number} took too long")
        values = torch.tensor([[float(number % 2), len(answer.text) / 100]], dtype=torch.float64)
        return GroupRewards(values, values @ torch.tensor([1.0, 0.5], dtype=torch.float64))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return RWKV(make_arch(7, n_layer=1, n_embd=16, vocab_size=256)).eval()


@pytest.fixture
def asked(monkeypatch):
    """11 questions, asked 3 at a time."""
    monkeypatch.setitem(reward_evaluation.ROWS, "cpu", 3)
    texts = [f"{i}?" * (1 + i % 3) for i in range(11)]
    prompts = [np.array(BYTES.encode(text), np.int32) for text in texts]
    return Questions([Question([text], str(i)) for i, text in enumerate(texts)], prompts, 4, 5)


def evaluator(rewards, timeout=10.0):
    encoder = types.SimpleNamespace(tokenizer=BYTES, template=DEFAULT)
    return RewardEvaluation(encoder, rewards, timeout)


@torch.no_grad()
def greedy(model, prompt, count):
    """Greedy tokens, the whole text read anew for each."""
    ids = prompt.tolist()
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]))[0][0, -1].argmax()))
        if not ids[-1]:
            break
    return ids[len(prompt) :]


def test_an_evaluation_is_of_greedy_answers_to_every_question(model, asked):
    found = evaluator(Awarded()).answers(model, asked, 2)
    answers = [greedy(model, prompt, 5) for prompt in asked.prompts]
    assert found.tokens == sum(map(len, answers)) and found.examples == 11
    assert found.metrics["length"] == pytest.approx(found.tokens / 11)
    assert found.metrics["cut"] == sum(tokens[-1] != 0 for tokens in answers) / 11
    assert found.metrics["reward_exact"] == 5 / 11 and found.metrics["failed"] == 0
    half = 0.5 * found.metrics["reward_partial"]
    assert found.loss == -found.metrics["reward"] == pytest.approx(-(5 / 11 + half))
    assert [sample["prompt"] for sample in found.samples] == ["0?", "1?1?"]
    assert found.samples[1]["right"] == "1" and found.samples[1]["reward"] >= 1.0
    all_of_them = [one["reward"] for one in evaluator(Awarded()).answers(model, asked, 11).samples]
    error = statistics.stdev(all_of_them) / math.sqrt(11)
    assert found.metrics["reward_error"] == pytest.approx(error) and error > 0.1
    one = evaluator(Awarded()).answers(model, asked.take(np.array([0])), 1)
    assert math.isnan(one.metrics["reward_error"])


class Two(Processes):
    """One of two processes; `others` are what the other one has."""

    def gathered(self, mine):
        self.others.append(mine)
        return [*self.others]


def test_two_processes_ask_each_question_once_and_get_the_numbers_of_one(model, asked):
    one = evaluator(Awarded()).answers(model, asked, 3)
    shares, others = [], []
    for rank in (1, 0):
        rewards, processes = Awarded(), Two(2, rank)
        object.__setattr__(processes, "others", others)
        found = evaluator(rewards).answers(model, asked, 3, processes)
        shares.append(rewards.asked)
    assert found == one and sorted(shares[0] + shares[1]) == [*range(11)]
    assert shares[0] == [3, 4, 5, 9, 10]
    assert ALONE.gathered([1]) == [[1]]


def test_rewards_that_fail_are_counted_and_rewards_that_hang_are_given_up(model, asked, capsys, monkeypatch):
    evaluating = evaluator(Awarded(fails={1, 4}))
    found = evaluating.answers(model, asked, 2)
    assert found.metrics["failed"] == 2 and found.metrics["reward_exact"] == 4 / 9
    assert found.samples[1]["reward"] is None and found.examples == 11
    evaluating.answers(model, asked, 2)
    said = capsys.readouterr().out
    assert said.count("rewards failed: question 1 took too long") == 1 and "question 4" not in said, said
    hanging = Awarded(fails={*range(11)}, seconds=10.5)
    monkeypatch.setattr(rollouts, "time", types.SimpleNamespace(monotonic=lambda: hanging.now))
    found = evaluator(hanging, timeout=10.0).answers(model, asked, 1)
    assert len(hanging.asked) == 3 and found.metrics["failed"] == 11 and math.isnan(found.loss)
    assert "were asked for no more" in capsys.readouterr().out
    hanging.asked.clear()
    patient = rollouts.PatientRewards(hanging, 10.0, 100)  # a tenth of these may run out of time
    failed = [patient.score(asked[0], [None]).kind for _ in range(12)]
    assert len(hanging.asked) == 10 and failed.count("given up") == 2


def test_an_evaluation_ends_between_two_blocks_and_a_model_that_overflows_is_named(model, asked):
    rewards, looks = Awarded(), iter([False, False, True])
    assert evaluator(rewards).answers(model, asked, 1, ALONE, lambda: next(looks)) is None
    assert rewards.asked == [*range(6)]
    broken = RWKV(model.arch)
    broken.head.weight.data.fill_(math.nan)
    with pytest.raises(UserError, match="held-out questions: .*lower --lr_init"):
        evaluator(Awarded()).answers(broken.eval(), asked, 1)
