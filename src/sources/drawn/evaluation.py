"""Evaluation of a training on rewards: greedy answers to the held-out questions, with their rewards.

The questions are asked in blocks that do not depend on the number of processes, which take turns with them.
So one process and two get the same numbers.
"""

from __future__ import annotations

import abc
import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch

from rwkv_miss.errors import UserError
from rwkv_miss.progress import Progress, say

from ...common.first_process import is_first_process
from ...common.formatting import both_ends
from ...data.encode import Encoder
from ...data.held_out import SAMPLE_CHARACTERS
from ...data.questions import Questions
from ...distributed.process_group import ALONE, Processes, processes_of
from ...evaluation.answering import ROWS, completed
from ...evaluation.rewards import Failed, GroupRewards, Rewards
from ...inference.engine import Engine
from ...inference.request import Answer, Request
from ...inference.torch_decoder import TorchDecoder
from ...model import RWKV
from ..base import Evaluated, Evaluation
from ..held_out_answers import in_common
from .rollouts import PatientRewards
from .sizes import rows_at_once


class Judged(NamedTuple):
    """Answer to a question, with its rewards."""

    place: int  # place of the question
    text: str
    tokens: int
    cut: bool
    values: tuple[float, ...]  # one for each reward; empty if they failed
    total: float  # their weighted sum; NaN if they failed


@dataclasses.dataclass
class ProcessAnswers:
    """Answers of one process."""

    judged: list[Judged] = dataclasses.field(default_factory=list)
    failures: dict[str, str] = dataclasses.field(default_factory=dict)  # why rewards failed, by kind
    error: str = ""  # why the process could not go on

    def add(self, place: int, answer: Answer, scored: GroupRewards | Failed) -> None:
        values, total = (), math.nan
        if isinstance(scored, Failed):
            self.failures.setdefault(scored.kind, scored.reason)
        else:
            values, total = tuple(scored.values[0].tolist()), float(scored.total[0])
        self.judged.append(Judged(place, answer.text, len(answer.tokens), answer.cut, values, total))


class DrawnEvaluation(Evaluation):
    """Evaluation of greedy answers to the held-out questions. Every process gets the same."""

    def __init__(self, encoder: Encoder, rewards: Rewards, timeout: float):
        self.encoder, self.rewards, self.timeout = encoder, rewards, timeout
        self.reported: set[str] = set()  # kinds of failures that were reported

    def measure(self, trainer, is_stopped: Callable[[], bool]) -> Evaluated | None:
        module, processes = trainer.lightning_module, processes_of(trainer)
        samples = module.config.eval_samples
        return self.answers(module.model, module.data.evaluated, samples, processes, is_stopped)

    def answers(
        self,
        model: RWKV,
        questions: Questions,
        samples: int,
        processes: Processes = ALONE,
        is_stopped: Callable[[], bool] = lambda: False,
    ) -> Evaluated | None:
        """Score greedy answers; the first ones are samples.

        Returns None if on some rank is_stopped() between two blocks. Raises UserError, on all ranks, if the
        model overflows. The caller turns dropout and gradients off.
        """
        blocks = list(_blocks(len(questions), _rows(model)))
        count = sum(map(len, blocks[processes.rank :: processes.world]))
        answered, rewards = ProcessAnswers(), PatientRewards(self.rewards, self.timeout, count)
        with Progress("answering", count, "questions", is_first_process()) as bar:
            for turn in range(0, len(blocks), processes.world):
                stopped = torch.tensor(float(is_stopped()), device=model.emb.weight.device)
                if processes.total(stopped):
                    return None
                number = turn + processes.rank
                # after an error this process still takes turns, as the others wait for it
                if number >= len(blocks) or answered.error:
                    continue
                try:
                    answers = self._answers(model, questions, blocks[number], bar)
                except UserError as error:
                    answered.error = str(error)
                    continue
                for place, answer in zip(blocks[number], answers, strict=True):
                    answered.add(place, answer, rewards.score(questions[place], [answer]))
        everything = processes.gathered(answered)
        if error := next(filter(None, (part.error for part in everything)), None):
            raise UserError(f"held-out questions: {error}; lower --lr_init")
        self._tell({kind: why for part in everything for kind, why in part.failures.items()})
        judged = sorted(one for part in everything for one in part.judged)
        return self._evaluated(questions, judged, samples)

    def _answers(self, model: RWKV, questions: Questions, block: range, bar: Progress) -> list[Answer]:
        """Answer the questions at these places. Raises UserError if the model overflows."""
        engine = Engine(TorchDecoder(model, len(block)), self.encoder.tokenizer)
        stops = self.encoder.template.stops
        requests = [
            Request(questions.prompts[place].tolist(), questions.max_tokens, stops=stops) for place in block
        ]
        answers = dict(completed(engine, requests, bar))
        return [answers[number] for number in range(len(block))]

    def _tell(self, failures: dict[str, str]) -> None:
        """Report each kind of failure once."""
        for kind, reason in failures.items():
            if kind not in self.reported and is_first_process():
                say(f"note: a held-out question is left out, as its rewards failed: {reason}")
        self.reported |= failures.keys()

    def _evaluated(self, questions: Questions, judged: list[Judged], samples: int) -> Evaluated:
        loss, metrics = self._scores(questions, judged)
        metrics |= {"length": _mean(one.tokens for one in judged), "cut": _mean(one.cut for one in judged)}
        shown = [
            {
                "prompt": questions[one.place].prompt,
                "answer": both_ends(one.text.strip(), SAMPLE_CHARACTERS),
                "right": both_ends(str(questions[one.place].answer), SAMPLE_CHARACTERS),
                **({"reward": one.total if one.values else None} if self.rewards.names else {}),
            }
            for one in judged[:samples]
        ]
        tokens, cut = sum(one.tokens for one in judged), sum(one.cut for one in judged)
        said = [one.text.strip() for one in judged]
        common = in_common(said, [str(questions[one.place].answer) for one in judged], cut)
        return Evaluated(loss, metrics, len(judged), tokens, shown, common)

    @abc.abstractmethod
    def _scores(self, questions: Questions, judged: list[Judged]) -> tuple[float, dict[str, float]]:
        """Return (the loss of an evaluation, its metrics)."""


class RewardEvaluation(DrawnEvaluation):
    """Evaluation by the rewards of the answers."""

    def _scores(self, questions: Questions, judged: list[Judged]) -> tuple[float, dict[str, float]]:
        """Return (the loss of an evaluation, its metrics): minus the mean reward, and what rewards tell."""
        scored = [one for one in judged if one.values]
        reward = _mean(one.total for one in scored)
        return -reward, {
            "reward": reward,
            "reward_error": _error_of_mean([one.total for one in scored]),
            **{
                f"reward_{name}": _mean(one.values[number] for one in scored)
                for number, name in enumerate(self.rewards.names)
            },
            "failed": float(len(judged) - len(scored)),
        }


def _rows(model: RWKV) -> int:
    """Return the number of questions that are answered at once; free memory does not count, as it differs
    between processes."""
    accelerator = "gpu" if model.emb.weight.is_cuda else "cpu"
    return rows_at_once(model.arch, model.dtype.itemsize, accelerator, ROWS[accelerator])


def _blocks(count: int, size: int) -> Iterator[range]:
    for begin in range(0, count, size):
        yield range(begin, min(count, begin + size))


def _error_of_mean(values: list[float]) -> float:
    """Return the standard error of the mean; NaN for fewer than two values."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return math.fsum(values) / len(values) if values else math.nan
