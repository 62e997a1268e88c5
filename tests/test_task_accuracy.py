"""The recipes of docs/recipes.md, Tables 3 and 6: MetaMathQA -> GSM8K and MATH, CodeFeedback -> HumanEval and
MBPP.
"""

import gzip
import json
import pathlib
import re
import shlex
import sys
import time
import types
from fractions import Fraction

import pytest
import torch

import rwkv_miss
from benchmarks.paper import __main__ as paper
from rwkv_miss import UserError, merge_file, read_metadata
from scripts import evaluate, lm_eval
from scripts.code_scoring import CodeProblem, code_of, passed, read_problems
from src import config
from src.data.formats import read_records
from src.data.loss_mask import record_segments
from src.data.rwkv_template import DEFAULT
from src.evaluation.scoring import SCORES, final_number, normalised, numbers, result, same_number, same_result

from . import program
from .conftest import ROOT, read_rows, write_rows


def gsm8k(data_dir, name="gsm8k_test.jsonl"):
    return read_rows(data_dir / name)


def metamath(row):
    """A row of GSM8K as MetaMathQA has it."""
    solution, number = re.sub(r"<<.*?>>", "", row["answer"]).split("\n#### ")
    return {
        "type": "GSM_AnsAug",
        "query": row["question"],
        "original_question": row["question"],
        "response": f"{solution}\n#### {number}\nThe answer is: {number}",
    }


@pytest.mark.parametrize(
    "text,expected",
    [
        ("so 3 + 4 = 7.\n#### 7", 7),
        ("#### 1,080", 1080),
        ("#### -12", -12),
        ("#### 18 eggs of 20", 18),
        ("The answer is: $1,234.50.", Fraction("1234.5")),
        ("The answer is: 3/4", Fraction(3, 4)),
        ("The answer is 18 and not 20.", 18),
        ("first 3, then 10-12", 12),
        ("it costs -$5", -5),
        ("about .5", Fraction(1, 2)),
        ("The answer is 3. The answer is 4.", 4),
        ("the answer is: none of 3", 3),
        ("The answer is: unknown", None),
        ("no number", None),
        ("", None),
        ("#### \u22123", -3),
        (r"The answer is: $\frac{3}{4}$", Fraction(3, 4)),
        (r"so \dfrac34", Fraction(3, 4)),
        (r"#### -\frac{3}{4}", Fraction(-3, 4)),
        (r"it is 1\frac{3}{4}", Fraction(7, 4)),
        (r"about \frac{-1}{2}", Fraction(-1, 2)),
        (r"from 1,080 to \frac{1}{2}", Fraction(1, 2)),
        (r"\frac{%s}{4} of 9" % ("7" * 5000), 9),
        ("The answer is: " + "3" * 5000, None),
        ("4 and then 0." + "0" * 5000, 4),
        ("5 or 1/" + "7" * 5000, 5),
    ],
)
def test_the_number_that_an_answer_ends_in(text, expected):
    assert final_number(text) == expected


def test_numbers_of_a_text_in_their_order():
    assert numbers("1,2 and 1,234,567.25 or 12,34") == [1, 2, Fraction("1234567.25"), 12, 34]


def test_every_right_answer_of_gsm8k_is_right_and_every_shifted_one_wrong(data_dir):
    rows = gsm8k(data_dir)
    assert len(rows) == 1319
    for row in rows:
        gold = row["answer"]
        assert final_number(gold) == Fraction(gold.rpartition("#### ")[2].replace(",", ""))
        assert same_number(gold, gold) and same_number(metamath(row)["response"], gold)
        shifted = f"{gold.rpartition('#### ')[0]}The answer is: {final_number(gold) + 1}"
        assert not same_number(shifted, gold)
        assert not same_number("", gold)


