"""The paper's experiments in their tiny settings: every one writes its three files; what each promises about
its numbers.
"""

import copy
import dataclasses
import json
import re

import pytest
import torch

import rwkv_miss
from benchmarks.paper import resources, training, training_tasks
from benchmarks.paper.__main__ import EXPERIMENTS, experiment, main
from benchmarks.paper.methods import LINEAR, systems
from benchmarks.paper.metrics import median_and_interval
from benchmarks.paper.page import renewed
from benchmarks.paper.settings import command
from rwkv_miss.adapter import adapted_linears
from rwkv_miss.functional import shard_sum

from .conftest import ROOT

pytestmark = pytest.mark.rare

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """outcome(name) -> what the JSON files hold after a tiny run, which is made once for the tests here."""
    made = {}

    def run(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            main([name, "--tiny", "--out", str(made[name])])
        found = json.loads((made[name] / f"{name}.json").read_text())
        for figures in made[name].glob("*-figures.json"):
            found |= json.loads(figures.read_text())
        return found, made[name]

    return run


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_writes_its_table_plot_and_figures(name, outcome):
    found, folder = outcome(name)
    names = {path.name for path in folder.iterdir()} - {f"{name}-figures.json"}
    assert names == {f"{name}.json", f"{name}.md", f"{name}.png"}
    assert (folder / f"{name}.png").read_bytes().startswith(PNG)
    assert found["experiment"] == name and found["commit"]
    assert found["command"] == f"python -m benchmarks.paper {name} --tiny"
    text = (folder / f"{name}.md").read_text()
    assert found["command"] in text and found["claims"]
    shown = [
        [line.strip("| ").split(" | ") for line in block.splitlines()]
        for block in re.findall(r"(?:^\|.*\n)+", text, re.M)
    ]
    assert len(shown) == 1 + len(found["tables"])
    for lines, records in zip(shown, [found["claims"], *found["tables"].values()]):
        assert len(lines) == 2 + len(records) and len(records) > 0
        assert lines[0] == (["paper", "here", "agrees"] if records is found["claims"] else list(records[0]))
        assert [line[0] for line in lines[2:]] == [str(next(iter(record.values()))) for record in records]


def test_the_list_and_the_mistakes(tmp_path, capsys):
    main([])
    listed = capsys.readouterr().out
    assert all(re.search(rf"^{name} +\S", listed, re.M) for name in EXPERIMENTS)
    for argv, message in (
        ([EXPERIMENTS[0], "--tinny"], "did you mean --tiny"),
        (["complexty"], "invalid choice"),
        ([EXPERIMENTS[0], "--out", str(tmp_path / "file" / "x")], "can't be a folder"),
    ):
        (tmp_path / "file").touch()
        with pytest.raises(rwkv_miss.UserError, match=message):
            main(argv)


def test_the_page_of_results_says_what_the_results_say():
    results = ROOT / "docs/results"
    assert renewed(results) == (results / "README.md").read_text(encoding="utf-8"), (
        "run python -m benchmarks.paper.page"
    )


def test_the_recorded_command_gives_the_same_settings():
    module = experiment("complexity")
    assert (
        command("complexity", module.FULL, module.FULL, module.TINY)
        == "python -m benchmarks.paper complexity"
    )
    assert command("complexity", module.Settings(("1,2,3,1", "5,6,7,1")), module.FULL, module.TINY).endswith(
        "complexity --shapes 1,2,3,1 5,6,7,1"
    )


def test_complexity_counts_what_the_formulas_say(outcome):
    found, _ = outcome("complexity")
    (rows,) = found["tables"].values()
    assert set(LINEAR) <= {row["system"] for row in rows}
    for row in rows:
        # a new method has its line in complexity.FORMULAS
        counted = [row[name] for name in ("parameters", "MFLOP", "saved KiB")]
        assert counted == [row[name] for name in ("by formula", "MFLOP by formula", "KiB by formula")], row[
            "system"
        ]
    # LoRA's 4 (48 + 40), to the nearest
    assert [(row["rank"], row["parameters"]) for row in rows if row["system"] == "miss"] == [(9, 9 * 40)]


def test_no_free_lunch_finds_what_does_not_depend_on_the_seed(outcome):
    found, _ = outcome("no-free-lunch")
    losses, readings, timing = found["tables"].values()
    assert [row["data"] for row in readings] == ["rep", "elem"]
    assert set(LINEAR) <= {row["system"] for row in losses}
    fixed = {row["system"]: row["lr 0.001 (paper)"] for row in losses}
    (unadapted,) = (
        float(claim["ours"].split()[-1])
        for claim in found["claims"]
        if claim["paper"] == "full fine-tuning is best"
    )
    verdicts = {claim["paper"]: claim["agrees"] for claim in found["claims"]}
    own = {row["system"]: row["best lr"] for row in losses}
    assert verdicts["full fine-tuning is best"] == (min(fixed, key=fixed.get) == "full")
    at_own = next(agrees for paper, agrees in verdicts.items() if "each at its own best rate" in paper)
    assert at_own == (min(own, key=own.get) == "full")
    # AdaLoRA has hardly begun at this rate
    assert min(fixed, key=fixed.get) == "full" and max(fixed.values()) < 1.01 * unadapted
    assert max(row["best lr"] for row in losses) < 0.9 * unadapted
    assert 0.5 < fixed["miss"] / fixed["lora, alpha = r"] < 2
    assert fixed["lora_fa"] > 2 * fixed["miss"]  # MiSS with a frozen random matrix for its shards
    assert {
        (row["method"], row["parameters"]) for row in timing if row["method"] in ("full", "miss", "lora")
    } == {("full", 64 * 64), ("miss", 2 * 64), ("lora", 2 * 64)}
    curves = found["curves"]["miss"]
    assert len(curves["training"]) == len(curves["validation"]) == 100
    assert curves["training"][-1] < 0.5 * curves["training"][0]


def test_the_page_of_no_free_lunch_says_what_its_table_does():
    """Means within two standard errors are level, as on the other pages."""
    found = json.loads((ROOT / "docs/results/no-free-lunch.json").read_text(encoding="utf-8"))
    recorded = {claim["paper"]: claim for claim in found["claims"]}
    rows = {row["system"]: row for row in next(iter(found["tables"].values()))}
    fixed, own = (
        {system: training.Spread(row[mean], row[sd]) for system, row in rows.items()}
        for mean, sd in (("lr 0.001 (paper)", "sd"), ("best lr", "sd at best"))
    )
    unadapted = float(recorded["full fine-tuning is best"]["ours"].split()[-1])
    said = experiment("no-free-lunch").claims(fixed, own, len(found["settings"]["seeds"]), unadapted, 1e-3)
    for claim in said:
        assert dataclasses.asdict(claim) == recorded[claim.paper]
    assert said[1].ours == "full has 0.0010 ± 0.0015, level with lora (0.0009 ± 0.0004)"
    assert said[1].agrees is None and "0.28 with each at its best lr (below it)" in said[3].ours


@pytest.mark.parametrize("reading, distinct", [("lift", 1), ("rep", 1), ("elem", 64)])
def test_the_readings_of_the_papers_data(reading, distinct):
    problem = experiment("no-free-lunch").Problem.make(reading, 50, 43)
    assert problem.x.shape == problem.t.shape == (50, 64) and problem.x_validation.shape == (200, 64)
    assert len(problem.t[0].unique()) == distinct
    assert len(problem.x[0].unique()) == (1 if reading == "rep" else 64)


@pytest.fixture(scope="module")
def demo_gradients():
    """The demo's task, with the gradients of its linears."""
    task = experiment("grad-norm").tasks.make("demo", "")
    return task, experiment("grad-norm").weight_gradients(task)


@pytest.mark.parametrize("label", systems(3, 96, 96))
def test_one_backward_gives_the_first_gradient_of_every_method(label, demo_gradients):
    task, gradients = demo_gradients
    method, options = systems(3, 96, 96)[label]
    torch.manual_seed(0)
    first = experiment("grad-norm").first_gradient(task.model, gradients, method, options)
    torch.manual_seed(0)
    model = copy.deepcopy(task.model)
    rwkv_miss.inject(model, method, **options)
    task.loss(model).backward()
    norms = {
        name: (
            sum(float(p.grad.square().sum()) for p in layer.parameters(recurse=False) if p.grad is not None)
            ** 0.5
        )
        for name, layer in adapted_linears(model).items()
    }
    # fp32 on both sides, by different products: 1e-6 to 1e-5 was seen
    assert first.by_linear == pytest.approx(norms, rel=1e-4)
    assert first.norm == pytest.approx(
        sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None) ** 0.5, rel=1e-4
    )


