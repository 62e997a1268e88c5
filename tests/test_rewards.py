"""Rewards of drawn answers (src/evaluation/rewards.py)."""

import hashlib
from typing import NamedTuple

import pytest
import torch

from rwkv_miss import UserError
from src.config import Config
from src.data.questions import Question
from src.data.rwkv_template import DEFAULT
from src.data.tokenizer import load_tokenizer
from src.evaluation.rewards import GUARDED, RIGHT_OR_WRONG, Failed, Rewards, overlong, partial
from src.losses.grpo import REWARDS

BYTES = load_tokenizer("bytes", 256)
QUESTION = Question(["User: 3 + 4?\n\nAssistant:"], "7")


class Answer(NamedTuple):
    text: str
    tokens: tuple = (1, 2, 3)
    cut: bool = False


def rewards_of(rewards, **others):
    return Rewards.of(Config(rewards=rewards, group_size=4, **others), DEFAULT)


def values(name, answers, question=QUESTION, **others):
    with rewards_of({name: 1}, **others) as rewards:
        return rewards.score(question, answers).total.tolist()


def test_an_answer_is_judged_as_by_scripts_evaluate():
    answers = [Answer(" 7"), Answer(" it is 7"), Answer(" \\boxed{7.0}"), Answer(" 8"), Answer("")]
    assert values("exact", answers) == [1, 0, 0, 0, 0]
    assert values("number", answers) == [1, 1, 1, 0, 0]
    boxed = QUESTION._replace(answer="so \\boxed{7}")
    assert values("boxed", answers, boxed) == [0, 0, 1, 0, 0]


def test_thoughts_are_not_judged():
    asked = QUESTION._replace(opening="<think>")
    answers = [Answer("is it 7?</think>8"), Answer("8, no</think> 7"), Answer("7")]
    assert values("number", answers[:2], asked) == [0, 1]
    assert values("exact", answers, asked) == [0, 1, 0]
    assert values("partial", answers[:2], asked) == [0, 1]


def test_what_follows_the_end_of_the_turn_is_not_judged():
    assert values("exact", [Answer(" 7\n\nUser: 8"), Answer(" 8\n\nUser: 7")]) == [1, 0]


@pytest.mark.parametrize("name", ["exact", "number", "boxed"])
def test_a_cut_answer_is_not_right(name):
    question = QUESTION._replace(answer="\\boxed{7}") if name == "boxed" else QUESTION
    answers = [Answer(question.answer, cut=True), Answer(question.answer)]
    assert values(name, answers, question) == [0, 1]
    assert values("partial", answers, question) == [1, 1]


def test_regex_is_looked_for_in_the_whole_answer_with_its_thoughts():
    asked = QUESTION._replace(opening="<think>")
    answers = [
        Answer(" 3 + 4\n= 7</think> 7"),
        Answer(" 7"),
        Answer(" 7</think>", cut=True),
        Answer("</think>"),
    ]
    assert values("regex", answers, asked, reward_regex=r"(?s)^<think>.+</think>") == [1, 0, 1, 0]


def test_a_regular_expression_that_takes_exponential_time_is_a_failed_group():
    with rewards_of({"exact": 1, "regex": 1}, reward_regex="(a+)+$", reward_timeout=0.3) as rewards:
        failed = rewards.score(QUESTION, [Answer("a" * 50 + "b"), Answer("7")])
        said = "regex took more than 0.3 s; --reward_timeout N gives it more; the question was 'User: 3"
        assert isinstance(failed, Failed) and failed.kind == "regex: time" and failed.reason.startswith(said)
        assert rewards.score(QUESTION, [Answer("aaa"), Answer("7")]).total.tolist() == [1, 1]


def test_math_verify_judges_answers_that_came_to_their_end():
    pytest.importorskip("math_verify", reason="NO math-verify: its reward is not tested")
    half = QUESTION._replace(answer="\\frac{1}{2}")
    answers = [Answer("so $0.5$"), Answer("$0.5$", cut=True), Answer("\\boxed{2}"), Answer("1/2"), Answer("")]
    assert values("math_verify", answers, half) == [1, 0, 0, 1, 0]


def test_partial_is_the_share_of_characters_in_their_place():
    for said, right, share in (
        ("1234", "1234", 1),
        ("1235", "1234", 3 / 4),
        ("12345", "1234", 4 / 5),
        ("123", "1234", 3 / 4),
        ("2341", "1234", 0),
        ("", "1234", 0),
        ("", "", 1),
        ("héé", "hée", 2 / 3),
    ):
        assert partial(said, right) == pytest.approx(share)


def test_length_is_the_soft_punishment_of_dapo():
    """Equation 13 of arXiv 2503.14476, with L_max of --max_tokens; --reward_length leaves L_cache."""

    def equation(length, most, cache):
        if length <= most - cache:
            return 0
        return (most - cache - length) / cache if length <= most else -1

    for length in range(60):
        assert overlong(length, 30, 50) == pytest.approx(equation(length, 50, 20))
    lengths = [Answer("", (1,) * n, n == 50) for n in (7, 30, 40, 50)]
    assert values("length", lengths, reward_length=30, max_tokens=50) == [0, 0, -0.5, -1]