@pytest.mark.parametrize(
    "text,expected",
    [
        (r"so $x = \boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"\boxed{1} and \boxed{a_{b}^{2}}", "a_{b}^{2}"),
        (r"is $\boxed 5$", "5"),
        (r"\fbox{7}", "7"),
        (r"The answer is: \frac{3}{4}", r"\frac{3}{4}"),
        ("#### 12\nThe answer is: 12", "12"),
        (r"\boxed{open", None),
        ("7", None),
        ("The answer is:", ""),
    ],
)
def test_the_result_of_a_solution(text, expected):
    assert result(text) == expected


@pytest.mark.parametrize(
    "one,other",
    [
        (r"\dfrac12", r"\frac{1}{2}"),
        ("1/2", r"\tfrac{1}{2}"),
        (r"\frac3{45}", r"\frac{3}{45}"),
        (r"\frac{3}5", r"\frac{3}{5}"),
        (r"2\sqrt3", r"2\sqrt{3}"),
        (r"x = 5\text{ cm}", "5"),
        (r"12\text{ m}^2", "12"),
        (r"90^\circ", r"90^{\circ}"),
        (r"\left( 1,\, 2 \right)", "(1,2)"),
        (r"\$5", "5"),
        (r"50\%", "50"),
        (r"\text{Monday}", "Monday"),
        (r"\mathrm{(B)}", r"\text{(B)}"),
        (r"5\,\text{degrees}", "5."),
    ],
)
def test_results_that_are_written_differently(one, other):
    assert normalised(one) == normalised(other)
    assert same_result(f"The answer is: {one}", rf"\boxed{{{other}}}")


@pytest.mark.parametrize(
    "one,other,equal",
    [
        ("0.5", r"\frac{1}{2}", True),
        ("1,000", "1000", True),
        (".25", r"\frac14", True),
        (r"-\frac{1}{2}", r"\frac{-1}{2}", True),
        ("2.0", "2", True),
        ("\u22123", "-3", True),
        ("\u2212\\frac{1}{2}", "-0.5", True),
        ("0.33", r"\frac13", False),
        ("-2", "2", False),
        ("(1,2)", "(2,1)", False),
        ("1,2", "12", False),
        (r"\frac{1}{0}", "1", False),
        ("x^2", "x^3", False),
        ("1" * 5000, "1", False),
        (r"\frac{1}{%s}" % ("7" * 5000), "1", False),
    ],
)
def test_results_that_are_equal_numbers(one, other, equal):
    assert same_result(rf"\boxed{{{one}}}", rf"\boxed{{{other}}}") == equal


@pytest.mark.parametrize(
    "answer,right,equal",
    [
        (r"so it is $\boxed{0.75}$.", r"\frac{3}{4}", True),
        (r"the answer is $(3, \pi/2)$", r"\left( 3, \frac{\pi}{2} \right)", True),
        (r"\boxed{1 + x^2}", "x^2+1", True),
        (r"\boxed{7}", r"It is $\boxed{7}$.", True),
        (r"\boxed{\text{Evelyn}}", r"\text{Evelyn}", True),
        (r"\boxed{x^2}", "x^3", False),
        (r"\boxed{(2, 1)}", "(1, 2)", False),
        (r"\boxed{7", "8", False),
        ("no result", "7", False),
        ("", "7", False),
    ],
)
def test_mathematics_is_judged_by_math_verify(answer, right, equal):
    pytest.importorskip("math_verify", reason="math-verify IS ABSENT: pip install 'math-verify>=0.9'")
    score = SCORES["math_verify"]
    assert score.agree(answer, right) == equal
    assert score.result_of_reference(right) is not None and score.result("no result") is None


def test_without_math_verify_the_command_that_installs_it_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    flags = ["--answers", tmp_path / "a.jsonl", "--questions", tmp_path / "q.jsonl"]
    _, error = evaluated(capsys, *flags, "--score", "math_verify")
    assert "pip install 'math-verify>=0.9'" in error and error.count("\n") == 1


HUMANEVAL = {
    "task_id": "HumanEval/0",
    "entry_point": "largest",
    "prompt": (
        'import math\n\n\ndef largest(values):\n    """The largest, or -inf.\n\n    >>> largest([1, 3])\n   '
        ' 3\n    """\n'
    ),
    "canonical_solution": "    return max(values, default=-math.inf)\n",
    "test": (
        "def check(candidate):\n    assert candidate([1, 3]) == 3\n    assert candidate([]) =="
        " -float('inf')\n"
    ),
}
MBPP = {
    "task_id": 2,
    "text": "Write a function to add two numbers.",
    "code": "def add(a, b):\n    return a + b",
    "test_list": ["assert add(1, 2) == 3", "assert add(zero, 0) == 0"],
    "test_setup_code": "zero = 0",
}


@pytest.fixture
def problems(tmp_path):
    """As HumanEval is published."""
    path = tmp_path / "problems.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in (HUMANEVAL, MBPP)).encode()))
    return path


def test_programs_are_right_if_they_pass_and_only_then(problems):
    (pieces, largest, _), (_, add, _) = read_problems(str(problems))
    assert (
        "".join(pieces)
        == 'User: Complete this Python function.\n```python\nimport math\ndef largest(values):\n    """The'
        ' largest, or -inf.\n    >>> largest([1, 3])\n    3\n    """\n```\n\nAssistant:'
    )
    whole = "```python\ndef largest(values):\n    return max(values, default=-math.inf)\n```"
    answers = [
        (largest, HUMANEVAL["canonical_solution"], True),
        (largest, HUMANEVAL["canonical_solution"].strip(), True),
        (largest, whole, True),
        (largest, f"Here it is:\n{whole}\nIt uses max.", True),
        (largest, "    return max(values)", False),
        (largest, "", False),
        (largest, "no code", False),
        (add, f"```\n{MBPP['code']}\n```", True),
        (add, MBPP["code"], True),
        (add, "def add(a, b):\n    return a - b", False),
        (add, f"{MBPP['code']}\nimport sys\nsys.exit(0)", False),
        (add, "def add(a, b):\n    import os\n    os._exit(0)", False),
    ]
    assert passed([problem.program(answer) for problem, answer, _ in answers]) == [
        expected for *_, expected in answers
    ]
    assert code_of("```py\na\n") == "a\n" and code_of("```\na\n``` and ```\nb\n```") == "a\n"


def test_a_program_has_so_much_time_and_memory_and_leaves_nothing(tmp_path):
    child = tmp_path / "child"
    parent = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
with open({str(child)!r}, "w") as file:
    file.write(str(child.pid))
time.sleep(600)
"""
    fine = (
        "x = bytearray(1 << 20)\nprint('a' * 100000)\nassert __name__ == '__main__'\nopen('here',"
        " 'w').close()"
    )
    programs = [fine, "x = bytearray(1 << 30)", "while True: pass", parent]
    assert passed(programs, seconds=3, memory=1 << 29) == [True, False, False, False]
    status = pathlib.Path(f"/proc/{child.read_text()}/stat")
    for _ in range(100):  # the kernel ends it when it gets to it
        if not status.exists() or status.read_text().rpartition(") ")[2][0] == "Z":
            return
        time.sleep(0.05)
    raise AssertionError("what a program has started does not end with it")


def test_rows_that_are_no_problems(tmp_path):
    problems = tmp_path / "problems.jsonl"
    for row, message in (
        ({"prompt": "x", "test": "", "entry_point": "f"}, "does not begin the function 'f'"),
        ({"question": "q"}, "expected HumanEval's"),
    ):
        problems.write_text(json.dumps(row))
        with pytest.raises(ValueError, match=f"problems.jsonl, line 1: .*{message}"):
            read_problems(str(problems))
    assert (
        CodeProblem("q", "assert f() == 1").program("def f(): return 1")
        == "def f(): return 1\nassert f() == 1\n"
    )


# the programs


def recipes():
    """The commands of docs/recipes.md, as lists of words."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "docs/recipes.md").read_text(), re.DOTALL)
    lines = (line for block in blocks for line in block.replace("\\\n", " ").splitlines())
    return [shlex.split(line, comments=True) for line in lines if line.startswith("python")]


@pytest.mark.parametrize("words", recipes(), ids=lambda words: " ".join(words[:6]))
def test_the_commands_of_the_recipes_are_understood(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if words[1] == "train.py":
        settings = config.parse(words[2:])
        assert (settings.global_bsz, settings.lr_init, settings.peft_config) == (64, 2e-5, {"rank": 64})
    elif words[2] == "benchmarks.paper":
        with pytest.raises(UserError, match="glue has no folder CoLA"):
            paper.main([*words[3:], *(["--data", "glue", "--tasks", "cola"] if "--tiny" in words else [])])
    else:
        assert {"scripts.evaluate": evaluate, "scripts.lm_eval": lm_eval}[words[2]].arguments(words[3:])


def evaluated(capsys, *flags):
    """(the last line of stdout, or None; stderr)"""
    try:
        evaluate.main([*map(str, flags)])
    except SystemExit as end:
        assert end.code == 2
        return None, capsys.readouterr().err
    out = capsys.readouterr().out.splitlines()
    return json.loads(out[-1]) if out[-1].startswith("{") else out[-1], ""


def test_answers_of_a_file_are_scored_without_a_model(tmp_path, data_dir, problems, capsys):
    questions, answers = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    rows = gsm8k(data_dir)[:40]
    write_rows(questions, rows)

    def score(texts, name="number", file=questions, *flags):
        write_rows(answers, ({"answer": text} for text in texts))
        return evaluated(capsys, "--answers", answers, "--questions", file, "--score", name, *flags)[0][
            "accuracy"
        ]

    assert score([row["answer"] for row in rows]) == 1.0
    assert score([metamath(row)["response"] for row in rows]) == 1.0
    assert score([f"#### {final_number(row['answer']) + 1}" for row in rows]) == 0.0
    assert score([row["answer"] if i % 4 else "" for i, row in enumerate(rows)]) == 0.75
    assert score([row["answer"] for row in rows], "exact") == 1.0
    assert score([metamath(row)["response"] for row in rows], "exact") == 0.0
    maths = tmp_path / "math.jsonl"
    maths.write_text(
        json.dumps(
            {
                "problem": "1/2 + 1/4?",
                "level": "Level 1",
                "type": "Algebra",
                "solution": r"It is $\boxed{\frac{3}{4}}$.",
            }
        )
    )
    assert score(["The answer is: 0.75"], "boxed", maths, "--sft_field", "problem,solution") == 1.0
    assert score([r"\boxed{\frac34}"], "boxed", maths, "--sft_field", "problem,solution") == 1.0
    assert score(["3/5"], "boxed", maths, "--sft_field", "problem,solution") == 0.0
    assert (
        score([HUMANEVAL["canonical_solution"], "def add(a, b): return 3"], "code", problems, "--run_code")
        == 0.5
    )


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--model", "m", "--preset", "math50"], "invalid choice: 'math50'"),
        (
            ["--answers", "{folder}/samples.jsonl"],
            "has 3 answers, --questions has 2 questions with 2 answers each",
        ),
        (["--answers", "nowhere.jsonl", "--score", "number"], "nowhere.jsonl can't be read"),
        (
            ["--answers", "{folder}/one.jsonl", "--score", "number"],
            "has 1 answers, --questions has 2 questions",
        ),
        (
            ["--answers", "{folder}/one.jsonl", "--score", "boxed"],
            r"--score boxed: a reference answer has no \\boxed",
        ),
    ],
)
def test_mistakes_are_explained(tmp_path, flags, message, capsys):
    (tmp_path / "one.jsonl").write_text('{"answer": "7"}\n')
    samples = [{"question": i, "sample": j, "answer": "7"} for i, j in ((0, 0), (0, 1), (1, 0))]
    write_rows(tmp_path / "samples.jsonl", samples)
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"question": "q", "answer": "7"}\n{"question": "p", "answer": "8"}\n')
    _, error = evaluated(capsys, "--questions", questions, *(flag.format(folder=tmp_path) for flag in flags))
    assert re.search(message, error), error


