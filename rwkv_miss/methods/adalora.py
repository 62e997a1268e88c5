"""AdaLoRA, low-rank adaptation whose ranks go where they matter (Zhang et al., arXiv 2303.10512)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..adapter import About, AdapterLinear, Gather, GradientOf, option, register
from ..errors import UserError
from ..functional import without_autocast
from .lora import LoraLinear, ScaledOptions, check_rank

TRAINED = ("lora_A", "lora_E", "lora_B")


@dataclasses.dataclass(frozen=True)
class Options(ScaledOptions):
    """Options of AdaLoRA.

    rank: the mean rank of the linears after the last pruning. With `rank_map` the sum of all ranks counts.
    The factor of B A is alpha / init_rank.
    """

    init_rank: int = option(0, "rank of each linear at first, at most its smaller width. 0: 1.5 r")
    tinit: int = option(-1, "optimizer steps before the first pruning. -1: 10 % of all")
    tfinal: int = option(-1, "optimizer steps after the last pruning. -1: 30 % of all")
    delta_t: int = option(10, "optimizer steps between two prunings")
    beta1: float = option(0.85, "smoothing of the sensitivity")
    beta2: float = option(0.85, "smoothing of the sensitivity's uncertainty")
    orth: float = option(0.5, "weight of the penalty on factors that are not orthogonal")
    aliases: ClassVar[dict[str, str]] = {
        **ScaledOptions.aliases,
        "init_r": "init_rank",
        "target_r": "rank",
        "deltaT": "delta_t",
        "orth_reg_weight": "orth",
    }

    def __post_init__(self) -> None:
        object.__setattr__(self, "init_rank", self.init_rank or self.rank + self.rank // 2)
        super().__post_init__()
        if self.init_rank < self.rank:
            raise UserError(
                f"init_rank {self.init_rank} is below the final rank, {self.rank}; raise init_rank or lower"
                " the rank"
            )
        if self.delta_t < 1 or min(self.tinit, self.tfinal) < -1:
            raise UserError(
                f"tinit {self.tinit}, tfinal {self.tfinal}, delta_t {self.delta_t}: must be numbers of steps,"
                " delta_t 1 or more"
            )
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)}: must be at least 0 and below 1")
        if self.orth < 0:
            raise UserError(f"orth {self.orth}: must not be negative (0: no penalty)")

    @property
    def first_rank(self) -> int:
        return self.init_rank

    def with_rank(self, rank: int) -> Options:
        init_rank = max(rank, round(self.init_rank * rank / self.rank))
        alpha = self.alpha if self.rslora else self.alpha * init_rank / self.init_rank
        return super().with_rank(rank, init_rank=init_rank, alpha=alpha)


def budget(step: int, total: int, first: int, last: int, options: Options) -> int:
    """Count the singular values of all linears that are left after step `step` (1-based) of `total`.

    Cubic from `first` to `last` (equation 12).
    """
    begin, end = pruning_steps(total, options)
    if step >= end:
        return last
    if step <= begin:
        return first
    return last + round((first - last) * (1 - (step - begin) / (end - begin)) ** 3)


def pruning_steps(total: int, options: Options) -> tuple[int, int]:
    """Return (the step after which pruning begins, the step of the last pruning)."""
    begin = total // 10 if options.tinit < 0 else options.tinit
    last = 3 * total // 10 if options.tfinal < 0 else options.tfinal
    return begin, max(total - last, 1)


@register("adalora")
class AdaLoraLinear(LoraLinear):
    """dW = scale P diag(E - offset) Q with P = `lora_B` (out, r), Q = `lora_A` (r, in), E = `lora_E` (r).

    P and Q start as N(0, 0.02), the singular values E at zero; all are fp32.

    Every delta_t steps the singular values of the least important triplets among all linears become zero.
    Importance: s(E_i) + mean_j s(P_ji) + mean_j s(Q_ij), where s is the smoothed sensitivity |w dL/dw| times
    its smoothed uncertainty (equations 8 to 11). Pruned triplets are still trained and may come back until
    the last pruning.

    A pruning sets `offset` (r) to E and does not write to E: ZeRO and loss scaling keep copies of a
    parameter, which would overwrite the zeros. All processes see the same reduced gradients, so each computes
    the same offsets and averages. The file has E and offset; only a run's checkpoint keeps the averages.
    """

    about = About(
        "AdaLoRA",
        "s B diag(E) A, the least important of all E pruned during training",
        "r (d + k + 1), r the `init_rank`",
        "E 0",
        "2303.10512",
    )
    Options = Options
    default_lr = 5e-4  # the paper's lowest rate, for MNLI and CoLA (table 8): P, Q and E begin small

    def setup(self, options: Options) -> None:
        check_rank(self, options.rank)
        self.options, self.scale, self.dropout, self.lora_plus = options, options.scale, options.dropout, 1.0
        first = min(options.init_rank, self.in_features, self.out_features)
        device = self.stored.device
        self.lora_A = nn.Parameter(torch.empty(first, self.in_features, device=device))
        self.lora_E = nn.Parameter(torch.zeros(first, device=device))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, first, device=device))
        nn.init.normal_(self.lora_A, std=0.02)
        nn.init.normal_(self.lora_B, std=0.02)
        self.register_buffer("offset", torch.zeros(first, device=device))
        for name in TRAINED:
            for kind in ("sensitivity", "uncertainty"):
                self.register_buffer(f"{kind}_{name}", torch.zeros_like(getattr(self, name).detach()))

    def trained(self) -> dict[str, nn.Parameter]:
        """Return Q, E and P by their names."""
        parameters = dict(self.named_parameters(recurse=False))
        return {name: parameters[name] for name in TRAINED}

    def own_tensors(self) -> dict[str, Tensor]:
        own = super().own_tensors()
        return {
            name: tensor
            for name, tensor in own.items()
            if not name.startswith(("sensitivity_", "uncertainty_"))
        }

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.lora_A, self.lora_B * (self.lora_E - self.offset)

    @classmethod
    def penalty(cls, layers: list[AdapterLinear], gather: Gather) -> Tensor | None:
        """Compute orth times the mean of ||P^T P - I|| and ||Q Q^T - I|| (Frobenius) over all linears.

        The authors' code and HF peft also take the mean.
        """
        options = layers[0].options
        if not options.orth:
            return None
        terms = []
        for layer in layers:
            # not by attribute, which would make ZeRO-3 keep them whole until the step is over
            A, _, B = layer.trained().values()
            with gather([A, B]):
                # copies: the parameters may be shared out again when the backward comes
                for factor in (A.clone(), B.t().clone()):  # (r, in) and (r, out)
                    with without_autocast(factor.device):
                        product = factor @ factor.t()
                    identity = torch.eye(len(factor), device=factor.device, dtype=factor.dtype)
                    terms.append(torch.linalg.matrix_norm(product - identity))
        return options.orth * torch.stack(terms).mean()

    @classmethod
    @torch.no_grad()
    def before_step(
        cls, layers: list[AdapterLinear], step: int, total: int, gradient_of: GradientOf, gather: Gather
    ) -> None:
        if step > pruning_steps(total, layers[0].options)[1]:
            return
        for layer in layers:
            for name, p in layer.trained().items():
                gradient = gradient_of(p)
                if gradient is not None:
                    with gather([p]):
                        layer.note(name, (p - layer.offset if name == "lora_E" else p) * gradient)

    def note(self, name: str, product: Tensor) -> None:
        """Smooth the sensitivity of one tensor, given weight times gradient."""
        sensitivity, uncertainty = (
            getattr(self, f"{kind}_{name}") for kind in ("sensitivity", "uncertainty")
        )
        finite, now = product.isfinite(), product.abs()  # a step that overflowed carries no information
        sensitivity.lerp_(now.where(finite, sensitivity), 1 - self.options.beta1)
        uncertainty.lerp_((now - sensitivity).abs().where(finite, uncertainty), 1 - self.options.beta2)

    def importance(self) -> Tensor:
        """Compute the importance of each triplet, (r)."""
        A, E, B = (
            getattr(self, f"sensitivity_{name}") * getattr(self, f"uncertainty_{name}") for name in TRAINED
        )
        return E + A.mean(1) + B.mean(0)

    @classmethod
    @torch.no_grad()
    def after_step(cls, layers: list[AdapterLinear], step: int, total: int, gather: Gather) -> None:
        options = layers[0].options
        begin, end = pruning_steps(total, options)
        if step < end and (step <= begin or step % options.delta_t):
            return
        scores = torch.cat([layer.importance() for layer in layers])
        last = sum(min(layer.options.rank, len(layer.offset)) for layer in layers)
        left = budget(step, total, len(scores), last, options)
        kept = torch.zeros_like(scores, dtype=torch.bool)
        kept[scores.argsort(descending=True, stable=True)[:left]] = True
        for layer, mine in zip(layers, kept.split([len(layer.offset) for layer in layers]), strict=True):
            E = layer.trained()["lora_E"]
            with gather([E]):
                layer.offset.copy_(layer.offset.where(mine, E))
