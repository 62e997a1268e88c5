"""LoRA-FA, LoRA with a frozen A (Zhang et al., arXiv 2308.03303)."""

from __future__ import annotations

from ..adapter import About, register
from .lora import LoraLinear, ScaledOptions


@register("lora_fa")
class LoraFALinear(LoraLinear):
    """dW = scale B A as in LoRA. A = `lora_A` (r, in) is frozen, B = `lora_B` (out, r) is trained.

    The backward keeps x A^T and not x. The file also holds A: another version of torch could make another A
    from the same seed.
    """

    about = About("LoRA-FA", "s B A, A random and frozen", "r d", "B 0", "2308.03303")
    Options = ScaledOptions
    # default_lr is LoRA's: A hardly moves in LoRA either while B is near zero

    def setup(self, options: ScaledOptions) -> None:
        super().setup(options)
        frozen = self.lora_A.detach()
        del self.lora_A
        self.register_buffer("lora_A", frozen)
