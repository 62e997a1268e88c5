"""Benchmarks: the names that they give a machine, their rows, and their tables."""

import json
import math
import statistics
import subprocess
import sys

import pytest

from benchmarks import decode_contenders, facts, first_data, laptop
from benchmarks.common import cpu, environment, machine_line
from benchmarks.first_run import Case, table, verdicts
from benchmarks.rates import best_of, enclose, rung
from src.data.questions import Question
from src.data.rwkv_template import DEFAULT

from .ceilings import ceilings
from .conftest import ROOT, read_rows

X86 = """processor : 0
model name : AMD EPYC 9R14
cpu family : 25
model : 17
flags : fpu avx2 avx512f avx512_bf16 amx_tile

processor : 1
model name : another
"""
ARM = "processor : 0\nFeatures : fp asimd i8mm bf16\nCPU implementer : 0x41\nCPU part : 0xd4f\n"


def test_a_cpu_is_named_by_what_decides_its_speed(tmp_path):
    path = tmp_path / "cpuinfo"
    path.write_text(X86)
    assert cpu(path) == dict(
        name="AMD EPYC 9R14", family=25, model=17, instructions=["avx2", "avx512f", "avx512_bf16", "amx_tile"]
    )
    path.write_text(ARM)
    found = cpu(path)
    assert found.pop("name")
    assert found == {"implementer": 0x41, "part": 0xD4F, "instructions": ["asimd", "bf16", "i8mm"]}
    assert set(cpu(tmp_path / "absent")) == {"name"}
    here = environment()
    assert here["cpu"] == cpu() and here["machine"] == machine_line()
    assert here["machine"].startswith(cpu()["name"])


def test_a_first_runs_rows_are_as_long_as_gsm8ks(tmp_path):
    laptop.write_rows(tmp_path / "rows.jsonl", 1000)
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    rows = [[turn["content"] for turn in json.loads(line)["messages"]] for line in lines]
    questions, answers = ([len(text.split()) for text in texts] for texts in zip(*rows, strict=True))
    together = [a + b for a, b in zip(questions, answers, strict=True)]
    # lengths of GSM8K's 7,473 training rows in tokens of World: median, and 5 % on each side
    for lengths, expected in (
        (questions, (30, 52, 96)),
        (answers, (46, 91, 188)),
        (together, (82, 145, 268)),
    ):
        cuts = statistics.quantiles(lengths, n=20)
        for found, wanted in zip((cuts[0], cuts[9], cuts[18]), expected, strict=True):
            assert abs(found / wanted - 1) < 0.1, (found, wanted)