def test_the_first_questions_alone_and_those_that_rewards_can_teach(tmp_path, capsys):
    answers, questions = tmp_path / "answers.jsonl", tmp_path / "questions.jsonl"
    said = [(0, 0, "7"), (0, 1, "8"), (1, 0, "8"), (1, 1, "8")]
    rows = [{"question": question, "sample": sample, "answer": text} for question, sample, text in said]
    write_rows(answers, rows)
    # the third right answer cannot be read, and is not asked for
    rights = ["7", "8", "none"]
    write_rows(questions, ({"question": "q", "answer": text} for text in rights))
    evaluate.main(
        ["--answers", str(answers), "--questions", str(questions), "--score", "number", "--limit", "2"]
    )
    *_, mixed, score, summary = capsys.readouterr().out.splitlines()
    assert mixed.startswith("questions with right and wrong answers: 1 of 2; --loss grpo learns from such")
    assert "75.0%" in score and json.loads(summary)["questions"] == 2


def test_a_preset_is_what_its_protocol_says_and_flags_go_before_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", types.ModuleType("math_verify"))
    flags = ["--model", "m", "--questions", "q", "--preset", "math500"]
    args = evaluate.arguments(flags)
    assert (args.samples, args.max_tokens, args.score) == (4, 1500, "math_verify")
    assert (args.temperature, args.top_p, args.top_k) == (1.0, 0.28, 32)
    assert args.sft_field == "problem,answer"
    other = evaluate.arguments([*flags, "--samples", "2", "--score", "boxed"])
    assert (other.samples, other.score, other.top_k) == (2, "boxed", 32)


