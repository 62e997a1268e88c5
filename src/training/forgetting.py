"""What a run forgets: how far the tuned model has moved from its base on a fixed text."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor

import rwkv_miss
from rwkv_miss.adapter import AdapterLinear, only_linears_change
from rwkv_miss.files.model_files import read_tensors

from ..evaluation.kl_divergence import TOKENS_AT_ONCE, divergence, sections
from .objective import undisturbed


class Forgetting(Callback):
    """Measures mean KL(base || tuned) at the end of a run, of each section of the text and of "all".

    They are in `result`, which is empty where the tokenizer has no tokens for the text. It is None for a new
    model, which has no base file, and for a run that was interrupted.

    With an adapter on linears alone the base is there at the end, under disabled(). Otherwise what its head
    gets is taken before the first step, and its head is read from its file. A resumed run must not have its
    state back by then, so this callback stands before the Saver.
    """

    def __init__(self, tokenizer, base_file: str, is_complete):
        self.sections = sections(tokenizer)
        self.base_file, self.is_complete = base_file, is_complete
        self.before: list[Tensor] | None = None
        self.result: dict[str, float] | None = None

    def on_fit_start(self, trainer, module) -> None:
        if self.base_file and not only_linears_change(module.model):
            with undisturbed(trainer.strategy.model, trainer.strategy.root_device):
                self.before = self._features(module)

    def on_train_end(self, trainer, module) -> None:
        if not self.base_file or not self.is_complete(trainer.global_step):
            return
        with undisturbed(trainer.strategy.model, trainer.strategy.root_device):
            before = self.before
            if before is None:
                with rwkv_miss.disabled(module.model):
                    before = self._features(module)
            base_head, after = self._base_head(module), self._features(module)
            moved = [
                _divergences(base_head, module.model.head, *pair) for pair in zip(before, after, strict=True)
            ]
        self.result = {name: float(part.mean()) for name, part in zip(self.sections, moved, strict=True)}
        if moved:
            self.result["all"] = float(torch.cat(moved).mean())

    def _features(self, module) -> list[Tensor]:
        """What the head gets of each section, (T, C).

        All ranks take part, because ZeRO-3 gathers the model on the way.
        """
        return [
            module.model.features(torch.tensor([ids], device=module.device))[0][0]
            for ids in self.sections.values()
        ]

    def _base_head(self, module) -> Callable[[Tensor], Tensor]:
        """(T, C) -> the base's logits (T, V)."""
        if self.before is None:
            head = module.model.head
            return head.base_forward if isinstance(head, AdapterLinear) else head
        weight = read_tensors(self.base_file)["head.weight"].to(module.device, module.model.dtype)
        return lambda x: F.linear(x, weight)


def _divergences(base_head: Callable, head: Callable, before: Tensor, after: Tensor) -> Tensor:
    """(T,) KL(base || tuned), from what the two heads get of a section."""
    # a few tokens at a time: the logits of all of them would be the most memory that many a run needs
    blocks = zip(before.split(TOKENS_AT_ONCE), after.split(TOKENS_AT_ONCE), strict=True)
    return torch.cat([divergence(base_head(base), head(tuned)) for base, tuned in blocks])
