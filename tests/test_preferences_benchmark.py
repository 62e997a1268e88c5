"""Questions, judging and table of benchmarks.preferences."""

import json
import pathlib

import pytest
import torch

from benchmarks import preferences
from benchmarks.experiment import groups
from benchmarks.preferences import NAMED, OBJECTIVES, Pair, draw, summary, table
from src.data.templates import recorded_template


@pytest.fixture(scope="module")
def task():
    return preferences.sort(pathlib.Path("absent"))


def test_the_preferred_answer_is_sorted_and_the_other_reversed(task):
    for pair in task.test:
        letters = pair.question.removeprefix("sort ")
        assert list(pair.chosen) == sorted(letters) and pair.rejected[::-1] == letters != pair.chosen[::-1]
        assert task.is_right(pair.chosen, pair) and not task.is_right(pair.rejected, pair)
    judging = [{pair.question for pair in pairs} for pairs in (task.test, task.valid)]
    trained = {pair.question for pair in task.train}
    assert not (judging[0] & judging[1] or trained & (judging[0] | judging[1]))
    # twice as many steps read no prompt a second time
    assert len(task.train) == 2 * task.steps * task.per_step
    assert (len(task.test), len(task.valid)) == (300, 100)


def test_a_row_is_a_pair_or_the_preferred_answer_alone():
    asked = [{"role": "user", "content": "sort ba"}]
    pair = Pair("sort ba", "ab", "ba")
    assert pair.row(True) == {"messages": asked, "chosen": "ab", "rejected": "ba"}
    assert pair.row(False) == {"messages": [*asked, {"role": "assistant", "content": "ab"}]}


def problem(question, answer):
    return json.dumps({"question": question, "answer": answer})


def test_a_result_is_preferred_to_the_last_line_of_a_solution():
    lines = [
        problem("It costs $3.5. Two are sold. What is paid?", "One: 3.5\nTwo: 2*3.5=$<<2*3.5=7>>7\n#### 7"),
        problem("And then? What is paid?", "Another answer.\n#### 8"),  # a question that was there before
        problem("How many?", "#### 9"),  # no solution
        problem("Say how many.", "Nine.\n#### 9"),  # no question
        problem("How many?" + " Really" * 8 + "?", "Nine.\n#### 9"),  # long
        problem("How long?", "Nine.\n#### 9 m"),  # not a number alone
        problem("How far?", "1,000 m\n#### 1,000"),
    ]
    assert preferences.results(lines) == [
        Pair("What is paid?", "#### 7", "Two: 2*3.5=$7"),
        Pair("How far?", "#### 1,000", "1,000 m"),
    ]


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("#### 7", True),
        ("#### 1,000.5", True),
        ("Seven.", False),
        ("Seven.\n#### 7", False),
        ("#### seven", False),
        ("#### 7\n#### 7", False),
        ("7", False),
    ],
)
def test_an_answer_is_a_result_alone(answer, right):
    assert preferences.is_result(answer) == right


def test_answers_are_judged_as_the_model_itself_says(task):
    pairs = task.test[:3]
    model, tokenizer = task.model(None)
    template = recorded_template("auto", tokenizer, str(task.base))
    found = preferences.log_probs(model, tokenizer, template, pairs)
    for i, pair in enumerate(pairs):
        for j, answer in enumerate((pair.chosen, pair.rejected)):
            prompt = f"User: {pair.question}\n\nAssistant:".encode()
            ids = torch.tensor([[*prompt, *f" {answer}".encode(), *tokenizer.eod]])
            with torch.no_grad():
                logits = model(ids[:, :-1])[0].double()[0, len(prompt) - 1 :]
            wanted = logits.log_softmax(1).gather(1, ids[0, len(prompt) :, None]).sum()
            assert abs(found[i, j] - wanted) < 1e-4, (pair, answer)
    known = [Pair(pair.question.replace("sort", "reverse"), "", pair.rejected) for pair in pairs]
    assert preferences.greedy_answers(model, tokenizer, template, known) == [pair.rejected for pair in pairs]


def line(objective, method, seed, accuracy, right, task="sort"):
    figures = {"reward accuracy": accuracy, "raw accuracy": 0.5, "right answers": right, "characters": 5}
    gained = {"gained by the chosen": 1.0, "gained by the rejected": -2.0}
    own = {"task": task, "objective": objective, "method": method, "seed": seed, "steps": 150, "rate": 0.003}
    return own | figures | gained


def test_a_target_is_met_where_every_seed_reaches_it():
    lines = [
        line("base", "", 0, 0, 0.01),
        line("dpo", "miss", 0, 0.95, 0.7),
        line("dpo", "miss", 1, 1.0, 0.9),
        line("dpo", "lora", 0, 0.94, 0.9),  # the rewards
        line("dpo", "lora", 1, 1.0, 0.9),
        line("orpo", "miss", 0, 1.0, 0.79),  # the answers
        line("supervised", "miss", 0, 1.0, 0.1),
        line("dpo", "miss", 0, 0.1, 0.1, "result"),
    ]
    assert summary(lines) == {
        "met": ["sort dpo miss (2 of 2 seeds)"],
        "missed": ["sort dpo lora (1 of 2 seeds)", "sort orpo miss (0 of 1 seed)"],
    }
    found = table(lines).records()
    assert [row["met by seeds"] for row in found] == ["", "2 of 2", "1 of 2", "0 of 1", "", ""]
    assert found[1]["right answers"] == "80.0 % (70 to 90)" and found[1]["rates"] == "0.003 0.003"
    assert found[0]["objective"] == "base" and not found[0]["reward accuracy"]
    assert list(groups(lines, *NAMED))[-1] == ("result", "dpo", "miss")
    from matplotlib.figure import Figure

    figure = Figure()
    draw(lines)(figure)
    assert [axes.get_title() for axes in figure.axes] == ["sort", "result"]
    assert len(figure.axes[0].get_xticks()) == 3, "an objective that nothing was trained for has no place"
    assert set(OBJECTIVES) > {row["objective"] for row in found} - {"base"}
