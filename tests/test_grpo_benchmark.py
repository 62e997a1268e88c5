"""Questions, table and summary of benchmarks.grpo."""

from benchmarks import grpo
from benchmarks.experiment import Lines, Ran
from benchmarks.grpo import CASES, draw, summary, table

from .conftest import write_rows


def test_what_judges_is_not_trained_on(tmp_path):
    trainings = grpo.Trainings(tmp_path)
    parts = (trainings.test, trainings.valid, trainings.train, trainings.start_rows)
    asked = [{row["question"] for row in part} for part in parts]
    assert not asked[0] & asked[1] and not (asked[0] | asked[1]) & (asked[2] | asked[3])
    # every training reads each of its prompts once
    assert [len(part) for part in parts] == [300, 100, 300 * 16, 25 * 32]
    for row in trainings.test:
        assert row["answer"] == "".join(sorted(row["question"].removeprefix("sort ")))
    assert len((tmp_path / "train.jsonl").read_text().splitlines()) == 4800


def test_a_line_is_made_once(tmp_path):
    path, made = tmp_path / "lines.jsonl", []
    for _ in range(2):
        lines = Lines(path, "case", "seed")
        for seed in (0, 1, 0):
            key = {"case": "exact", "seed": seed}
            assert lines.of(key, lambda seed=seed: made.append(seed) or {"right": seed}) == {
                **key,
                "right": seed,
            }
    assert made == [0, 1] and {"case": "exact", "seed": 2} not in lines


def test_a_curve_has_the_means_of_ten_steps(tmp_path):
    steps = [
        dict(draw_seconds=9.0 if i == 0 else 1.0, seconds=90.0 if i == 0 else 4.0, entropy=i, reward=1.0)
        for i in range(20)
    ]
    steps[3]["entropy"] = None  # a step may lack a figure
    write_rows(tmp_path / "metrics.jsonl", steps)
    assert grpo.of_steps(Ran(tmp_path, 1.0)) == {
        "drawing": 0.25,
        "curves": {"reward": [1.0, 1.0], "entropy": [4.6666666667, 14.5]},
    }


def line(case, seed, greedy, cpu_seconds=90.0, drawing=0.4):
    curves = {name: [0.5, 0.1 * (seed + 1)] for name in grpo.SHOWN}
    own = {"case": case, "seed": seed, "greedy": greedy, "drawn": greedy / 2}
    if case == "start":
        return own
    own |= {"rate": 0.003, "steps": 20, "cpu_seconds": cpu_seconds}
    return own if case == "supervised" else own | {"drawing": drawing, "curves": curves}


def test_a_target_is_met_where_every_seed_reaches_it():
    lines = [
        line("start", 0, 0.49),
        line("rewards", 0, 0.8, cpu_seconds=121),
        line("rewards", 1, 0.9),
        line("exact", 0, 0.1, drawing=0.9),
        line("supervised", 0, 0.85),
    ]
    assert summary(lines) == {
        "met": ["right answers (2 of 2 seeds)", "drawing (2 of 2 seeds)"],
        "missed": ["CPU time (1 of 2 seeds)"],
    }
    assert summary(lines[:1]) == {"met": [], "missed": []}
    found = table(lines).records()
    assert [row["case"] for row in found] == ["start", "rewards", "exact", "supervised"]
    assert found[1]["greedy"] == "85.0 % (80 to 90)" and found[1]["dead groups"] == "15 %"
    assert found[0]["CPU s"] == "" and found[3]["CPU s"] == "90" and found[3]["entropy"] == ""
    assert found[1]["largest gap"] == "5e-01"
    from matplotlib.figure import Figure

    figure = Figure()
    draw(lines)(figure)
    assert len(figure.axes) == 4 and len(figure.axes[0].get_xticks()) == 4
    assert [len(axes.lines) for axes in figure.axes[1:]] == [3, 3, 3], "a curve for each training on rewards"


def test_every_case_is_a_run():
    assert CASES["rewards"].flags == "--loss grpo --rewards exact=1,partial=1 --lr_init 0.003".split()
    assert CASES["supervised"].flags == ["--packing", "0", "--lr_init", "0.003"]
    assert CASES["supervised, found rate"].flags == ["--packing", "0"]
