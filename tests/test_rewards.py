"""What a drawn answer is worth (src/evaluation/rewards.py)."""

import types
from typing import NamedTuple

import pytest
import torch

from rwkv_miss import UserError
from src.data.questions import Question
from src.data.rwkv_template import DEFAULT
from src.evaluation.rewards import Rewards, overlong, partial

QUESTION = Question(["User: 3 + 4?\n\nAssistant:"], "7")


class Answer(NamedTuple):
    text: str
    tokens: tuple = (1, 2, 3)
    cut: bool = False


def settings(rewards, **others):
    automatic = {"reward_length": 0, "max_tokens": 0}
    return types.SimpleNamespace(rewards=rewards, **(automatic | others))


def rewards_of(rewards, **others):
    return Rewards.of(settings(rewards, **others), DEFAULT)


def values(name, answers, question=QUESTION, **others):
    with rewards_of({name: 1}, **others) as rewards:
        return rewards.score(question, answers).total.tolist()


def test_an_answer_is_judged_as_by_scripts_evaluate():
    answers = [Answer(" 7"), Answer(" it is 7"), Answer(" \\boxed{7.0}"), Answer(" 8"), Answer("")]
    assert values("exact", answers) == [1, 0, 0, 0, 0]
    assert values("number", answers) == [1, 1, 1, 0, 0]
    boxed = QUESTION._replace(right="so \\boxed{7}")
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
    question = QUESTION._replace(right="\\boxed{7}") if name == "boxed" else QUESTION
    answers = [Answer(question.right, cut=True), Answer(question.right)]
    assert values(name, answers, question) == [0, 1]
    assert values("partial", answers, question) == [1, 1]


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
        scored = rewards.score(QUESTION._replace(right="71"), [Answer("71"), Answer("79"), Answer("so 71")])
    assert rewards.names == ("exact", "partial", "number")
    assert scored.values.dtype == scored.total.dtype == torch.float64
    assert scored.values.tolist() == [[1, 1, 1], [0, 0.5, 0], [0, 0, 1]]
    assert scored.total.tolist() == [-0.75, 0.125, -2]


@pytest.mark.parametrize(
    "given, said",
    [
        ({"rewards": {"exakt": 1}}, "did you mean exact"),
        ({"rewards": {"quality": 1}}, "there is no such reward"),
        ({"rewards": {"exact": "much"}}, "exact=much: expected a number"),
        ({"rewards": {"exact": float("nan")}}, "expected a number"),
        ({"rewards": {"exact": True}}, "expected a number"),
        ({"rewards": {"exact": 0}}, "at least one weight"),
        ({"rewards": {}}, "at least one weight"),
        ({"rewards": {"length": 1}}, "give --reward_length"),
        ({"rewards": {"exact": 1}, "reward_length": 9}, "add it to --rewards"),
        ({"rewards": {"length": 1}, "reward_length": 9, "max_tokens": 9}, "never be too long"),
    ],
)
def test_settings_that_make_no_sense(given, said):
    with pytest.raises(UserError, match=said):
        Rewards.of(settings(**given), DEFAULT)


def test_right_answers_that_cannot_be_read():
    questions = [QUESTION, QUESTION._replace(right="seven")]
    rewards_of({"exact": 1, "partial": 1}).check(questions)
    with pytest.raises(UserError, match="--rewards number: a right answer has no number: 'seven'"):
        rewards_of({"exact": 1, "number": 1}).check(questions)