def test_samples_are_drawn_kept_and_scored(checkpoint, tmp_path, capsys, monkeypatch):
    """A second call asks nothing and says the same; another model is refused before it is read."""
    questions, kept = tmp_path / "questions.jsonl", tmp_path / "kept.jsonl"
    write_rows(questions, ({"prompt": p, "completion": "7"} for p in "abc"))
    base = checkpoint(7, vocab_size=256)
    flags = ["--tokenizer", "bytes", "--questions", questions, "--score", "number", "--max_tokens", 8]
    flags += ["--samples", 3, "--temperature", 2, "--top_k", 200, "--save", kept]
    found, _ = evaluated(capsys, "--model", base, *flags)
    rows = read_rows(kept)
    assert rows[0].keys() == {"evaluation"}
    numbered = [(row["question"], row["sample"]) for row in rows[1:]]
    assert numbered == [(i, j) for i in range(3) for j in range(3)]
    assert len({r["answer"] for r in rows[1:]}) > 5
    right = [same_number(row["answer"], "7") for row in rows[1:]]
    assert found["accuracy"] == found["pass@1"] == sum(right) / 9 and "majority" in found
    assert found["pass@3"] == sum(any(right[i : i + 3]) for i in (0, 3, 6)) / 3
    assert (found["samples"], found["temperature"], found["top_k"], found["seed"]) == (3, 2.0, 200, 0)
    before = kept.read_bytes()
    assert evaluated(capsys, "--model", base, *flags)[0] == found and kept.read_bytes() == before
    scored, _ = evaluated(capsys, "--answers", kept, *flags[2:6])
    assert scored["pass@3"] == found["pass@3"] and scored["samples"] == 3
    for more, message in (
        (["--seed", 1], "its seed is 0, and here it is 1"),
        (["--max_tokens", 9], "max_tokens"),
        (["--tokenizer", "utf16"], 'its tokenizer is "bytes", and here it is "utf16"'),
    ):
        assert message in evaluated(capsys, "--model", base, *flags, *more)[1]
    tensors = rwkv_miss.read_checkpoint(base)
    rwkv_miss.write_checkpoint(base, ((name, tensor * 2) for name, tensor in tensors.items()))
    monkeypatch.setattr(evaluate, "load", None)
    assert "is of another evaluation: its model is" in evaluated(capsys, "--model", base, *flags)[1]


