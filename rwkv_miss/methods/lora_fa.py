"""LoRA-FA, LoRA with a frozen A (Zhang et al., arXiv 2308.03303)."""

from __future__ import annotations

from ..adapter import register
from .lora import LoraLinear, ScaledOptions


@register("lora_fa")
class LoraFALinear(LoraLinear):
    """LoRA whose A = `lora_A` stays what it is at the start. Only B is trained, so that for the backward x
    A^T is kept and not x.

    The file holds A as well: a random matrix that follows from a seed could be another one in another version
    of torch.
    """

    Options = ScaledOptions
    # default_lr is LoRA's: while B is near zero A has no gradient to speak of there either, and B the same
    # one

    def setup(self, options: ScaledOptions) -> None:
        super().setup(options)
        frozen = self.lora_A.detach()
        del self.lora_A
        self.register_buffer("lora_A", frozen)