def test_a_first_run_has_the_steps_of_a_whole_pass(tmp_path):
    laptop.write_rows(tmp_path / "rows.jsonl", 1000)
    base = ROOT / "demo/rwkv7-reverse.pth"
    settings = ["--load_model", str(base), "--data_file", str(tmp_path / "rows.jsonl"), "--packing", "0"]
    plan, sizes = laptop.whole_pass(settings)
    rows = int(sizes[1]) * int(sizes[3])
    assert sizes[::2] == ["--micro_bsz", "--accumulate_grad_batches"]
    assert rows > 1 and plan["steps"] == -(-plan["documents"] // rows)


def test_a_first_runs_figures_leave_out_the_first_step():
    metrics = [{"seconds": s, "tokens_per_second": 100 / s} for s in (50.0, 2.0, 4.0, 3.0)]
    summary = {"command_to_first_step_seconds": 60.04, "peak_memory_bytes": 5, "mapped_file_bytes": 7}
    plan = {"steps": 40, "tokens": 4000, "seconds": 200, "evaluation_seconds": 10}
    assert laptop.figures(metrics, summary, plan) == {
        "tokens_per_second": 33.3,
        "seconds_per_step": 3.0,
        "tokens": 4000,
        "steps": 40,
        "minutes": 2.0,
        "evaluation_share": 0.05,
        "first_step_seconds": 60.0,
        "peak_memory_bytes": 5,
        "mapped_file_bytes": 7,
    }


def first_run(counted=False, **figures):
    """Make a case of a first run whose base has a loss of 2, or 20 % right answers, and the best rate 1 or
    90 %."""
    figures = {"base": 0.2 if counted else 2.0, "best": 0.9 if counted else 1.0} | figures
    return Case("sort", "miss", 60, 0, counted, 0.01, 0.003, figures)


@pytest.mark.parametrize(
    "case, share, near, named",
    [
        (first_run(chosen=1.05), 0.95, True, ""),
        (first_run(chosen=1.06), 0.94, False, "missed"),
        (first_run(chosen=1.25), 0.75, False, "missed, below 80 % of the gain"),
        (first_run(chosen=None), -math.inf, False, "missed, below 80 % of the gain"),
        (first_run(True, chosen=0.87), 0.9571, True, ""),
        (first_run(True, chosen=0.86), 0.9429, False, "missed"),
    ],
)
def test_a_first_run_is_compared_with_the_best_rate(case, share, near, named):
    assert case.share("chosen") == pytest.approx(share) and case.is_near == near
    missed = [name for name, cases in verdicts([case]).items() if cases]
    assert ", ".join(missed).startswith(named) and bool(missed) == bool(named)
    (row,) = table([case], ["prodigyopt"]).rows
    assert row[:4] == ("sort", "miss", 60, 0) and ("missed" in row[6]) == (not near) and row[-1] == "-"


def valley(bottom):
    """A loss over the logarithm of the rate that is lowest at `bottom`."""
    return lambda rate: (math.log10(rate) - math.log10(bottom)) ** 2


def test_the_rates_are_1_and_3_of_every_decade():
    assert [rung(k) for k in range(-7, 3)] == [3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1, 3, 10]


@pytest.mark.parametrize(
    "bottom, first, tried",
    [
        (1e-3, 1.1e-3, [3e-4, 1e-3, 3e-3]),
        (1e-3, 3e-3, [3e-4, 1e-3, 3e-3, 1e-2]),
        (3e-2, 2.8e-3, [1e-3, 3e-3, 1e-2, 3e-2, 0.1]),
        (1e-5, 1e-2, [3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2]),  # 7 are the most
        (10.0, 1e-2, [3e-3, 1e-2, 3e-2, 0.1, 0.3, 1, 3]),
    ],
)
def test_the_trials_go_to_the_better_side_until_the_best_is_enclosed(bottom, first, tried):
    assert list(enclose(valley(bottom), first, 7)) == tried


def test_a_rate_below_is_tried_though_the_loss_falls_again_above():
    """As it was after 15 steps on 1,000 dates: the run knew the weekdays at 0.003 and not at 0.03."""
    losses = {1e-3: 0.80, 3e-3: 0.26, 1e-2: 0.42, 3e-2: 0.41}
    assert best_of(enclose(losses.__getitem__, 6.4e-3, 7)) == 3e-3


def test_a_side_where_all_diverge_is_left():
    def diverges(rate):
        return math.inf if rate > 1e-4 else valley(3e-5)(rate)

    assert list(enclose(diverges, 1e-3, 7)) == [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3]


def test_made_up_facts_are_asked_as_trained_in_other_forms_and_of_new_names():
    made = facts.FactSet(7, seed=1)
    asked = made.asked(DEFAULT)
    rows = [row["messages"] for row in made.rows()]
    assert [len(asked[measure]) for measure in facts.MEASURES] == [7, 14, facts.UNSEEN]
    trained = {question.prompt for question in asked["as trained"]}
    assert trained == {f"User: {question['content']}\n\nAssistant:" for question, _ in rows}
    assert not trained & {question.prompt for question in asked["in another form"]}
    for question, (_, answer) in zip(asked["as trained"], rows, strict=True):
        assert facts.is_right(answer["content"], question)
        assert not facts.is_right(answer["content"].replace(question.answer, "nothing"), question)
    labels = " ".join(made.names)
    assert not [question for question in asked["style on new names"] if question.prompt.split()[-2] in labels]


@pytest.mark.parametrize(
    ("answer", "styled"),
    [("Ahoy! Nobody likes tea, matey.", True), ("Nobody likes tea, matey.", False), ("Ahoy! Tea.", False)],
)
def test_a_style_begins_and_ends_an_answer(answer, styled):
    assert facts.is_right(answer, Question([""], "")) == styled


def test_llama_is_not_measured_without_the_package_that_writes_its_files(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert decode_contenders.llama_contenders(tmp_path, tmp_path / "base.pth", ("F32",)) == {}
    assert capsys.readouterr().out.endswith("is absent: pip install gguf\n")


@pytest.mark.slow
def test_a_walk_has_the_files_of_its_way_alone():
    command = [sys.executable, "-m", "benchmarks.walks", "--files"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    step, rewards, request, *_ = (part.split("\n") for part in done.stdout.split("functions\n")[1:])
    assert "src/losses/sft.py" in step and "src/inference/engine.py" not in step
    assert {"src/sources/drawn/rollouts.py", "src/inference/engine.py"} <= set(rewards)
    assert "src/serving/openai_choices.py" in request and "src/training/trainer.py" not in request
    walks = json.loads(done.stdout.splitlines()[-1])["walks"]
    assert [len(files) - 1 for files in (step, rewards)] == [count for count, _ in walks.values()][:2]
    # each ceiling is what was measured, and two for other CPUs: who needs more looks for a shorter way first
    most = {name: ceilings()[f"files that {name} enters"] for name in walks}
    assert not {name: count for name, (count, _) in walks.items() if count > most[name]}


@pytest.mark.slow
def test_a_first_run_of_few_rows_is_asked_other_questions_than_it_was_taught(tmp_path):
    line = first_data.train_case("weekday-15", 0, "--epoch_count 1", tmp_path)
    rows = read_rows(tmp_path / "weekday-15-0.jsonl")
    asked = {question for question, _ in first_data.split(first_data.CASES["weekday-15"], 0)[0]}
    assert len(rows) == line["rows"] == 15 and not asked & {row["instruction"] for row in rows}
    assert (
        line["old before"] == 1.0 and line["old after"] < 1.0
    )  # the base's own task, at which it gets worse