def test_the_first_gradient_by_the_papers_formulas(demo_gradients):
    """MiSS: the shard sums of G. LoRA: s G A^T. Their first SGD steps: minus the sums, spread again; minus
    s^2 G A^T A.
    """
    task, gradients = demo_gradients
    find = experiment("grad-norm").first_gradient
    folded = {name: shard_sum(g, 5) for name, g in gradients.items()}
    first = find(task.model, gradients, "miss", {"rank": 5})
    assert first.by_linear == pytest.approx({name: float(f.norm()) for name, f in folded.items()}, rel=1e-5)
    moved = {name: f[:, torch.arange(gradients[name].shape[1]) % 5] for name, f in folded.items()}
    assert first.cosine == pytest.approx(_cosine(moved, gradients), rel=1e-4)
    torch.manual_seed(0)
    first = find(task.model, gradients, "lora", {"rank": 3})
    torch.manual_seed(0)
    model = copy.deepcopy(task.model)
    rwkv_miss.inject(model, "lora", rank=3)
    A = {name: layer.lora_A.detach() for name, layer in adapted_linears(model).items()}
    assert first.by_linear == pytest.approx(
        {name: float(2 * (g @ A[name].t()).norm()) for name, g in gradients.items()}, rel=1e-5
    )
    assert first.cosine == pytest.approx(
        _cosine({name: g @ A[name].t() @ A[name] for name, g in gradients.items()}, gradients), rel=1e-4
    )


