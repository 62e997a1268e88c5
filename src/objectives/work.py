"""Work of a run, in tokens, and the time that it takes."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Speed:
    """Speed of a run, and its source."""

    tokens: float  # trained a second, 0 if unknown
    answer: float = 0.0  # seconds for one more token of all sample answers together
    source: str = ""
    drawn: float = 0.0  # tokens of answers a second, if a run draws them; 0: by DRAWN


# The time of a drawn token, as a share of a trained one's: 128 answers of the demo's model took 0.10 s to
# draw, and 0.19 s to train on with their prompts.
DRAWN = 0.6


@dataclasses.dataclass(frozen=True)
class Work:
    """Work of a part of a run, in tokens."""

    trained: float  # a token that is only read counts as a part of a trained one
    drawn: float = 0.0  # one after another, in answers that are drawn together

    def __add__(self, other: Work) -> Work:
        return Work(self.trained + other.trained, self.drawn + other.drawn)

    def times(self, count: float) -> Work:
        return Work(count * self.trained, count * self.drawn)

    @property
    def total(self) -> float:
        """Work in trained tokens."""
        return self.trained + DRAWN * self.drawn

    def seconds(self, speed: Speed) -> float:
        if not speed.drawn:
            return self.total / speed.tokens
        return self.trained / speed.tokens + self.drawn / speed.drawn


@dataclasses.dataclass(frozen=True)
class Times:
    """Estimated seconds of a run's parts, without the search for a learning rate."""

    tokens: float  # to train on, with repetitions
    evaluation_share: float  # of all evaluations without sample answers, of the training's work
    training: float = 0.0  # seconds; 0 where no speed is known
    evaluation: float = 0.0  # with sample answers
    reference: float = 0.0  # of the pass of the reference, where none is kept already
    sampling: float = 0.0  # seconds of the training in which answers are sampled
    provided: str = ""  # assumption behind the time, as "if ..."
