"""The parts of the paper's training experiments: the search for a rate, finished trainings that are kept, the
tasks and what counts as right.
"""

import copy
import dataclasses
import math

import pytest
import torch

from benchmarks.paper import forgetting, loss_curves, rank, training
from benchmarks.paper.training import Outcome, Runs, Settings, Spread, below, climb, rate, right, untouched
from benchmarks.paper.training_tasks import ROOT, from_pairs, load_task
from demo import task
from rwkv_miss import UserError
from src.config import Config
from src.data.collate import collate
from src.model import RWKV
from src.planning.base_model import build_model
from src.training.short_runs import held_out_loss

from .conftest import read_rows

pytestmark = pytest.mark.rare

TINY = dataclasses.replace(loss_curves.TINY, tasks=("letters",))


@pytest.mark.parametrize("start", [-12, -6, -5, 0])
@pytest.mark.parametrize("best", [-12, -7, -3, 0])
def test_the_climb_ends_between_two_worse_rates(start, best):
    tried = []

    def loss(lr):
        tried.append(lr)
        exponent = round(2 * math.log10(lr))
        return None if exponent > best + 2 else abs(exponent - best)  # None: it diverged

    found = climb(loss, start)
    assert min(found, key=found.get) == best and {best - 1, best + 1} - {-13, 1} <= found.keys()
    assert len(tried) == len(set(tried)) <= abs(start - best) + 3


def test_rates_are_half_decades():
    rates = "1e-6 3e-6 1e-5 3e-5 1e-4 3e-4 1e-3 3e-3 1e-2 3e-2 1e-1 3e-1 1.0"
    assert [rate(k) for k in range(-12, 1)] == [float(each) for each in rates.split()]


def outcome(held_out):
    return Outcome(1, [1.0], held_out, held_out, None, None, 0.0)


def test_what_is_within_two_standard_errors_is_level():
    low, high = [outcome(x) for x in (1.0, 1.02, 0.98)], [outcome(x) for x in (1.1, 1.12, 1.08)]
    wide = [outcome(x) for x in (1.0, 1.3, 1.0)]
    assert str(Spread.of(low, "held_out")) == "1.0000 ± 0.0200"
    assert str(Spread.of(low[:1], "held_out")) == "1.0000"
    assert str(Spread.of(low, "tokens_right")) == str(Spread.of([outcome(None), *low], "held_out")) == "-"
    assert below(low, high) is True and below(high, low) is False and below(low, wide) is None
    assert below(wide, low) is None


def three(mean):
    return [outcome(mean + d) for d in (0.0, 0.01, -0.01)]


def test_verdicts_of_the_loss_curves():
    def found(**best):
        return {
            "gsm8k": {
                name: loss_curves.Measured(three(paper), 1e-3, three(own))
                for name, (paper, own) in best.items()
            }
        }

    ahead = loss_curves.claims(found(miss=(1.0, 0.5), lora=(2.0, 0.9), **{"miss, balanced": (1.5, 0.3)}))
    assert [claim.agrees for claim in ahead] == [True, True, True]
    assert ahead[0].ours == "MiSS's held-out loss against lora: below it on gsm8k"
    assert "below it on gsm8k" in ahead[2].ours
    behind = loss_curves.claims(
        found(miss=(1.0, 0.9), lora=(2.0, 0.5), pissa=(2.0, 0.9), **{"miss, balanced": (1.0, 0.9)})
    )
    assert [claim.agrees for claim in behind] == [True, False, False]
    assert behind[1].ours.endswith("lora: above it on gsm8k; pissa: level with it on gsm8k")
    assert "level with it" in behind[2].ours