def _cosine(a, b):
    a, b = (torch.cat([t[name].flatten() for name in b]) for t in (a, b))
    return float(a @ b / a.norm() / b.norm())


def test_miss_has_full_fine_tunings_norm_whatever_the_gradient(outcome):
    found, _ = outcome("grad-norm")
    norms, cosines, _ = found["tables"].values()
    ratios = {row["gradients"]: row["miss"] for row in norms}
    assert set(LINEAR) <= set(norms[0])
    assert set(ratios) == {
        f"{name}, r = {r}" for name in ("demo", "random", "random, relu^2") for r in (3, 16)
    }
    assert ratios["random, r = 3"] == pytest.approx(1, abs=0.02)
    assert ratios["random, r = 16"] == pytest.approx(1, abs=0.02)
    assert ratios["random, relu^2, r = 3"] > 2, "the mean of the inputs adds up in the shards"


def test_nlu_classifies_held_out_sentences(outcome):
    found, _ = outcome("nlu")
    settings = experiment("nlu").TINY
    assert [measured["method"] for measured in found["outcomes"]] == list(settings.methods)
    for measured in found["outcomes"]:
        assert len(measured["scores"]["accuracy"]) == settings.seeds
        # guessing gets 50 of 100 sentences right, with a standard deviation of 5; over eight runs of each
        # method 91 was the least
        assert min(measured["scores"]["accuracy"]) > 0.8, measured


def test_resources_compares_equal_parameters(outcome):
    found, _ = outcome("resources")
    (rows,) = found["tables"].values()
    assert [row["method"] for row in rows] == list(experiment("resources").TINY.methods)
    assert len({row["parameters"] for row in rows}) == 1
    assert all(row["tokens/s"] > 0 and row["above weights MB"] > 0 for row in rows)
    assert [
        (round(row["the paper's"], 2), round(row["the paper's peak / lora"], 3))
        for row in rows
        if row["method"] == "miss"
    ] == [(1.10, 0.915)]


def test_a_stopped_experiment_goes_on_and_never_takes_what_was_measured_otherwise(tmp_path, monkeypatch):
    trained = []

    def fake(run, task):
        trained.append((run.lr, run.seed, run.steps))
        return training.Outcome(1, [2.0], float(run.seed), None, None, None, 0.0)

    monkeypatch.setattr(training, "_train", fake)
    sizes = dict(seeds=(0, 1), steps=(2,), rows=(4,), train=(12,), held_out=(5,), rank=(4,))
    runs = str(tmp_path / "a" / "runs.jsonl")
    settings = experiment("loss-curves").Settings(tasks=("letters",), **sizes, runs=runs)

    def losses(**changed):
        trained.clear()
        runs = training.Runs(dataclasses.replace(settings, **changed))
        return [outcome.held_out for outcome in runs.at_rate("letters", "miss", {"rank": 8}, 1e-3)], len(
            trained
        )

    assert losses() == ([0.0, 1.0], 2)
    assert losses() == ([0.0, 1.0], 0)
    path = tmp_path / "a" / "runs.jsonl"
    path.write_text(path.read_text()[:-9])  # killed in the middle of a line
    assert losses() == ([0.0, 1.0], 1) and losses() == ([0.0, 1.0], 0)
    assert losses(seeds=(1, 2)) == ([1.0, 2.0], 1)
    assert losses(steps=(3,)) == ([0.0, 1.0], 2) and losses(held_out=(6,)) == ([0.0, 1.0], 2)
    sort = training_tasks.sorting
    monkeypatch.setitem(
        training_tasks.ANSWERS,
        "letters",
        (training_tasks.ANSWERS["letters"][0], lambda count, seed: sort(count, seed + 7)),
    )
    assert losses() == ([0.0, 1.0], 2), "other rows"


