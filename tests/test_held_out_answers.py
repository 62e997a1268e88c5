"""Greedy answers to held-out questions: how many are asked, which are right, and what they have in common."""

import functools
import json
import math
import types

import pytest

from demo import task
from src.data.encode import Encoder
from src.data.held_out import SampleQuestion
from src.data.questions import read_questions
from src.data.templates import load_template
from src.data.tokenizer import load_tokenizer
from src.evaluation.answering import Asking, exact_accuracy
from src.inference.load import load
from src.sources.held_out_answers import SHORT, Judge, affordable, limit_of
from src.training import validation

from . import program
from .conftest import ROOT, read_rows
from .program import succeed

BYTES = load_tokenizer("bytes", 256, "")
BASE = ROOT / "demo/rwkv7-reverse.pth"


def question(prompt, answer):
    return SampleQuestion(BYTES.encode(prompt), BYTES.encode(answer))


def answer(text, cut=False):
    return types.SimpleNamespace(text=text, tokens=BYTES.encode(text), cut=cut)


def judged(rights, texts, prompt="Assistant:", template="rwkv"):
    """(score, what is counted) for answers, those with "..." at their end cut."""
    judge = Judge([question(prompt, right) for right in rights], Encoder(BYTES, load_template(template)))
    answers = [answer(text.removesuffix("..."), text.endswith("...")) for text in texts]
    return judge.score, judge.counted(answers)


@pytest.mark.parametrize(
    "rights, texts, score, share",
    [
        ([" 4", " 5"], [" 4", " 6"], "exact", 0.5),
        ([" 4", " 5"], ["4\n\nUser: more", "<think>hm</think> 5"], "exact", 1.0),
        (["2+2 = 4\n#### 4", "5\n#### 5"], ["so the answer is 4.", "#### 5 or 6"], "number", 1.0),
        (["it is \\boxed{\\frac12}", "\\boxed{3}"], ["\\boxed{1/2}", "3"], "boxed", 0.5),
        (["4", "many words " * SHORT, "a" * (SHORT + 1)], ["4", "b", "a"], "", None),
        # most right answers are longer than an answer of an evaluation
        (
            ["a step, " * SHORT + "\\boxed{3}", "\\boxed{3}", "a step, " * SHORT + "\\boxed{4}"],
            ["", "3", ""],
            "",
            None,
        ),
    ],
)
def test_answers_are_judged_as_scripts_evaluate_judges_them(rights, texts, score, share):
    found = judged(rights, texts)
    assert found[0] == score and found[1].get("right_answers") == share and found[1]["asked"] == len(texts)


def test_thoughts_that_the_prompt_opens_are_left_out():
    prompt, rights = "Assistant: <think", [">two and two</think> 4"]
    assert judged(rights, [">sum</think> 4"], prompt, "think")[1]["right_answers"] == 1.0


def test_what_answers_have_in_common_is_counted():
    _, found = judged(list("1123"), ["Tam", "Tam", "", "ab..."])
    assert found["answers"] == {"empty": 1, "endless": 1, "same": 2, "common": "Tam", "same_right": 2}
    long = ["many words " * SHORT] * 3
    # a cut answer that is shorter than the right one has no end, or has not come to it
    _, found = judged(long, ["so it goes on and on and on and on and on...", "so it goes ...", "ab ab ab ab"])
    assert found["answers"]["endless"] == 1
    assert judged([], []) == ("", {})


def test_as_many_are_asked_as_a_budget_pays_for():
    """A token of a prompt counts as a third of a trained one, one of an answer as 0.6 of it."""
    few, more = [question("a" * 30, "b" * 8)] * 3, [question("a" * 30, "b" * 8)] * 20
    each = 10 + 0.6 * limit_of(few)
    assert limit_of(few) == 8 + 2 + 16 and limit_of([]) == 16
    counts = [affordable(few, more, budget * each + 1e-6) for budget in (0, 3, 4, 10.5, 99)]
    assert counts == [0, 0, 1, 7, 20]