def test_verdicts_of_the_ranks():
    def found(miss, lora):
        ranks = [
            [
                rank.Measured(r, 1e-3, three(own), outcome(paper))
                for r, (own, paper) in zip((4, 8, 16), losses)
            ]
            for losses in (miss, lora)
        ]
        return {"gsm8k": dict(zip(("miss", "lora"), ranks))}

    falls = rank.claims(found([(0.9, 3.0), (0.7, 2.0), (0.5, 1.0)], [(1.0, 0.0), (0.9, 0.0), (0.8, 0.0)]))
    assert [claim.agrees for claim in falls] == [True, True, True]
    assert "falls 2, is level 0 and rises 0 times" in falls[0].ours
    assert "lower at 3, level at 0, higher at 0 of 3" in falls[2].ours
    rises = rank.claims(found([(0.5, 1.0), (0.7, 2.0), (0.7, 1.0)], [(0.4, 0.0), (0.7, 0.0), (0.6, 0.0)]))
    assert [claim.agrees for claim in rises] == [False, False, False]
    assert "falls 0, is level 1 and rises 1 times" in rises[0].ours
    assert "lower at 0, level at 1, higher at 2 of 3" in rises[2].ours


def test_finished_trainings_are_not_repeated(tmp_path, monkeypatch):
    done = []

    def count(run, task):
        done.append(run)
        return outcome(float(len(done)))

    monkeypatch.setattr(training, "_train", count)
    settings = dataclasses.replace(TINY, runs=str(tmp_path / "folder" / "runs.jsonl"))
    for _ in range(2):
        first = Runs(settings).at_rate("letters", "miss", {"rank": 2}, 1e-3)
    assert [o.held_out for o in first] == [1.0, 2.0] and [run.seed for run in done] == [0, 1]
    file = tmp_path / "folder" / "runs.jsonl"
    file.write_text(file.read_text()[:-20])  # killed while it wrote the last line
    assert [o.held_out for o in Runs(settings).at_rate("letters", "miss", {"rank": 2}, 1e-3)] == [1.0, 3.0]
    assert [line["outcome"]["held_out"] for line in read_rows(file)] == [1.0, 3.0]
    for other in ({"steps": (3,)}, {"rows": (5,)}, {"held_out": (11,)}):
        Runs(dataclasses.replace(settings, **other)).at_rate("letters", "miss", {"rank": 2}, 1e-3)
    assert len(done) == 9, "another setting is another training"


def test_a_training_depends_on_its_seed_and_each_loss_is_that_of_its_rows(monkeypatch):
    looked_at = []

    def look(model, source, rows):
        looked_at.append(rows)
        return held_out_loss(model, source, rows)

    monkeypatch.setattr(training, "held_out_loss", look)
    runs = Runs(
        dataclasses.replace(TINY, seeds=(0, 1), train=(12,), held_out=(7,), steps=(2,), rows=(4,), runs="")
    )
    first, second = runs.at_rate("letters", "lora", {"rank": 2}, 1e-2)
    assert first.losses[0] != second.losses[0] and first.held_out != second.held_out, (
        "another seed has other rows and another A"
    )
    assert runs.at_rate("letters", "lora", {"rank": 2}, 1e-2) == [first, second]
    rows = runs.tasks["letters"]
    assert [len(documents) for documents in looked_at] == [7, 7] * 2
    assert looked_at[0].items is rows.held_out.items, "the first look is at what was not trained on"
    assert [row.ids.tolist() for row in looked_at[1]] == [row.ids.tolist() for row in rows.train.items[:7]]
    assert first.held_out != first.seen


def test_the_first_of_two_numbers_is_for_text_and_the_last_for_answers():
    assert [Runs.own((100, 600), name) for name in ("shakespeare", "gsm8k", "digits", "letters")] == [
        100,
        100,
        600,
        600,
    ]
    assert Runs.own((5,), "gsm8k") == Runs.own((5,), "digits") == 5


def test_right_answers_are_those_of_greedy_generation():
    pairs = []
    for i, row in enumerate(task.rows("reverse", 24, 5)):
        question, answer = (message["content"] for message in row["messages"][:2])
        start = f"User: {question}\n\nAssistant: ".encode()
        pairs.append(([*start, *(answer if i % 3 else answer[::-1]).encode(), 0], len(start)))
    model = RWKV.load(ROOT / "demo/rwkv7-reverse.pth", torch.float32)
    answers, tokens = 0, []
    with torch.no_grad():
        for ids, given in pairs:
            made = ids[:given]
            for _ in range(len(ids) - given):
                made = [*made, int(model(torch.tensor([made]))[0][0, -1].argmax())]
            answers += made == ids
            tokens += (
                model(torch.tensor([ids[:-1]]))[0][0, given - 1 :].argmax(-1) == torch.tensor(ids[given:])
            ).tolist()
    shares = right(model, from_pairs(pairs))
    assert shares == (pytest.approx(sum(tokens) / len(tokens)), pytest.approx(answers / len(pairs)))
    assert 0.3 < shares[1] < 0.8