def test_the_total_is_the_weighted_sum():
    with rewards_of({"exact": 1, "partial": 0.25, "number": -2.0}) as rewards:
        scored = rewards.score(QUESTION._replace(answer="71"), [Answer("71"), Answer("79"), Answer("so 71")])
    assert rewards.names == ("exact", "partial", "number")
    assert scored.values.dtype == scored.total.dtype == torch.float64
    assert scored.values.tolist() == [[1, 1, 1], [0, 0.5, 0], [0, 0, 1]]
    assert scored.total.tolist() == [-0.75, 0.125, -2]


def test_the_rewards_that_are_built_in_are_those_of_the_flag():
    assert sorted([*RIGHT_OR_WRONG, *GUARDED, "length"]) == sorted(REWARDS)


def test_right_answers_that_cannot_be_read():
    questions = [QUESTION, QUESTION._replace(answer="seven")]
    rewards_of({"exact": 1, "partial": 1}).check(questions, BYTES)
    with pytest.raises(UserError, match="--rewards number: a reference answer has no number: 'seven'"):
        rewards_of({"exact": 1, "number": 1}).check(questions, BYTES)


OWN = """
def quality(prompt, answers, right):
    assert prompt == "User: 3 + 4?\\n\\nAssistant:" and right == "7"
    return [len(answer) / 10 for answer in answers]

def unfinished(prompt, answers, right, cut, tokens):
    return [len(ids) * (-1 if end else 1) for ids, end in zip(tokens, cut)]

def fails_on_none(prompt, answers, right):
    return [1 / len(answer) for answer in answers]

def fails_on_eight(prompt, answers, right):
    if "8" in answers: raise ValueError(f"{len(answers)} answers")
    return [0.5] * len(answers)
"""


@pytest.fixture
def own_file(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return str(path)


def test_functions_of_the_user_have_their_share_of_the_sum(own_file):
    with rewards_of({"exact": 1, "quality": 0.5}, reward_file=own_file) as rewards:
        rewards.check([QUESTION], BYTES)
        scored = rewards.score(QUESTION, [Answer(" 7"), Answer(" eight", cut=True)])
        assert scored.values.tolist() == [[1, 0.1], [0, 0.5]]
        assert scored.total.tolist() == [1.05, 0.25]
        assert rewards.digest == hashlib.sha256(OWN.encode()).hexdigest()
    assert rewards_of({"exact": 1}).digest is None


def test_a_function_may_see_which_answers_were_cut_and_their_tokens(own_file):
    with rewards_of({"unfinished": 1}, reward_file=own_file) as rewards:
        assert rewards.check([QUESTION], BYTES) == [], "the end of document counts: 2 tokens, and 1"
        answers = [Answer("7", (9, 0)), Answer("eight", (1, 2, 3), cut=True)]
        assert rewards.score(QUESTION, answers).total.tolist() == [2, -3]


def test_a_function_that_fails_costs_its_group(own_file):
    with rewards_of({"exact": 1, "fails_on_eight": 1}, reward_file=own_file) as rewards:
        rewards.check([QUESTION], BYTES)
        failed = [rewards.score(QUESTION, [Answer("8")] * count) for count in (2, 3)]
        assert [one.reason[:52] for one in failed] == [
            "fails_on_eight raised ValueError: 2 answers (own.py,",
            "fails_on_eight raised ValueError: 3 answers (own.py,",
        ]
        assert failed[0].kind == failed[1].kind
        assert failed[0].reason.endswith(
            "; the question was 'User: 3 + 4?\\n\\nAssistant:', the first answer '8'"
        )
        assert rewards.score(QUESTION, [Answer("7"), Answer("9")]).total.tolist() == [1.5, 0.5]


def test_functions_are_tried_before_the_run(own_file):
    said = (
        "own.py: in a trial with 3 reference answers and an empty one, fails_on_none raised"
        " ZeroDivisionError: division by zero \\(own.py, line 10: .*the reference answer '7'"
    )
    with (
        rewards_of({"fails_on_none": 1}, reward_file=own_file) as rewards,
        pytest.raises(UserError, match=said),
    ):
        rewards.check([QUESTION], BYTES)


def test_a_function_that_tells_nothing_apart_is_remarked(own_file):
    with rewards_of({"quality": 1, "fails_on_eight": 1}, reward_file=own_file) as rewards:
        (note,) = rewards.check([QUESTION], BYTES)
        assert note.startswith("fails_on_eight of --reward_file gave 0.5 to the reference answer")


def test_a_file_without_the_function_is_an_error_at_once(own_file):
    with pytest.raises(
        UserError, match="own.py: it has no function qualty; it has quality, unfinished, fails.*; expected a"
    ):
        rewards_of({"qualty": 1}, reward_file=own_file)
    with pytest.raises(UserError, match="none.py: there is no such file"):
        rewards_of({"quality": 1}, reward_file="none.py")


def test_a_function_with_the_name_of_a_built_in_reward_is_no_riddle(tmp_path):
    path = tmp_path / "own.py"
    path.write_text("def number(p, a, r): return [1] * len(a)\ndef mine(p, a, r): return [1] * len(a)\n")
    with pytest.raises(UserError, match="number has the name of a built-in reward; rename it"):
        rewards_of({"mine": 1, "number": 1}, reward_file=str(path))