def test_a_run_counts_right_answers_as_an_evaluation_does(tmp_path):
    """The base knows the task. A rate far too high loses it, and the run says so and offers no file."""
    for name, count, seed in (("rows", 60, 1), ("held", 20, 2)):
        rows = [row for row in task.rows("reverse", count, seed) if len(row["messages"]) == 2]
        task.write(str(tmp_path / f"{name}.jsonl"), rows)
    held = str(tmp_path / "held.jsonl")
    flags = f"--load_model {BASE} --data_file {tmp_path}/rows.jsonl --eval_file {held} --epoch_steps 30"
    folder = tmp_path / "run"
    output = succeed(
        program.run([*flags.split(), "--proj_dir", str(folder), "--lr_init", "0.5"], sample_tokens=300)
    )
    lines = read_rows(folder / "validation.jsonl")
    questions = read_questions(held)[: lines[0]["asked"]]
    for line, adapter in zip(lines, (None, str(folder / "adapter.pth")), strict=True):
        model, tokenizer = load(str(BASE), adapter, precision="fp32", accelerator="cpu")
        share, _ = exact_accuracy(model, tokenizer, questions, Asking(64))
        assert line["right_answers"] == share
    count = lines[0]["asked"]
    assert count > 8 and lines[0]["right_answers"] > 0.9 and len(lines[0]["samples"]) == 3
    assert f" and {count} greedy answers, 2 times" in output
    share = f"{100 * lines[0]['right_answers']:.3g} %"
    assert f"step 0/30 validation loss {lines[0]['loss']:.4f} per token, right answers {share} of" in output
    card = (folder / "run_card.md").read_text()
    assert f"| greedy answers | right {share} to 0 %, on {count} held-out questions |" in card
    assert f"| right answers, greedy | {share} | 0 % |" in card
    end = json.loads((folder / "run.json").read_text())
    assert end["validation_metrics_first"] == {"right_answers": lines[0]["right_answers"]}
    assert "metrics_first" not in end and end["verdict"]["name"] in ("made worse", "answers collapsed")
    assert "merge it:" not in output


def test_running_text_is_scored_in_bits_a_byte(tmp_path):
    texts = [f"Zeile {i}: der Mond ist aufgegangen, schön." for i in range(10)]
    for name, part in (("rows", texts), ("held", texts[:4])):
        rows = "".join(json.dumps({"text": text}) + "\n" for text in part)
        (tmp_path / f"{name}.jsonl").write_text(rows)
    flags = f"--load_model {BASE} --data_file {tmp_path}/rows.jsonl --eval_file {tmp_path}/held.jsonl"
    words = [*flags.split(), "--epoch_steps", "3", "--lr_init", "0.001", "--proj_dir", str(tmp_path / "run")]
    output = succeed(program.run(words))
    lines = read_rows(tmp_path / "run" / "validation.jsonl")
    length = len(texts[0].encode())  # the first byte is not predicted, and the end of the document is
    size = lines[0]["tokens"] // length * (length - 1)
    for line in lines:
        assert line["bits_per_byte"] == pytest.approx(line["loss"] * line["tokens"] / math.log(2) / size)
        assert "right_answers" not in line
    ends = [f"{line['bits_per_byte']:.3f}" for line in (lines[0], lines[-1])]
    assert f"({ends[0]} to {ends[1]} bits a byte)" in output
    verdict = json.loads((tmp_path / "run" / "run.json").read_text())["verdict"]
    assert verdict["numbers"]["bits_per_byte"] == [line["bits_per_byte"] for line in (lines[0], lines[-1])]
    assert f"| bits a byte | {lines[0]['bits_per_byte']:.4g} |" in (
        (tmp_path / "run" / "run_card.md").read_text()
    )


def judge_otherwise(folder, rank):
    """Another process counts its answers otherwise. Each writes down the counts that it goes by."""
    counted, is_over = Judge.counted, validation.is_over

    def noted(history, early_stop):
        (folder / f"rank-{rank}").write_text(json.dumps([line["asked"] for line in history]))
        return is_over(history, early_stop)

    Judge.counted = lambda judge, answers: counted(judge, answers) | {"asked": len(answers) + rank}
    validation.is_over = noted


def test_all_processes_go_by_the_same_counts(tmp_path):
    task.write(str(tmp_path / "rows.jsonl"), task.rows("reverse", 40, 1))
    flags = f"--load_model {BASE} --data_file {tmp_path}/rows.jsonl --eval_split 0.2 --epoch_steps 1"
    more = f"--proj_dir {tmp_path}/run --lr_init 1e-3 --devices 2 --micro_bsz 1"
    sabotage = functools.partial(judge_otherwise, tmp_path)
    succeed(program.run([*flags.split(), *more.split()], sabotage))
    one, other = ((tmp_path / f"rank-{rank}").read_text() for rank in (0, 1))
    assert one == other and len(json.loads(one)) == 2
