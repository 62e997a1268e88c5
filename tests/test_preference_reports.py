"""Reports of a run on preferences: its lines, bar, curves and cards."""

import dataclasses
import json
import math

import numpy as np
import pytest

from rwkv_miss.progress import Progress
from src.config import Config
from src.data.preferences import Preferences
from src.losses._preference import PREFERENCES
from src.losses.metrics import SUPERVISED
from src.reporting import curves, run_card, run_end
from src.reporting.diagnosis import LEARNT, Verdict, Warnings
from src.reporting.run_log import RunLog
from src.sources import source_of
from src.training.callbacks import StepReport
from src.training.validation_log import describe

DPO = Config(load_model="base.pth", loss="dpo", beta=0.1, sft_weight=1.0, lr_init=2e-3).settled()
METRICS = dict(nll=1.25, logp_chosen=-30.0, logp_rejected=-34.5, reward_chosen=0.75, reward_rejected=-0.5)
METRICS |= dict(margin=1.25, reward_accuracy=0.9375, raw_accuracy=0.5)
FINE = Verdict(LEARNT, "the loss fell", "", True)
KL = {"kl": 0.02}  # evaluations alone have it


def line(step, loss=0.5, units=16, **changed):
    """A line of metrics.jsonl."""
    spent = {"lr": 1e-3, "tokens": 500, "trained_tokens": 320, "seconds": 0.5, "tokens_per_second": 1000.0}
    return {"step": step, "loss": loss, **spent, **PREFERENCES.fields(units, METRICS | changed)}


def evaluation(step, loss=0.5, answer=None, units=100, **changed):
    """A line of validation.jsonl."""
    samples = [{"prompt": "2+2?", "answer": answer or str(step), "right": "4"}]
    return {
        "step": step,
        "loss": loss,
        "samples": samples,
        **PREFERENCES.fields(units, METRICS | KL | changed),
    }


def evaluations():
    """The best one is not the last."""
    return [evaluation(0, 0.69, margin=0.0), evaluation(10, 0.2, margin=3.0), evaluation(20, 0.3, margin=2.5)]


def test_a_line_has_the_metrics_and_what_is_not_finite_is_null():
    found = PREFERENCES.fields(16.0, METRICS | {"logp_chosen": math.nan})
    assert found == {"units": 16} | METRICS | {"logp_chosen": None} and isinstance(found["units"], int)
    plain = {"step": 1, "loss": 1.0, "lr": 0.1}
    assert SUPERVISED.fields(320.0, {}) == {} == SUPERVISED.numbers("train", plain)
    sent = PREFERENCES.numbers("validation", {"step": 1, "loss": 1.0} | found)
    assert sent == {f"validation/{name}": value for name, value in METRICS.items() if name != "logp_chosen"}


def begun_report(metrics, total):
    """The report of a run that has half of its steps behind it, on a terminal."""
    report = StepReport("", total, 0.0, None, [])
    report.metrics = metrics
    report.bar = Progress("training", total, "steps", shown=False)
    report.bar.terminal, report.steps_here = True, 1
    report.begun = report.last_line = 0.0
    report.bar.done, report.bar.first = total // 2, 1
    return report


