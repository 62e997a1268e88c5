"""LoRA (Hu et al., arXiv 2106.09685)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import adapter
from ..adapter import About, AdapterLinear, option, register
from ..errors import UserError
from ..options import most_specific, names_with
from .operators import lora_linear


@dataclasses.dataclass(frozen=True)
class ScaledOptions(adapter.Options):
    """Options of all methods with factors A and B; rank: r.

    A linear of rank_map keeps the factor alpha / r of the others; with rslora it keeps their alpha. With
    rslora the activations do not change size when r grows; its alpha of 16 is the same factor at rank 64.
    """

    alpha: float = option(
        0.0, "s = alpha / r. 0: 2 r as in the MiSS paper's Table 7, r for pissa, 16 with `rslora`"
    )
    alpha_map: dict[str, float] = names_with(
        "factors",
        'an alpha of its own for linears, by parts of their names as in `rank_map`: `{"ffn": 32,'
        ' "blocks.0.att": 8.5}`',
    )
    rslora: bool = option(False, "true: s = alpha / sqrt(r) ([2312.03732](https://arxiv.org/abs/2312.03732))")
    dropout: float = option(0.0, "share of the adapter's inputs left out, in training only")
    lora_plus: ClassVar[float] = 1.0
    aliases: ClassVar[dict[str, str]] = {
        **adapter.Options.aliases,
        "lora_r": "rank",
        "lora_alpha": "alpha",
        "use_rslora": "rslora",
        "lora_dropout": "dropout",
        "alpha_pattern": "alpha_map",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha < 0:
            raise UserError(f"alpha {self.alpha} must not be negative (0: the method's own)")
        # resolve alpha 0 now, so that the used value is recorded; the dataclass is frozen
        object.__setattr__(self, "alpha", self.alpha or self.own_alpha())
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout {self.dropout} is no probability; it must be at least 0 and below 1")

    def own_alpha(self) -> float:
        """Return the alpha that the option's value 0 stands for."""
        return 16.0 if self.rslora else 2.0 * self.first_rank

    @property
    def first_rank(self) -> int:
        """Return the rank at the start, by which alpha is divided."""
        return self.rank

    @property
    def scale(self) -> float:
        """Return the factor of B A."""
        return self.alpha / (self.first_rank**0.5 if self.rslora else self.first_rank)

    def at(self, name: str) -> ScaledOptions:
        own = super().at(name)
        return dataclasses.replace(own, alpha=most_specific(self.alpha_map, name, own.alpha), alpha_map={})

    def with_rank(self, rank: int, **others: Any) -> ScaledOptions:
        alpha = self.alpha if self.rslora else self.alpha * rank / self.rank
        return super().with_rank(rank, **{"alpha": alpha, **others})


@dataclasses.dataclass(frozen=True)
class Options(ScaledOptions):
    """Options of LoRA."""

    lora_plus: float = option(
        1.0,
        "B's learning rate over A's, for `parameter_groups()`; LoRA+ recommends about 16"
        " ([2402.12354](https://arxiv.org/abs/2402.12354))",
    )
    aliases: ClassVar[dict[str, str]] = {**ScaledOptions.aliases, "loraplus_lr_ratio": "lora_plus"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.lora_plus < math.inf:
            raise UserError(
                f"lora_plus {self.lora_plus} is no ratio of learning rates; it must be above 0 (1: A and B"
                " learn at the same rate)"
            )


def check_rank(layer: AdapterLinear, rank: int) -> None:
    """Raise UserError for a rank beyond the smaller width of a linear."""
    limit = min(layer.in_features, layer.out_features)
    if rank > limit:
        raise UserError(
            f"rank {rank} does not fit {layer.method}: it must be from 1 to the smaller width, {limit}"
        )


@register("lora")
class LoraLinear(AdapterLinear):
    """dW = scale B A with A = `lora_A` (r, in), Kaiming uniform, and B = `lora_B` (out, r), zero; fp32."""

    about = About("LoRA", "s B A", "r (d + k)", "B 0", "2106.09685")
    Options = Options
    # ten times MiSS's: at equal rates LoRA moves W by about a tenth as much (arXiv 2602.04998)
    default_lr = 2e-4

    def setup(self, options: Options) -> None:
        self.scale, self.dropout, self.lora_plus = options.scale, options.dropout, options.lora_plus
        self.lora_A = nn.Parameter(torch.empty(options.rank, self.in_features, device=self.stored.device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, options.rank, device=self.stored.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    @classmethod
    def step_reach(cls, width: int, options: Options) -> float:
        """Estimate the reach of B and A together. B alone, with inputs A x of size 1 / sqrt(3), would give
        alpha / sqrt(3), a rate at which runs of 600 steps collapse (docs/worklog.md).

        For a method with another published rate than LoRA's the reach is changed in proportion.
        """
        return options.scale * options.first_rank * LoraLinear.default_lr / cls.default_lr

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A (r, in) and B (out, r)."""
        return self.lora_A, self.lora_B

    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        A, B = self.factors()
        return A, self.scale * B

    def delta(self) -> Tensor:
        A, B = self.factors()
        return self.scale * (B @ A)

    def add_delta_to(self, weight: Tensor) -> None:
        A, B = self.factors()
        weight.addmm_(B, A, alpha=self.scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.lora_forward(x, self.bias)

    def lora_forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Compute x (W + scale B A)^T + bias, in training with dropout before A."""
        # from torch's generator, so that a recomputed forward (--grad_cp) and a resumed run repeat it
        seed = torch.randint(2**63 - 1, ()) if self.dropout and self.training else None
        return lora_linear(x, self.matrix, bias, *self.factors(), self.scale, self.dropout, seed)

    def rate_factor(self, name: str) -> float:
        return self.lora_plus if name == "lora_B" else 1.0
