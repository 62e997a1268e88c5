"""An evaluation of a training on rewards: greedy answers to the held-out questions, and what they are worth.

The questions are asked in blocks that do not depend on the number of processes, which take turns with them.
So one process and two get the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch

from rwkv_miss.errors import UserError
from rwkv_miss.progress import Progress, say

from ..config.launcher import is_first_process
from ..data.encode import Encoder
from ..data.held_out import SAMPLE_CHARACTERS
from ..data.questions import Questions
from ..evaluation.answering import ROWS, completed
from ..evaluation.rewards import Failed, Rewards, Scored
from ..inference.engine import Engine
from ..inference.request import Answer, Request
from ..inference.torch_decoder import TorchDecoder
from ..model import RWKV
from ..planning.drawing import rows_at_once
from .patient_rewards import PatientRewards
from .process_group import ALONE, Processes
from .validation_log import Evaluated, both_ends


class Judged(NamedTuple):
    """The answer to a question, and what it is worth."""

    place: int  # of the question
    text: str
    tokens: int
    cut: bool
    values: tuple[float, ...]  # of each reward; empty where they failed
    total: float  # their weighted sum; NaN where they failed


class Round(NamedTuple):
    """What a process has after its share: answers, why rewards failed by kind, and why it could not go on."""

    judged: list[Judged]
    failures: dict[str, str]
    error: str


class Said(NamedTuple):
    """A greedy answer, as the rewards see it."""

    text: str
    tokens: list[int]
    cut: bool


class RewardEvaluation:
    """Asks the held-out questions. Every rank takes part in answers(), and gets the same."""

    def __init__(self, encoder: Encoder, rewards: Rewards, timeout: float):
        self.encoder, self.rewards, self.timeout = encoder, rewards, timeout
        self.told: set[str] = set()  # kinds of failures that were said

    def answers(
        self,
        model: RWKV,
        questions: Questions,
        samples: int,
        processes: Processes = ALONE,
        is_stopped: Callable[[], bool] = lambda: False,
    ) -> Evaluated | None:
        """The rewards of greedy answers, the first of which are samples.

        None where on some rank is_stopped() between two blocks. UserError, on all ranks, where the model
        overflows. Dropout and gradients are to be off.
        """
        mine = Round([], {}, "")
        blocks = list(_blocks(len(questions), _rows(model)))
        self.patient = PatientRewards(self.rewards, self.timeout)
        own = sum(map(len, blocks[processes.rank :: processes.world]))
        with Progress("answering", own, "questions", is_first_process()) as bar:
            for turn in range(0, len(blocks), processes.world):
                stopped = torch.tensor(float(is_stopped()), device=model.emb.weight.device)
                if processes.total(stopped):
                    return None
                for block in blocks[turn + processes.rank : turn + processes.rank + 1]:
                    mine = mine if mine.error else self._block(model, questions, block, mine, bar)
        everything = processes.gathered(mine)
        if error := next(filter(None, (part.error for part in everything)), None):
            raise UserError(f"held-out questions: {error}; lower --lr_init")
        self._tell({kind: why for part in everything for kind, why in part.failures.items()})
        judged = sorted(one for part in everything for one in part.judged)
        return self._evaluated(questions, judged, samples)

    def _block(self, model: RWKV, questions: Questions, block: range, so_far: Round, bar: Progress) -> Round:
        """A round with one more block."""
        engine = Engine(TorchDecoder(model, len(block)), self.encoder.tokenizer)
        stops = self.encoder.template.stops
        requests = [
            Request(questions.prompts[place].tolist(), questions.max_tokens, stops=stops) for place in block
        ]
        judged, failures = list(so_far.judged), dict(so_far.failures)
        try:
            given = dict(completed(engine, requests, bar))
        except UserError as error:
            return so_far._replace(error=str(error))
        for number, place in enumerate(block):
            answer = given[number]
            scored = self._score(questions, place, answer)
            if isinstance(scored, Failed):
                failures.setdefault(scored.kind, scored.reason)
                values, total = (), math.nan
            else:
                values, total = tuple(scored.values[0].tolist()), float(scored.total[0])
            cut = answer.finish == "length"
            judged.append(Judged(place, answer.text, len(answer.tokens), cut, values, total))
        return Round(judged, failures, "")

    def _score(self, questions: Questions, place: int, answer: Answer) -> Scored | Failed:
        said = Said(answer.text, answer.tokens, answer.finish == "length")
        return self.patient.score(questions[place], [said])

    def _tell(self, failures: dict[str, str]) -> None:
        """Say each kind of failure once."""
        for kind, reason in failures.items():
            if kind not in self.told and is_first_process():
                say(f"note: an answer to a held-out question does not count, as its rewards failed: {reason}")
        self.told |= failures.keys()

    def _evaluated(self, questions: Questions, judged: list[Judged], samples: int) -> Evaluated:
        scored = [one for one in judged if one.values]
        reward = _mean(one.total for one in scored)
        metrics = {
            "reward": reward,
            **{
                f"reward_{name}": _mean(one.values[number] for one in scored)
                for number, name in enumerate(self.rewards.names)
            },
            "length": _mean(one.tokens for one in judged),
            "cut": _mean(one.cut for one in judged),
            "failed": float(len(judged) - len(scored)),
        }
        shown = [
            {
                "prompt": questions[one.place].prompt,
                "answer": both_ends(one.text.strip(), SAMPLE_CHARACTERS),
                "right": both_ends(str(questions[one.place].right), SAMPLE_CHARACTERS),
                "reward": one.total if one.values else None,
            }
            for one in judged[:samples]
        ]
        tokens = sum(one.tokens for one in judged)
        return Evaluated(-reward, metrics, len(judged), tokens, shown)


def _rows(model: RWKV) -> int:
    """How many questions are asked at once: whatever memory is free, and however many processes there are."""
    accelerator = "gpu" if model.emb.weight.is_cuda else "cpu"
    return rows_at_once(model.arch, model.dtype.itemsize, accelerator, ROWS[accelerator])


def _blocks(count: int, size: int) -> Iterator[range]:
    for begin in range(0, count, size):
        yield range(begin, min(count, begin + size))


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return math.fsum(values) / len(values) if values else math.nan
