"""Scores of several answers to each question, against counting all cases."""

import itertools
from fractions import Fraction

import pytest

from scripts.many_samples import counts_to_report, most_frequent, pass_at_k, scores_of
from src.evaluation.scoring import SCORES


@pytest.mark.parametrize("answers", [1, 4, 7])
def test_pass_at_k_is_the_share_of_choices_with_a_right_answer(answers):
    for right in range(answers + 1):
        drawn = [True] * right + [False] * (answers - right)
        for k in range(1, answers + 1):
            choices = list(itertools.combinations(drawn, k))
            want = Fraction(sum(map(any, choices)), len(choices))
            assert pass_at_k(answers, right, k) == pytest.approx(float(want), abs=1e-12)
    assert pass_at_k(1000, 1, 500) == 0.5


def test_the_k_of_the_report():
    assert [counts_to_report(n) for n in (1, 4, 6, 8)] == [[1], [1, 2, 4], [1, 2, 4, 6], [1, 2, 4, 8]]


@pytest.mark.parametrize(
    "results,place",
    [
        ([7, 8, 8], 1),
        ([7, 8, 8, 7], 0),  # the first seen of equally frequent ones
        ([None, None, None, 3], 3),  # who says nothing has no vote
        ([None, None], None),
        ([Fraction(1, 2), "x", Fraction(2, 4)], 0),
    ],
)
def test_the_most_frequent_answer(results, place):
    assert most_frequent(results) == place


def test_like_results_have_one_vote_each():
    """The majority is of what answers say, not of how they write it."""
    for score, alike, other in (
        ("number", ["so 1,080", "#### 1080.0", "The answer is: $1080"], "1081"),
        ("boxed", [r"\boxed{\dfrac12}", r"\boxed{0.5}", "The answer is: 1/2"], r"\boxed{2}"),
        ("exact", ["a", "a", "a"], "b"),
    ):
        result = SCORES[score].result
        assert len({result(text) for text in alike}) == 1 and result(other) != result(alike[0])


def test_the_scores_of_an_evaluation():
    right = [[True, False, True], [False, False, True], [False, False, False]]
    results = [[7, 1, 7], [2, 2, 9], [None, None, None]]
    scores = scores_of(right, results)
    assert scores.accuracy == pytest.approx(3 / 9)
    assert scores.pass_at == pytest.approx({1: 3 / 9, 2: (1 + 2 / 3 + 0) / 3, 3: 2 / 3})
    assert scores.majority == pytest.approx(1 / 3), "the second question's majority is wrong"
    assert scores.record().keys() == {"pass@1", "pass@2", "pass@3", "majority"}
    assert scores.text() == "pass@1 33.3%, pass@2 55.6%, pass@3 66.7%, majority 33.3%"
    assert scores_of(right).majority is None and "majority" not in scores_of(right).record()