@pytest.mark.parametrize("names", [("lora", "miss", "miss, balanced", "pissa")])
def test_what_is_compared_has_equal_parameters(names):
    base = ROOT / "demo/rwkv7-reverse.pth"
    arch = load_task("letters", "", 3, 3, 0).arch
    counts = set()
    for name in names:
        method, options = loss_curves.system(name, 4)
        config = Config(load_model=str(base), peft=method, peft_config=options, grad_cp=0)
        model = build_model(config, arch, "torch", torch.float32)
        counts.add(sum(p.numel() for p in model.parameters() if p.requires_grad))
    assert len(counts) == 1


def test_the_real_tasks(data_dir):
    for name, width in (("shakespeare", 128), ("gsm8k", 128), ("digits", 31)):
        found = load_task(name, str(data_dir), 300, 50, 64)
        assert found.width <= width and found.answers == (name == "digits")
        train, held_out = (
            {tuple(row.ids.tolist()) for row in rows} for rows in (found.train, found.held_out)
        )
        assert len(held_out) == 50 and not train & held_out
        if name != "digits":
            assert all(not row.ids[0] and row.weights[1:].all() for row in found.held_out), (
                "rows begin with the second byte of a character"
            )
    loss, tokens, answers = untouched(found)
    assert loss > 5 and answers == 0 and 0.02 < tokens < 0.15, "the base reverses, and does not add 1"


def test_a_method_that_does_not_fit_a_model_is_left_out_and_said(data_dir):
    settings = dataclasses.replace(TINY, tasks=("digits",), data=str(data_dir), systems=("dora", "miss"))
    result = loss_curves.run(settings)
    assert "Not dora: blocks.1.att.output: 32 rows of the weight are zero" in result.tables[0].caption
    assert [row[0] for row in result.tables[0].rows] == ["untouched", "miss"]


def test_absent_files_and_unknown_tasks_are_said(tmp_path):
    with pytest.raises(UserError, match="needs real/rwkv7-reverse.pth in --data .*--tasks letters"):
        Runs(dataclasses.replace(Settings(), tasks=("digits",), data=str(tmp_path)))
    with pytest.raises(UserError, match="there are: shakespeare, gsm8k, digits, letters"):
        Runs(dataclasses.replace(Settings(), tasks=("sums",)))


def look(accuracy, kl, loss=1.0):
    return forgetting.Look(0, loss, accuracy, 2 * kl, 1.0, kl)


def path(*points, after=()):
    return forgetting.Outcome(1, [look(*point) for point in points], dict(after), 1.0)


def test_forgetting_is_read_where_an_accuracy_is_first_reached():
    looks = path((0.1, 0.0), (0.5, 1.0), (0.3, 5.0), (0.8, 3.0)).looks
    found = [forgetting.at_gain(looks, accuracy, "accuracy", "kl") for accuracy in (0.2, 0.5, 0.6, 0.9)]
    assert found == [pytest.approx(0.25), 1.0, pytest.approx(3.8), None]
    assert forgetting.at_gain(looks, 0.2, "accuracy", "other_loss") == pytest.approx(0.5)
    falling = [dataclasses.replace(one, loss=loss) for one, loss in zip(looks, (2.0, 1.5, 1.0, 0.5))]
    assert forgetting.at_gain(falling, -1.25, "loss", "kl") == pytest.approx(3.0)


