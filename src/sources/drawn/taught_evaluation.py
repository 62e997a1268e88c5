"""Evaluation of on-policy distillation: greedy answers to the held-out questions, and their KL."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from rwkv_miss.progress import Progress

from ...data.answer_batches import GROUP, collate_answers
from ...data.answer_example import AnswerGroup
from ...data.held_out import SampleQuestion
from ...data.questions import Questions
from ...data.templates import answer_text
from ...evaluation.scoring import SCORES
from ...inference.request import Answer
from ...model import RWKV
from ..base import Evaluated
from ..held_out_answers import Judge
from .evaluation import DrawnEvaluation, Judged
from .sizes import have_answers


class TaughtEvaluation(DrawnEvaluation):
    """Evaluation by the KL from the teacher, per token of greedy answers, and by how many are right.

    Answers are judged as a supervised training judges them (held_out_answers.Judge), if there are reference
    answers.
    """

    def measure(self, trainer, is_stopped: Callable[[], bool]) -> Evaluated | None:
        self.module = trainer.lightning_module
        # sums over this process's answers: the KL, and the tokens
        self.sums = torch.zeros(2, dtype=torch.float64, device=self.module.device)
        return super().measure(trainer, is_stopped)

    def _answers(self, model: RWKV, questions: Questions, block: range, bar: Progress) -> list[Answer]:
        answers, size = super()._answers(model, questions, block, bar), self.module.config.micro_bsz
        groups = [
            AnswerGroup.of(questions.prompts[place], [answer.tokens], [0.0], [np.zeros(len(answer.tokens))])
            for place, answer in zip(block, answers, strict=True)
        ]
        for start in range(0, len(groups), size):
            self._read(model, groups[start : start + size])
        return answers

    def _read(self, model: RWKV, groups: list[AnswerGroup]) -> None:
        """Add the KL of some answers."""
        source, shared = self.module.source, self.module.shared
        loss = source.loss
        rows = [[group] for group in groups]
        batch = collate_answers(rows, 1.0, source.chunks.size, shared, GROUP).to(self.sums.device)
        batch = self.module.data.teacher.with_entries(batch)
        self.sums[0] += loss.reported(*loss(model, batch, source.chunks))
        self.sums[1] += batch.targets.numel()

    def _scores(self, questions: Questions, judged: list[Judged]) -> tuple[float, dict[str, float]]:
        """Return (the KL per token, the share of right answers, where they are known)."""
        kl, tokens = self.module.policy.processes.total(self.sums).tolist()
        return kl / tokens, self._right(questions, judged)

    def _right(self, questions: Questions, judged: list[Judged]) -> dict[str, float]:
        tokenizer, template = self.encoder.tokenizer, self.encoder.template
        if not have_answers(questions.questions):
            return {}
        asked = [
            SampleQuestion(prompt.tolist(), tokenizer.encode(question.answer))
            for prompt, question in zip(questions.prompts, questions.questions, strict=True)
        ]
        judge = Judge(asked, self.encoder)
        if not judge.score:
            return {}
        said = [answer_text(one.text, template, questions[one.place].opening) for one in judged]
        right = [judge.right[one.place] for one in judged]
        return {"right_answers": sum(map(SCORES[judge.score].agree, said, right)) / len(judged)}