@pytest.mark.parametrize("total", [150, 1000, 9999])
def test_the_bar_shows_loss_accuracy_and_margin_in_80_columns(monkeypatch, total, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    report = begun_report(PREFERENCES, total)
    report._show(line(total // 2 + 1), 0.5, 1.0)
    text = report.bar.text(0.2 * total)
    shown = " left, loss 0.500, accuracy 94%" + ", margin 1.2" * (total < 9999)
    assert len(text) <= 79 and text.endswith(shown), text
    report._show(line(total, reward_accuracy=1.0, margin=-12.34, loss=None), math.nan, 1e9)
    text = report.bar.text(0.2 * total)
    assert len(text) <= 79 and text.endswith("no loss, accuracy 100%, margin -12"), text
    *_, said = capsys.readouterr().out.splitlines()
    numbers = "loss nan per pair, accuracy 100 %, margin -12.3, log p of a chosen answer -30.0, lr 1.00e-03, "
    assert said.startswith(f"step {total}/{total} {numbers}1,000 tokens/s")


def test_an_evaluation_is_told_with_its_accuracy():
    said, sample = describe([evaluation(0, 0.7), evaluation(9, 0.25)], 20, PREFERENCES)
    assert said == (
        "step 9/20 validation loss 0.2500 per pair, the best so far, accuracy 93.8 %, margin 1.25, log p of a"
        " chosen answer -30.0, KL 0.02 per token"
    )
    raw = {name: value for name, value in METRICS.items() if name != "reward_accuracy"}
    assert PREFERENCES.evaluation_text(PREFERENCES.fields(3, raw)).startswith("accuracy 50 %, ")


def test_the_pictures_hold_every_metric(tmp_path, plotted):
    metrics = [line(step, margin=step / 10) for step in range(1, 9)] + [line(9, margin=math.nan)]
    history = [evaluation(0, margin=0.0), evaluation(9, margin=2.0)]
    curves.draw_pictures(PREFERENCES, metrics, history, str(tmp_path))
    assert (tmp_path / "loss.png").exists()
    drawn = {label: tuple(map(list, line.get_data())) for label, line in plotted.items()}
    titles = {name.replace("_", " ") for name in METRICS}
    held_out = {f"{title}, held out" for title in {"kl", *titles}}
    losses = {"loss", "mean of 1 steps", "validation loss"}
    assert set(drawn) == titles | held_out | losses
    assert drawn["margin"] == ([*range(1, 9)], [step / 10 for step in range(1, 9)])
    assert drawn["margin, held out"] == ([0, 9], [0.0, 2.0])
    assert (tmp_path / "preferences.png").read_bytes()[:4] == b"\x89PNG"


def test_the_card_has_the_metrics_first_last_and_best():
    metrics = [line(step, margin=step / 10) for step in range(1, 21)]
    history = evaluations()
    summary = {"steps": 20, "planned_steps": 20, "loss_first": 0.7, "loss_last": 0.3, "output": "a.pth"}
    text = run_card.card(DPO, ["a plan"], summary, RunLog(metrics, history), FINE)
    for words in (
        "| margin of the rewards | 0.15 | 1.95 |",  # steps 1 and 2, then 19 and 20
        "|  | before, step 0 | after, step 20 | best, step 10 |",
        "| loss, per pair | 0.6900 | 0.3000 | 0.2000 |",
        "| margin of the rewards | 0 | 2.5 | 3 |",
        "| reward accuracy | 93.8 % | 93.8 % | 93.8 % |",
        "| KL to the reference on a few answers, per token | 0.02 | 0.02 | 0.02 |",
        "](loss.png)",
        "](preferences.png)",
    ):
        assert words in text, text
    assert "loss, nats" not in text
    log = RunLog([{"seconds": 1, "tokens": 1, "trained_tokens": 1}], [])
    assert "preferences.png" not in run_card.card(
        Config(load_model="b.pth").settled(), [], summary, log, FINE
    )


NLL, BASE = "with 1 x the NLL of the chosen answer", "reference: the base, adapter off"


@pytest.mark.parametrize(
    "settings, words",
    [
        ({}, f"dpo, beta 0.1, log p summed, {NLL}; {BASE}"),
        (
            {"loss_average": "mean", "label_smoothing": 0.1, "sft_weight": 0.0},
            f"dpo, beta 0.1, log p per token, label smoothing 0.1, without NLL; {BASE}",
        ),
        ({"loss": "ipo", "peft": "none", "peft_config": {}}, f"ipo, beta 0.1, {NLL}; reference: the base"),
        ({"loss": "simpo", "beta": 2.0}, f"simpo, beta 2, gamma 1, {NLL}; no reference"),
        ({"loss": "orpo"}, f"orpo, lambda 0.1, {NLL}; no reference"),
        (
            {"loss": "kto", "sft_weight": 0.0, "reference": "a/b.pth"},
            "kto, beta 0.1, weights 1 and 1, without NLL; reference: b.pth",
        ),
    ],
)
def test_the_loss_in_words(settings, words):
    config = dataclasses.replace(DPO, **settings)
    assert source_of(config).description == words
    answers = Preferences([], np.array([True, False]), config.loss != "kto", 99)
    warned = source_of(config).warnings(answers, None)
    assert len(warned) == (config.sft_weight == 0)


@pytest.mark.parametrize("label, words", [(True, "what to avoid"), (False, "what to prefer")])
def test_labels_that_are_all_alike_are_warned_of(label, words):
    kto = dataclasses.replace(DPO, loss="kto", sft_weight=0.0)
    [warning] = source_of(kto).warnings(Preferences([], np.array([label] * 20), False, 99), None)
    assert f"all 20 answers have label {str(label).lower()}: nothing says {words}" in warning


def test_a_loss_that_is_none_of_a_token_is_not_compared_with_guessing(capsys):
    """IPO begins at 25 with beta 0.1, which is more than ln 65536."""

    class Tokenizer:
        name, vocab_size = "bytes", 257

    report = StepReport("", 9, 0.0, None, [], Tokenizer())
    report.metrics, report.early_warning = source_of(DPO).loss.metrics, Warnings(DPO, [])
    report._remark(line(1, 25.0), 25.0)
    assert capsys.readouterr().out == ""
    report._remark(line(1, 25.0, nll=11.0), 25.0)
    assert "the loss of the chosen answers is 11.00, worse than guessing" in capsys.readouterr().out
    supervised = Config(load_model="base.pth").settled()
    report.metrics, report.early_warning = source_of(supervised).loss.metrics, Warnings(supervised, [])
    report._remark({"step": 1, "loss": 25.0, "trained_tokens": 1}, 25.0)
    assert "worse than guessing" in capsys.readouterr().out


def test_run_json_has_the_metrics(tmp_path):
    history = evaluations()
    metrics = [line(step, margin=step / 10) for step in range(1, 21)]
    found = run_end._metrics_summary(PREFERENCES, metrics, history)
    assert json.loads(json.dumps(found)) == found
    assert (found["metrics_first"]["margin"], found["metrics_last"]["margin"]) == pytest.approx((0.15, 1.95))
    names = ("first", "last", "best")
    assert [found[f"validation_metrics_{name}"]["margin"] for name in names] == [0.0, 2.5, 3.0]
    assert run_end._metrics_summary(SUPERVISED, [{"step": 1, "loss": 1.0}], []) == {}


@pytest.mark.parametrize(
    "evaluated, held_out, best",
    [
        (1, "", ""),  # before the training alone: that is not how it ended
        (2, "at step 10 accuracy", "before training 0.6900, at step 10 0.2000"),
        (3, "accuracy 93.8 %, margin 2.5", "before training 0.6900, at the end 0.3000"),
    ],
)
def test_the_last_words_name_the_step_of_the_last_evaluation(evaluated, held_out, best):
    history = evaluations()[:evaluated]
    summary = {"steps": 20, "planned_steps": 50, "loss_first": 1.0, "loss_last": 0.5, "output": "a.pth"}
    if best:
        summary |= {"best": "best.pth", "best_step": 10, "validation_best": 0.2}
    said = run_end._last_words(DPO, run_end.STOPPED, summary, history, None)
    parts = {text[:11].strip(): text[11:] for text in said[1:]}
    assert bool(held_out) == ("held out:" in parts) and parts.get("held out:", "").startswith(held_out)
    assert bool(best) == ("best:" in parts) and parts.get("best:", "").endswith(best)
    assert parts["read it:"] == "out/metrics.jsonl; run_card.md comes at the end of the training"
