"""Forgetting: how far the tuned model has moved from its base on a fixed text."""

from __future__ import annotations

import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from ..evaluation.kl_divergence import divergence, sections
from ..model import RWKV
from ..sources.reference_model import FromReference


class Forgetting(Callback):
    """Callback that measures mean KL(base || tuned) at the end of a run, for each section of the text and
    "all".

    They are in `result`, which is empty if the tokenizer has no tokens for the text. It stays None where
    `base_file` is empty, because there is no base to compare with, as in a training from scratch, and where
    the run was interrupted. The callback starts before a resumed run has its state back, so it stands before
    the Saver.
    """

    def __init__(self, tokenizer, base_file: str, is_complete):
        self.sections, self.is_complete = sections(tokenizer), is_complete
        self.base = FromReference(self._features, base_file) if base_file else None
        self.result: dict[str, float] | None = None

    def on_fit_start(self, trainer, module) -> None:
        if self.base:
            self.base.start(trainer, module)

    def on_train_end(self, trainer, module) -> None:
        if not self.base or not self.is_complete(trainer.global_step):
            return
        moved = self.base.measure(trainer, module, divergence)
        self.result = {name: float(part.mean()) for name, part in zip(self.sections, moved, strict=True)}
        if moved:
            self.result["all"] = float(torch.cat(moved).mean())

    def _features(self, model: RWKV) -> list[Tensor]:
        device = model.emb.weight.device
        return [model.features(torch.tensor([ids], device=device))[0][0] for ids in self.sections.values()]
