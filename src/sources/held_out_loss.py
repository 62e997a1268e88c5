"""Evaluations by a loss: on held-out documents or preferences, with sample answers to a few of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from rwkv_miss.progress import Progress

from ..common.batch import Batch
from ..common.first_process import is_first_process
from ..data.bos import begins_with, without_bos
from ..data.encode import Encoder
from ..data.examples import Examples
from ..data.held_out import (
    SAMPLE_CHARACTERS,
    SAMPLE_TOKENS,
    SampleQuestion,
    evaluation_batches,
    evaluations,
)
from ..distributed.process_group import processes_of
from ..evaluation.answering import completed
from ..inference.engine import Engine
from ..inference.request import Answer, Request
from ..inference.torch_decoder import TorchDecoder
from .base import Evaluated, Evaluation
from .drawn.sizes import rows_at_once
from .held_out_answers import Judge, limit_of


class HeldOutLoss(Evaluation):
    """Evaluation by the loss on a run's held-out documents."""

    def __init__(self, module):
        self.module, self.encoder, data = module, module.data.encoder, module.data
        steps, times = module.total_steps, evaluations(module.total_steps, module.config.eval_steps)
        asked = module.source.cost.chosen_questions(
            data.held_out, data.encoder, module.schedule, steps, times
        )
        to_judge = [question for question in asked if not question.is_text]
        self.judge, self.limit = Judge(to_judge, data.encoder), limit_of(to_judge)
        # questions come before texts, which are shown and not judged
        self.questions = sorted(asked, key=lambda question: question.is_text)

        is_entropy = module.source.loss.metrics.nats[:1] == ("loss",)
        self.bytes = text_bytes(data.evaluated, data.encoder) if is_entropy else 0

    def measure(self, trainer, is_stopped: Callable[[], bool]) -> Evaluated | None:
        evaluated = self.module.data.evaluated
        found = validation_loss(trainer, evaluated, is_stopped)
        if found is None:
            return None
        decode, bos, answers = self.encoder.tokenizer.decode, self.encoder.bos, self._answers()
        samples = [
            {
                "prompt": decode(without_bos(question.prompt, bos)),
                "answer": shortened(answer.text.strip(), SAMPLE_CHARACTERS, answer.cut),
                "right": shortened(decode(question.answer).strip(), SAMPLE_CHARACTERS),
            }
            for question, answer in list(zip(self.questions, answers))[: self.module.config.eval_samples]
        ]
        # take rank 0's loss: two GPUs may round differently, and all ranks must agree on the best state
        judged = trainer.strategy.broadcast(self.judge.counted(answers[: len(self.judge.right)]))
        if self.bytes and math.isfinite(found[0]):
            bits = found[0] * evaluated.weight / math.log(2) / self.bytes
            judged = {**judged, "bits_per_byte": bits}
        return Evaluated(*found, evaluated.weight, evaluated.targets, samples, judged)

    def _answers(self) -> list[Answer]:
        """Answer the questions greedily. Every rank makes all answers, in step."""
        if not self.questions:
            return []
        model = self.module.model
        # a row has a state, and the memory is the training's, also on a GPU
        rows = rows_at_once(model.arch, model.dtype.itemsize, "cpu", len(self.questions))
        engine = Engine(TorchDecoder(model, rows), self.encoder.tokenizer)
        requests = [self._request(question) for question in self.questions]
        with Progress("answering", len(requests), "questions", is_first_process()) as bar:
            answers = dict(completed(engine, requests, bar))
        return [answers[place] for place in range(len(requests))]

    def _request(self, question: SampleQuestion) -> Request:
        if question.is_text:
            return Request(question.prompt, SAMPLE_TOKENS, characters=SAMPLE_CHARACTERS)
        stops, limit = self.encoder.template.stops, min(SAMPLE_TOKENS, self.limit)
        characters = math.inf if self.judge.score else SAMPLE_CHARACTERS
        return Request(question.prompt, limit, stops=stops, characters=characters)


def text_bytes(documents: Examples, encoder: Encoder) -> int:
    """Count the bytes of the tokens that are predicted of running text; 0 where some are not trained."""
    eod, size = tuple(encoder.tokenizer.eod), 0
    for document in documents:
        start = max(1, len(encoder.bos) if begins_with(document.ids, encoder.bos) else 0)
        if (document.weights[start:] != 1).any():
            return 0
        ids = document.ids[start:].tolist()
        end = len(ids) - (len(eod) if eod and tuple(ids[-len(eod) :]) == eod else 0)
        size += len(encoder.tokenizer.decode(ids[:end]).encode())
    return size


def shortened(text: str, characters: int, cut: bool = False) -> str:
    """Shorten a text to at most `characters`. A longer one ends in "…", and so does one that is `cut`
    already.

    Half a character, as a limit of tokens leaves it, is left out.
    """
    whole = text.rstrip("\ufffd")
    if whole == text and len(text) <= characters and not cut:
        return text
    return f"{whole[: characters - 1]}…"


def validation_loss(
    trainer, documents: Examples, is_stopped: Callable[[], bool] = lambda: False
) -> tuple[float, dict[str, float]] | None:
    """Compute (the mean loss over all trained tokens of the documents, weighted, in nats, or over their
    examples; the other means of a preference).

    Every rank takes part and gets the same numbers. None where on some rank is_stopped() between two batches.
    Packing and the number of processes do not change the result: rows don't see each other, each batch is
    computed by one process, and float64 has room enough for fp32 sums to be added without rounding, in any
    order.
    """
    strategy, module = trainer.strategy, trainer.lightning_module
    source, processes = module.source, processes_of(trainer)
    weight = math.fsum(document.weight for document in documents)
    total = torch.zeros((), dtype=torch.float64, device=strategy.root_device)
    sums: Tensor | None = None

    def batches(examples: Examples) -> Iterator[Batch]:
        return _batches(trainer, examples, weight, is_stopped)

    try:
        entries = source.before_evaluation(documents, batches, module.policy)
        for turn, batch in enumerate(batches(documents)):
            loss, metrics = strategy.validation_step(batch.having(**entries), turn)
            total += loss
            sums = metrics if sums is None else sums + metrics
    except _Stopped:
        return None
    loss = float(processes.total(total)) / weight
    return loss, source.loss.means(processes.total(sums).tolist()) if len(sums) else {}


class _Stopped(Exception):
    """Stop of a rank between two batches; all of them raise it."""


def _batches(trainer, documents: Examples, weight: float, is_stopped: Callable[[], bool]) -> Iterator[Batch]:
    """Yield the batches of this rank, as many as every other one has, on its device."""
    strategy, world, module = trainer.strategy, trainer.world_size, trainer.lightning_module
    config = module.config
    batches = evaluation_batches(documents, config.ctx_len, config.micro_bsz, config.random_seed)
    collate = documents.collator(module.source.chunks.size, module.shared)
    with Progress("validation", len(documents), "documents", is_first_process()) as bar:
        for first in range(0, len(batches), world):
            stopped = torch.tensor(float(is_stopped()), device=strategy.root_device)
            if strategy.reduce(stopped, reduce_op="sum"):
                raise _Stopped
            # a rank without a batch takes one without a target: all of them must do the same operations
            mine = batches[first + trainer.global_rank] if first + trainer.global_rank < len(batches) else []
            # the longest of the rows that the ranks have now
            width = sum(document.inputs for document in batches[first][0])
            yield strategy.batch_to_device(collate(mine, weight).having(width=width))
            bar.update(sum(len(row) for rows in batches[first : first + world] for row in rows))