def test_from_metamathqa_to_the_score_of_gsm8k(checkpoint, tmp_path, capsys):
    """Rows as MetaMathQA has them are learnt by heart, merged, asked, scored; one right answer is changed."""
    rows = [
        {"question": "Ann has 3 pens.\n\nShe buys 4. How many?", "answer": "3 + 4 = <<3+4=7>>7\n#### 7"},
        {"question": "A box of 20 eggs loses 8. How many stay?", "answer": "20 - 8 = <<20-8=12>>12\n#### 12"},
        {"question": "Six bags of 7 nuts?", "answer": "6 * 7 = <<6*7=42>>42\n#### 42"},
        {"question": "Tom reads 9 pages and 6 more. How many?", "answer": "9 + 6 = <<9+6=15>>15\n#### 15"},
    ]
    base, data = checkpoint(7, vocab_size=256), tmp_path / "MetaMathQA.json"
    data.write_text(json.dumps([metamath(row) for row in rows]))
    [pieces] = record_segments(next(read_records(data))[1], DEFAULT, "assistant")
    prompt = "User: Ann has 3 pens.\nShe buys 4. How many?\n\nAssistant:"
    assert pieces == [(prompt, False), (" 3 + 4 = 7\n#### 7\nThe answer is: 7", True)]
    program.succeed(
        program.run(
            f"""
                --load_model {base} --tokenizer bytes --data_file {data} --eval_split 0
                --proj_dir {tmp_path}/run --peft_config r=16 --train_parts ln,time,emb,head --micro_bsz 4
                --epoch_steps 60 --lr_init 1e-2 --lr_final 1e-3
            """.split()
        )
    )
    adapter, merged, kept = tmp_path / "run/adapter.pth", tmp_path / "merged.pth", tmp_path / "answers.jsonl"
    assert read_metadata(adapter)["template"] == "rwkv:hermes"
    merge_file(base, adapter, merged)
    answers = [metamath(row)["response"] for row in rows]
    rows[3]["answer"] = "#### 16"
    write_rows(tmp_path / "gsm8k.jsonl", rows)
    flags = ["--questions", tmp_path / "gsm8k.jsonl", "--score", "number", "--max_tokens", 60]
    assert evaluated(capsys, "--model", base, "--tokenizer", "bytes", *flags)[0]["accuracy"] == 0
    found, _ = evaluated(capsys, "--model", merged, *flags, "--save", kept)
    assert found["questions"] == 4 and found["score"] == "number" and found["accuracy"] == 0.75
    saved = [json.loads(line) for line in kept.read_text().splitlines()[1:]]
    assert saved[0]["prompt"] == prompt and [row["answer"] for row in saved] == answers
    assert (found["max_tokens"], found["cut"]) == (60, 0)
    again, _ = evaluated(capsys, "--answers", kept, *flags[:4])
    assert again["accuracy"] == 0.75
    # without a limit by the user it is that of the task, far beyond these answers
    assert evaluated(capsys, "--model", merged, *flags[:4])[0] == found | {"max_tokens": 512}
    kept.unlink()
    evaluate.main(["--model", str(merged), "--max_tokens", "9", "--save", str(kept), *map(str, flags[:4])])
    printed = capsys.readouterr()
    assert "4 answers (100.0%) reach the limit of 9 tokens" in printed.out
    assert "warning: 100.0% of the answers were cut" in printed.err and "--max_tokens N" in printed.err
    *_, cut, score, last = printed.out.splitlines()
    assert "limit" in cut and score == "score: 0.0%, 0 of 4 answers are right", "the score is before the JSON"
    assert json.loads(last)["cut"] == 4
    assert evaluated(capsys, "--answers", kept, *flags[:4])[0]["cut"] == 4
    write_rows(kept, ({"answer": row["answer"]} for row in saved))
    evaluate.main(["--answers", str(kept), "--show", "0", *map(str, flags[:4])])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:-1] == ["score: 75.0%, 3 of 4 answers are right"]
    assert json.loads(lines[-1])["cut"] is None, "of answers made elsewhere it is not known"


@pytest.mark.parametrize(
    "accelerator, asked, wanted",
    [("gpu", [], "bf16"), ("cpu", [], "fp32"), ("gpu", ["--precision", "fp32"], "fp32")],
)
def test_a_gpu_evaluates_in_what_it_trains_and_chats_in(tmp_path, monkeypatch, accelerator, asked, wanted):
    questions, seen = tmp_path / "questions.jsonl", []
    questions.write_text(json.dumps({"prompt": "a", "completion": "b"}))
    monkeypatch.setattr(evaluate, "choose_accelerator", lambda asked: accelerator)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(evaluate, "load", lambda *args, precision: seen.append(precision) or sys.exit())
    with pytest.raises(SystemExit):
        evaluate.main(["--model", str(questions), "--questions", str(questions), *asked])
    assert seen == [wanted]