def test_losses_are_level_within_two_standard_errors_and_finite_ones_are_below():
    module = experiment("loss-curves")

    def outcomes(*losses):
        return [module.Outcome(1, [], loss, None, None, None, 0.0) for loss in losses]

    assert module.below(outcomes(1.0, 1.1, 0.9), outcomes(2.0, 2.1, 1.9)) is True
    assert module.below(outcomes(2.0, 2.1, 1.9), outcomes(1.0, 1.1, 0.9)) is False
    # 0.1 apart, two standard errors are 0.163
    assert module.below(outcomes(1.0, 1.1, 0.9), outcomes(1.1, 1.2, 1.0)) is None
    assert module.below(outcomes(1.0), outcomes(1.1)) is True
    diverged = outcomes(1.0, None)
    assert module.below(outcomes(9.0, 9.0), diverged) is True
    assert module.below(diverged, outcomes(9.0, 9.0)) is False
    assert module.below(diverged, diverged) is None


def test_verdicts_of_resources_ask_for_half_of_the_papers_gain():
    """By the whole interval: 1.051 is asked for."""
    lora = resources.Row(1, 1.0, 400, 600)
    for speed, above, agrees in (
        ((1.06, 1.055, 1.07), 550, [True, True]),
        ((1.054, 1.045, 1.06), 550, [None, True]),
        ((1.054, 1.052, 1.06), 570, [True, False]),
        ((1.04, 1.03, 1.05), 570, [False, False]),
    ):
        rows = {"miss": resources.Row(1, 1.0, 400, above), "lora": lora}
        found = resources.claims(rows, {"lora": speed}, resources.TINY)
        assert [claim.agrees for claim in found] == agrees
        assert f"{speed[0]:.3f} times (95 % interval {speed[1]:.3f} to {speed[2]:.3f})" in found[0].ours
        assert ("open" in found[0].ours) == (agrees[0] is None)


def test_the_interval_of_a_median_holds_it_19_times_of_20():
    assert median_and_interval([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0)
    assert median_and_interval(range(1, 8)) == (4, 1, 7) and median_and_interval(range(1, 16)) == (8, 4, 12)
    samples = torch.randn(4000, 15, generator=torch.Generator().manual_seed(0)).exp()  # their median is 1
    held = sum(low <= 1 <= high for _, low, high in map(median_and_interval, samples.tolist()))
    assert 0.955 < held / len(samples) < 0.975  # 0.965 by the binomial distribution


@pytest.mark.parametrize(
    "argv, message",
    [
        (["loss-curves", "--systems", "full", "mis"], "--systems takes any of: full; .*got full; mis"),
        (["loss-curves", "--steps", "0"], "--steps 0: must be at least 1"),
        (["loss-curves", "--tasks", "letter"], "task 'letter' is unknown"),
        (
            ["loss-curves", "--tasks", "gsm8k", "--data", "nowhere"],
            "task gsm8k needs real/rwkv6-3m-utf16.pth in --data nowhere",
        ),
        (["rank", "--ranks", "4", "7"], "--ranks 4 7: must be even"),
        (["rank", "--ranks", "128"], "one at least 96 or less"),
        (["forgetting", "--methods", "mis"], "--methods takes any of: .* miss .*; got mis"),
        (["forgetting", "--quant", "int4"], "--quant takes any of: int8 nf4; got int4"),
    ],
)
def test_trainings_are_refused_before_the_first(argv, message, tmp_path):
    with pytest.raises(rwkv_miss.UserError, match=message):
        main([argv[0], "--tiny", *argv[1:], "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--methods", "miss", "lroa"], "takes miss, lora and any of: .*; got miss lroa"),
        (["--model", "gpt"], "rwkv6-3b"),
        (["--device", "tpu"], "can't be used here; cpu can"),
    ],
)
def test_resources_refuses_before_it_builds(argv, message, tmp_path):
    with pytest.raises(rwkv_miss.UserError, match=message):
        main(["resources", *argv, "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())
