"""Rewards with a limit on the time of failures: a function that hangs would delay every group."""

from __future__ import annotations

import time
from collections.abc import Sequence

from ...data.questions import Question
from ...evaluation.rewards import Failed, GivenAnswer, Rewards, Scored

PATIENCE = 3  # timeouts that are waited for, at least
SHARE = 0.1  # share of the groups that may time out, if these are more than PATIENCE


class PatientRewards:
    """Rewards for the answers of one rollout phase, or of one evaluation.

    Once failures have taken PATIENCE times `timeout` seconds, or as long as a tenth of `groups` that run out
    of time, no more is asked, and all that is left fails.
    """

    def __init__(self, rewards: Rewards, timeout: float, groups: int):
        self.rewards = rewards
        self.patience = max(PATIENCE, SHARE * groups) * timeout  # seconds
        self.waited = 0.0  # seconds, for rewards that failed

    def score(self, question: Question, answers: Sequence[GivenAnswer]) -> Scored | Failed:
        """Score as Rewards.score() does."""
        if self.waited > self.patience:
            return Failed(
                "given up",
                f"rewards that failed had taken {self.waited:.0f} s, and were asked for no more",
            )
        begun = time.monotonic()
        scored = self.rewards.score(question, answers)
        if isinstance(scored, Failed):
            self.waited += time.monotonic() - begun
        return scored
