"""Reference: its model, and the distance of the model in training from it.

The distance is taken on the same tokens, over the whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

import rwkv_miss
from rwkv_miss.adapter import only_linears_change
from rwkv_miss.files.checkpoint import Arch
from rwkv_miss.files.identity import Identity
from rwkv_miss.files.model_files import read_tensors

from ..common.batch import Batch
from ..common.device import PRECISIONS
from ..common.first_process import is_first_process
from ..config import Config
from ..data.held_out import evaluation_batches
from ..data.preferences import Preferences
from ..evaluation.kl_divergence import TOKENS_AT_ONCE, divergence
from ..model import RWKV, read_model_file
from ..model.batch_loss import Chunks

EXAMPLES, TOKENS = 8, 4096  # held-out pairs or answers for a KL, and the most tokens of these

Features = Callable[[RWKV], list[Tensor]]  # a model -> the input of its head for each text, (T, C)


def reference_of(reference: str) -> Identity | None:
    """Identify the model of --reference; None if the base itself is the reference."""
    return Identity(reference, shown=is_first_process()) if reference else None


def build_reference(config: Config) -> RWKV:
    """Load the model of --reference as a frozen base, also where the model in training has none."""
    dtype = PRECISIONS[config.precision]
    model = RWKV.load(config.reference, None if config.quant != "none" else dtype, kernel=config.wkv)
    if config.quant != "none":
        model.quantise(config.quant, dtype)
    return model.requires_grad_(False).eval()


def reference_arch(reference: str) -> Arch:
    """Return the sizes of the model of --reference."""
    with _disable_current_modes():  # the plan asks while its tensors have no values
        return Arch.detect(read_model_file(reference))


def relative_work(reference: str, arch: Arch) -> float:
    """Return the work of a token in the layers of --reference, in that of the model's own; 1 without."""
    other = reference_arch(reference) if reference else arch
    return other.n_layer * other.n_embd**2 / (arch.n_layer * arch.n_embd**2)


class LiveTeacher:
    """Model of --reference that stays in memory during the training, and reads the drawn answers."""

    def __init__(self, config: Config, chunks: Chunks, device: torch.device):
        self.model, self.chunks = build_reference(config).to(device), chunks

    @torch.no_grad()
    def with_entries(self, batch: Batch) -> Batch:
        """Give a batch on the device the teacher's entries for losses.distill_on_policy.WholeTeacher."""
        inputs = self.chunks.features(self.model, batch)
        return batch.having(teacher=inputs, teacher_head=self.model.head.weight)


class FromReference:
    """Logits of the reference, for a comparison with those of the model in training.

    The reference is the base in `file`, or the model that `load` reads from there. With an adapter on linears
    alone the base is always available, under disabled(). Otherwise the inputs of its head are computed at the
    start, and the head is read from the file. All ranks take part, because ZeRO-3 gathers the model on the
    way.
    """

    def __init__(self, features: Features, file: str, load: Callable[[], RWKV] | None = None):
        self.features, self.file, self.load = features, file, load
        self.before: list[Tensor] | None = None

    def start(self, trainer, module) -> None:
        """Compute features that training would lose. The model is as before step 1, also in a resumed run."""
        if self.load is None and only_linears_change(module.model):
            return
        with module.policy.undisturbed():
            model = self.load().to(module.device) if self.load else module.model
            self.before = self.features(model)

    def measure(self, trainer, module, kl: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        """Return kl(logits of the reference, logits of the model) at each token of each text, (T,)."""
        with module.policy.undisturbed():
            before = self.before
            if before is None:
                with rwkv_miss.disabled(module.model):
                    before = self.features(module.model)
            base_head, after = self._head(module), self.features(module.model)
            found = []
            for pair in zip(before, after, strict=True):
                # a few tokens at a time, because in many runs the logits of all would need the most memory
                blocks = zip(*(x.split(TOKENS_AT_ONCE) for x in pair), strict=True)
                found.append(torch.cat([kl(base_head(x), module.model.head(y)) for x, y in blocks]))
        return found

    def _head(self, module) -> Callable[[Tensor], Tensor]:
        """Return a function from features (T, C) to the reference's logits (T, V)."""
        if self.before is None:
            head = module.model.head
            is_trained = any(parameter.requires_grad for parameter in head.parameters())
            return (lambda x: _of_base(module.model, x)) if is_trained else head
        weight = read_tensors(self.file)["head.weight"].to(module.device, module.model.dtype)
        return lambda x: F.linear(x, weight)


def _of_base(model: RWKV, x: Tensor) -> Tensor:
    """Return the base's logits. The head is called as a module, so that ZeRO-3 gathers it."""
    with rwkv_miss.disabled(model):
        return model.head(x)


class ReferenceKl:
    """KL(model || reference) on the answers to a few held-out prompts, in nats per token."""

    def __init__(self, module):
        config = module.config
        self.module, self.examples = module, a_few(module.data.evaluated)
        is_base = module.reference and module.reference.fingerprint == module.model.base_fingerprint
        other = module.reference and (config.init_adapter or not is_base)
        load = (lambda: build_reference(config)) if other else None
        self.reference = FromReference(self._features, config.reference or config.load_model, load)

    def measure(self, trainer) -> float:
        """Return the mean over the answers' tokens."""
        found = self.reference.measure(trainer, self.module, lambda base, own: divergence(own, base))
        return float(torch.cat(found).double().mean().clamp(min=0))

    def _features(self, model: RWKV) -> list[Tensor]:
        module, device, config = self.module, self.module.device, self.module.config
        collate = self.examples.collator(module.source.chunks.size, module.shared)
        read = evaluation_batches(self.examples, config.ctx_len, config.micro_bsz, config.random_seed)
        batches = [collate(rows, 1.0) for rows in read]
        return [module.source.chunks.features(model, batch.to(device)) for batch in batches]


def a_few(examples: Preferences) -> Preferences:
    """Take EXAMPLES at equal distances, or the first that have TOKENS together; at least one."""
    places = np.unique(np.linspace(0, len(examples) - 1, EXAMPLES).astype(int))
    fitting = np.cumsum(examples.lengths[places]) <= TOKENS
    return examples.take(places[: max(1, np.count_nonzero(fitting))])
