"""PiSSA, LoRA that begins with the principal part of the weight (Meng et al., arXiv 2404.02948)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from ..adapter import About, AdapterLinear, option, register
from ..errors import UserError
from ..quantised import is_of_others
from . import lora
from .lora import LoraLinear, check_rank
from .operators import lora_linear

# further directions of a randomised SVD, beyond the rank (Halko et al., arXiv 0909.4061, 4.2: 5 or 10)
OVERSAMPLING = 10


@dataclasses.dataclass(frozen=True)
class Options(lora.Options):
    """Options of LoRA, and niter. alpha 0 stands for the factor 1, as in the paper.

    The SVD's random numbers come from torch's generator. At a width of 2048 the exact SVD takes 24 times as
    long (1.8 s on one core) as the randomised one; in wider layers the factor is larger.
    """

    niter: int = option(4, "subspace iterations of a randomised SVD; 0: the exact one, slow for wide layers")
    aliases: ClassVar[dict[str, str]] = {**lora.Options.aliases, "svd_niter": "niter"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.niter < 0:
            raise UserError(
                f"niter {self.niter} is no number of iterations; it must be at least 0 (0: the exact SVD)"
            )

    def own_alpha(self) -> float:
        return float(self.rank**0.5 if self.rslora else self.rank)


def principal_part(weight: Tensor, rank: int, niter: int) -> tuple[Tensor, Tensor]:
    """Return (B0 (out, r), A0 (r, in)): B0 A0 is the part of `weight` with the largest singular values.

    weight: (out, in) fp32. Each factor carries the square roots of the singular values.
    """
    if niter:
        u, s, v = torch.svd_lowrank(weight, min(rank + OVERSAMPLING, *weight.shape), niter)
        vt = v.t()
    else:
        u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root.unsqueeze(1) * vt[:rank]


@register("pissa")
class PissaLinear(LoraLinear):
    """dW = scale (B A - B0 A0), where scale B0 A0 is the principal part of W.

    A = `lora_A` (r, in) and B = `lora_B` (out, r) start as A0 and B0, all fp32. The file keeps A0 and B0 as
    `initial_A` and `initial_B`; a merge needs nothing else.

    W - scale B0 A0 replaces the frozen weight, in new memory and in W's dtype, so that a step costs what
    LoRA's does. In bf16 and fp16 this residual is rounded, and a fresh adapter moves the output by about the
    rounding error of W. A merge starts from the file's W, without that error. If the base is quantised
    afterwards, the residual is quantised, not W (QPiSSA).
    """

    about = About(
        "PiSSA",
        "s (B A - B0 A0), B0 A0 the r largest singular directions of W",
        "r (d + k)",
        "A0, B0",
        "2404.02948",
    )
    Options = Options
    constants = ("initial_A", "initial_B")
    decays = False  # with A and B at zero the weight is W - B0 A0, not W
    # as in the paper and in MiSS's paper (Table 7): A and B are large from the start
    default_lr = 2e-5
    step_reach = AdapterLinear.step_reach  # MiSS's: A and B both move, and begin as large as W

    def setup(self, options: Options) -> None:
        check_rank(self, options.rank)
        super().setup(options)
        self.niter = options.niter
        # zeros, because nothing has been subtracted from the weight yet
        self.register_buffer("initial_A", torch.zeros_like(self.lora_A.detach()))
        self.register_buffer("initial_B", torch.zeros_like(self.lora_B.detach()))

    def start(self) -> None:
        if not self.initial_B.any():  # in a resumed run the initial factors are already loaded
            B, A = principal_part(self.base_weight(), len(self.lora_A), self.niter)
            self.initial_A.copy_(A / self.scale**0.5)
            self.initial_B.copy_(B / self.scale**0.5)
        self.lora_A.copy_(self.initial_A)
        self.lora_B.copy_(self.initial_B)

    def prepare(self) -> None:
        self._add_to_weight(-self.scale)

    def revert(self) -> None:  # in half precision not exact
        self._add_to_weight(self.scale)

    def _add_to_weight(self, factor: float) -> None:
        """Add factor B0 A0 to the frozen weight, computed in fp32, in new memory.

        The old memory may belong to a file or to another model.
        """
        if not self.initial_B.any():
            return
        if is_of_others(self.stored) or not self.stored.is_floating_point():
            raise UserError(
                "PiSSA changes the frozen weight, which is quantised already; load the adapter first and"
                " quantise after that"
            )
        exact = self.matrix.to(torch.promote_types(self.matrix.dtype, torch.float32))
        self.put_matrix(self._plus_principal(exact, factor))

    def _plus_principal(self, weight: Tensor, factor: float) -> Tensor:
        return weight.addmm(self.initial_B.to(weight.dtype), self.initial_A.to(weight.dtype), alpha=factor)

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """Return factors of twice the rank, for the difference of two products."""
        return torch.cat((self.lora_A, self.initial_A)), self.scale * torch.cat(
            (self.lora_B, -self.initial_B), 1
        )

    def delta(self) -> Tensor:
        # B A - B0 A0, written so that it is exactly zero at the start
        return self.scale * (
            (self.lora_B - self.initial_B) @ self.lora_A + self.initial_B @ (self.lora_A - self.initial_A)
        )

    def add_delta_to(self, weight: Tensor) -> None:
        weight.addmm_(self.lora_B - self.initial_B, self.lora_A, alpha=self.scale)
        weight.addmm_(self.initial_B, self.lora_A - self.initial_A, alpha=self.scale)

    def base_weight(self) -> Tensor:
        return self._plus_principal(super().base_weight(), self.scale)

    def base_forward(self, x: Tensor) -> Tensor:
        return lora_linear(x, self.matrix, self.bias, self.initial_A, self.initial_B, self.scale)
