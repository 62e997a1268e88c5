"""DoRA, weight-decomposed low-rank adaptation (Liu et al., arXiv 2402.09353)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..adapter import About, prepare_again, register
from ..errors import UserError
from ..functional import autocast, without_autocast
from ..gemm import product
from ..quantised import dense
from .lora import LoraLinear, Options
from .operators import times_columns


@register("dora")
class DoraLinear(LoraLinear):
    """W + dW = m V / ||V|| row by row, V = W + scale B A, with LoRA's A and B and m = `magnitude` (out).

    m is fp32 and starts as the norms of W's rows. The gradient takes ||V|| for a constant (section 4.3). The
    norms are computed without V: ||w||^2 + 2 scale <w, b A> + scale^2 ||b A||^2 for the rows w of W and b of
    B. If the base is quantised afterwards, ||w||^2 is still the file's.

    The backward keeps LoRA's tensors, and x V^T. Dropout acts on A's input, as in LoRA, and not on the norms.
    """

    about = About(
        "DoRA", "m (W + s B A) / norm - W, row by row", "r (d + k) + d", "B 0, m the norms", "2402.09353"
    )
    # default_lr is LoRA's: A and B begin as LoRA's do, with the same gradients

    def setup(self, options: Options) -> None:
        super().setup(options)
        self.magnitude = nn.Parameter(torch.ones(self.out_features, device=self.stored.device))
        self.register_buffer(
            "squares", torch.ones(self.out_features, device=self.stored.device), persistent=False
        )
        self.register_load_state_dict_post_hook(prepare_again)

    def start(self) -> None:
        squares = self._squares()
        if not squares.all():
            raise UserError(
                f"{int((squares == 0).sum())} rows of the weight are zero and have no direction; drop the"
                " target, or take the method lora"
            )
        self.magnitude.copy_(squares.sqrt())

    def prepare(self) -> None:
        self.squares = self._squares()

    def _squares(self) -> Tensor:
        return self.base_weight().square().sum(1)

    @torch.no_grad()
    def _norms(self, dtype: torch.dtype) -> Tensor:
        """Compute ||V|| row by row, (out); W A^T is computed in `dtype`."""
        A, B = self.lora_A, self.lora_B
        cross = product(dense(self.matrix, self.in_features, dtype).to(dtype), A.to(dtype))
        sums = self._squares() if self.stored.requires_grad else self.squares
        squares = sums + self.scale * (B * (2 * cross + self.scale * (B @ (A @ A.t())))).sum(1)
        # detached, because no_grad() lets torch.func.jvp's tangents pass
        return squares.clamp(min=torch.finfo(squares.dtype).tiny).sqrt().detach()

    def forward(self, x: Tensor) -> Tensor:
        x = autocast(x)
        with without_autocast(x.device):
            # before the product: torch.compile with dynamic shapes fails if an operator sees `scale` first
            factor = self.magnitude / self._norms(x.dtype)
        return times_columns(self.lora_forward(x, None), factor, self.bias)

    def low_rank(self) -> None:
        return None

    def delta(self) -> Tensor:
        weight = self.base_weight()
        V = weight + super().delta()
        return (self.magnitude / V.detach().norm(dim=1)).unsqueeze(1) * V - weight

    def add_delta_to(self, weight: Tensor) -> None:
        super().add_delta_to(weight)
        weight.mul_((self.magnitude / weight.norm(dim=1)).unsqueeze(1))
