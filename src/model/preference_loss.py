"""The losses on preferences between answers, of the log-probabilities of their tokens."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class PreferenceLoss:
    """A loss on preferences with its settings."""

    kind: str  # dpo, ipo, orpo, simpo or kto
    beta: float
    sft_weight: float  # of the chosen answer's cross entropy, per token
    average: bool  # dpo: the mean of an answer's log-probabilities, not their sum
    label_smoothing: float
    gamma: float  # simpo's margin
    orpo_lambda: float
    desirable_weight: float
    undesirable_weight: float

    @property
    def needs_reference(self) -> bool:
        """Whether the log-probabilities of a reference model are needed."""
        return self.kind in ("dpo", "ipo", "kto")

    @property
    def paired(self) -> bool:
        """Whether a unit is a pair of answers; else it is one answer with a label."""
        return self.kind != "kto"