def test_the_page_of_forgetting_says_what_its_looks_do():
    """MiSS gets to 0.8 right, the others to 0.7: the gain that all reach is 0.4, from 0.3."""

    def seeds(kl, reached=0.7):
        return [path((0.3, 0.0), (reached, kl + d)) for d in (0.0, 0.02, -0.02)]

    trained = {
        "miss": {0.5: seeds(1.0), 1.0: seeds(1.0, 0.8), 2.0: seeds(2.0)},
        "lora": {0.5: seeds(0.6), 1.0: seeds(0.6), 2.0: seeds(0.6)},
        "bat": {0.5: seeds(0.5, 0.4), 1.0: seeds(0.61), 2.0: seeds(0.4)},
    }
    quantised = {"merged": look(0.8, 1.0), "int8": look(0.8, 1.0), "nf4": look(0.6, 1.0, 1.02)}
    trained["miss"][1.0] = [dataclasses.replace(o, after=quantised) for o in trained["miss"][1.0]]
    on_nf4 = {"nf4": [path((0.3, 0.0), (0.7, 1.0), after={"merged": look(0.5, 1.0)})] * 3}
    rates, base = {"miss": 0.01, "lora": 0.02, "bat": 0.01}, look(0.3, 0.0)
    found = forgetting.Found(base, rates, trained, seeds(3.0), on_nf4, {"nf4": look(0.2, 0.5)}, "accuracy")
    assert found.gains == [pytest.approx(0.5), pytest.approx(0.66)]
    said = forgetting.claims({"letters": found}, 3)
    assert [claim.agrees for claim in said] == [True, *[None] * 5, True]
    assert "MiSS has KL 3.0000 ± 0.0200, above LoRA's 0.6000 ± 0.0200" in said[0].ours
    # the KL rises on a straight line: at 66 % of right answers 0.9 of LoRA's is there, 0.72 of MiSS's
    assert said[2].ours == (
        "letters, where each has 66.0% right: lora (0.02) has the lowest KL, 0.5400 ± 0.0180, level with bat"
        " (0.01) with 0.5490 ± 0.0180, below miss (0.01) with 0.7200 ± 0.0144"
    )
    assert forgetting.in_short("letters", found, 3) == (
        "on letters lora and bat (KL 0.540, 0.549) forget less than miss (KL 0.720)"
    )
    assert "each at the best of its three rates" in said[4].paper
    assert said[4].ours.endswith(
        "bat (0.02) has the lowest KL, 0.3600 ± 0.0180, below lora (0.01) with 0.5400 ± 0.0180, below miss"
        " (0.01) with 0.7200 ± 0.0144"
    )
    assert said[5].ours.endswith("against its double: below it with miss, level with it with lora")
    assert "80.0% ± 0.0% right in fp32; that model, quantised to nf4, loses 20.0% ± 0.0%" in said[6].ours
    assert said[6].ours.endswith("(loss +2.0%); one trained on nf4 and merged into fp32 has 50.0% ± 0.0%")
    at_gain = {tuple(row[:2]): row[2:4] for row in forgetting.table_at_gain("letters", found).rows}
    assert at_gain["bat", "0.005"] == ["-", "-"], "no seed gets that far"
    assert at_gain["miss, LoRA's rate", "0.02"] == ["1.5000 ± 0.0100", "2.7000 ± 0.0180"]
    shown = forgetting.quantised_table({"letters": found}).records()[1]
    assert list(shown.values())[1:] == [
        *("nf4", "100.0%", "1.0000"),
        *("70.0% ± 0.0%", "1.0000", "50.0% ± 0.0%", "1.0000", "60.0% ± 0.0%", "1.0200"),
    ]


def test_a_look_counts_right_answers_and_characters():
    exam = forgetting.Trainings(forgetting.TINY).exams["letters"]
    rows = exam.other
    loss, answers, logits = forgetting.answered(exam.base, rows, True)
    assert (answers, loss) == (right(exam.base, rows)[1], pytest.approx(exam.before.other_loss, abs=1e-5))
    assert exam.before.kl == 0 and exam.before.accuracy < answers
    asked = exam.task.held_out  # the base gets the letters wrong, and the end, 0, right
    batch = collate([[row] for row in asked], 1)
    hits = forgetting.answered(exam.base, asked, True)[2].argmax(-1) == batch.targets
    letters = hits[batch.targets != 0].double().mean()
    assert forgetting.answered(exam.base, asked, False)[1] == pytest.approx(float(letters))
    assert letters != pytest.approx(float(hits.double().mean()))
    noisy = copy.deepcopy(exam.base)
    with torch.no_grad():
        noisy.head.weight.mul_(1.1)
    p, q = (torch.log_softmax(x.double(), -1) for x in (logits, forgetting.answered(noisy, rows, True)[2]))
    assert exam.look(noisy, 1).kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), abs=1e-5)
