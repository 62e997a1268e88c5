"""LoRA (Hu et al., arXiv 2106.09685)."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from .. import adapter
from ..adapter import AdapterLinear, register
from ..errors import UserError
from ..functional import lora_linear


@dataclasses.dataclass(frozen=True)
class Options(adapter.Options):
    """rank r, and alpha: the update is scaled by alpha / r (0: alpha = 2 r, as in the MiSS paper's Table 7)."""

    alpha: float = 0.0
    aliases: ClassVar[dict[str, str]] = {**adapter.Options.aliases, "lora_r": "rank", "lora_alpha": "alpha"}

    def __post_init__(self):
        object.__setattr__(self, "alpha", self.alpha or 2.0 * self.rank)  # frozen, and recorded as it is used

    def with_rank(self, rank: int) -> Options:
        # another rank keeps the factor alpha / r
        return dataclasses.replace(super().with_rank(rank), alpha=self.alpha * rank / self.rank)


@register("lora")
class LoraLinear(AdapterLinear):
    """dW = (alpha / r) B A with A = `lora_A` (r, in), Kaiming uniform, and B = `lora_B` (out, r), zero; both fp32."""

    Options = Options
    default_lr = 2e-4  # ten times MiSS's: at equal rates LoRA moves W by about a tenth as much (arXiv 2602.04998)

    def setup(self, options: Options) -> None:
        limit = min(self.in_features, self.out_features)
        if not 1 <= options.rank <= limit:
            raise UserError(f"rank {options.rank} does not fit LoRA: it must be from 1 to the smaller width, {limit}")
        self.scale = options.alpha / options.rank
        self.lora_A = nn.Parameter(torch.empty(options.rank, self.in_features, device=self.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, options.rank, device=self.weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def delta(self) -> Tensor:
        return self.scale * (self.lora_B @ self.lora_A)

    def forward(self, x: Tensor) -> Tensor:
        return lora_linear(x, self.weight, self.bias, self.lora_A, self.lora_B, self.scale)
