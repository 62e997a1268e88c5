"""Section 5.4, Fig. 4 right: the norm of the first gradient of every method at every rank, against full
fine-tuning's, from one backward.

At the start every method's model is the base, so one backward gives G = dL/dW of every linear. A method's
gradient is the gradient of sum(G * delta()) for its parameters: for MiSS the shard sums of G, for LoRA
s G A^T. `full` is the norm of G over the same linears.

The norm ignores the direction. So there is also the cosine between -G, full fine-tuning's change of the
weights, and the change that the method's first SGD step makes. Random G of the same shapes with independent
columns separate a method's scale from its effect on real gradients: for them E ||fold(G)||^2 = ||G||^2 holds
for MiSS at every rank.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

import rwkv_miss
from rwkv_miss.adapter import adapted_linears
from rwkv_miss.target_checks import find_targets

from . import tasks
from .methods import named
from .results import Claim, PaperResult, Table
from .settings import option

STEP = 1e-3  # length of the SGD step, relative to the trained tensors', or if these are zero to the weights'
ALIKE = 2  # norms that differ by less than this factor count as equally large


@dataclasses.dataclass(frozen=True)
class Settings:
    models: tuple[str, ...] = option(tuple(tasks.MAKE), f"of {', '.join(tasks.MAKE)}")
    ranks: tuple[int, ...] = option(
        (2, 4, 8, 16, 32), "rank of every method; not its parameters, as in the paper's figure"
    )
    data: str = option("../shared/data", "folder with the models and texts of others")


FULL = Settings()
TINY = Settings(models=("demo",), ranks=(3, 16))


def weight_gradients(task: tasks.Task) -> dict[str, Tensor]:
    """Compute G (out, in) of every linear that the paper adapts, by name, from one backward of the base."""
    model = copy.deepcopy(task.model).requires_grad_(False)
    weights = {name: linear.weight.requires_grad_() for name, linear in find_targets(model, None).items()}
    task.loss(model).backward()
    return {name: weight.grad for name, weight in weights.items()}


def independent(shape: torch.Size) -> Tensor:
    """Draw a random G whose columns are independent."""
    return torch.randn(shape)


def behind_relu2(shape: torch.Size) -> Tensor:
    """Draw a random G = dY^T X of 512 tokens with independent dY and inputs X = relu(z)^2, which have a mean,
    as in the channel mix.
    """
    return torch.randn(512, shape[0]).t() @ torch.randn(512, shape[1]).relu().square()


RANDOM: dict[str, Callable[[torch.Size], Tensor]] = {"random": independent, "random, relu^2": behind_relu2}


@dataclasses.dataclass(frozen=True)
class First:
    """First gradient of a method: its norm, the norm by linear, and the cosine of the first SGD step with
    full fine-tuning's.
    """

    norm: float
    by_linear: dict[str, float]
    cosine: float


def norm(tensors) -> float:
    return math.sqrt(sum(float(t.detach().double().square().sum()) for t in tensors))


def first_gradient(model: nn.Module, gradients: dict[str, Tensor], method: str, options: dict) -> First:
    """Compute the first gradient of a method on a model whose adapted linears have the gradients G."""
    model = copy.deepcopy(model)
    rwkv_miss.inject(model, method, targets=list(gradients), **options)
    layers = adapted_linears(model)
    start = {name: layer.delta() for name, layer in layers.items()}
    sum((start[name] * g).sum() for name, g in gradients.items()).backward()
    trained = [p for p in model.parameters() if p.grad is not None]
    total = norm(p.grad for p in trained)
    length = STEP * (norm(p for p in trained) or norm(layer.weight for layer in layers.values()))
    with torch.no_grad():
        for p in trained:
            p -= (length / total) * p.grad
        moved = {name: layer.delta() - start[name] for name, layer in layers.items()}
    along = -sum(float((moved[name] * g).sum()) for name, g in gradients.items())
    by_linear = {
        name: norm(p.grad for p in layer.parameters(recurse=False) if p.grad is not None)
        for name, layer in layers.items()
    }
    return First(total, by_linear, along / (norm(moved.values()) * norm(gradients.values())))


@dataclasses.dataclass(frozen=True)
class Case:
    """A model with gradients G of its linears, and the systems' first gradients: (label, rank) -> First."""

    gradients: dict[str, Tensor]
    found: dict[tuple[str, int], First]

    @property
    def full(self) -> float:
        return norm(self.gradients.values())

    def ratio(self, label: str, rank: int) -> float:
        return self.found[label, rank].norm / self.full

    def by_leaf(self, label: str, rank: int) -> dict[str, float]:
        """Average the ratio for the linears of each kind, such as att.key."""
        kinds: dict[str, list[str]] = {}
        for name in self.gradients:
            kinds.setdefault(".".join(name.split(".")[-2:]), []).append(name)
        first, ratios = self.found[label, rank], {}
        for kind, names in kinds.items():
            adapters = math.hypot(*(first.by_linear[name] for name in names))
            ratios[kind] = adapters / norm(self.gradients[name] for name in names)
        return ratios

    def ranks(self, label: str) -> list[int]:
        """List the ranks of this system that fit the model."""
        return [rank for other, rank in self.found if other == label]

    def pairs(self, read: Callable[[First], float]) -> list[tuple[float, float]]:
        """Pair (MiSS's, LoRA's) at every rank."""
        return [
            (read(self.found["miss", rank]), read(self.found["lora", rank])) for rank in self.ranks("miss")
        ]

    def norm_ratios(self) -> list[tuple[float, float]]:
        """Return pairs() of the norm over full fine-tuning's."""
        return self.pairs(lambda first: first.norm / self.full)


def measure(model: nn.Module, gradients: dict[str, Tensor], ranks: tuple[int, ...]) -> Case:
    """Measure every system at every rank that fits the model."""
    found = {}
    for rank in ranks:
        for label, (method, options) in named(2 * rank).items():  # mini: D (r, r)
            torch.manual_seed(0)
            with contextlib.suppress(rwkv_miss.UserError):  # a rank, or a mini_r, that does not fit
                found[label, rank] = first_gradient(model, gradients, method, {**options, "rank": rank})
    return Case(gradients, found)


def cases(settings: Settings) -> dict[str, Case]:
    """Measure every model with its own gradients, and the first of them with random ones."""
    made = {name: tasks.make(name, settings.data) for name in settings.models}
    found = {name: measure(task.model, weight_gradients(task), settings.ranks) for name, task in made.items()}
    model = made[settings.models[0]].model
    for name, draw in RANDOM.items():
        torch.manual_seed(1)
        found[name] = measure(
            model,
            {linear: draw(m.weight.shape) for linear, m in find_targets(model, None).items()},
            settings.ranks,
        )
    return found


def labels_of(found: dict[str, Case]) -> list[str]:
    """List the systems that fit a model, each once."""
    return list(dict.fromkeys(label for case in found.values() for label, _ in case.found))


def table(caption: str, found: dict[str, Case], read: Callable[[Case, str, int], float]) -> Table:
    labels = labels_of(found)
    rows = []
    for name, case in found.items():
        for rank in dict.fromkeys(rank for _, rank in case.found):
            cells = [read(case, label, rank) if (label, rank) in case.found else None for label in labels]
            rows.append((f"{name}, r = {rank}", *cells))
    return Table(caption, ("gradients", *labels), rows)


def claims(found: dict[str, Case]) -> list[Claim]:
    real = {name: case for name, case in found.items() if name not in RANDOM}
    return [norms_alike(real), norms_of_lora(real), direction(real, found["random"]), balanced_shards(real)]


def norms_alike(real: dict[str, Case]) -> Claim:
    miss = [of_miss for case in real.values() for of_miss, _ in case.norm_ratios()]
    by_kind = [case.by_leaf("miss", max(case.ranks("miss"))) for case in real.values()]
    loudest = {max(ratios, key=ratios.get) for ratios in by_kind}
    return Claim(
        "MiSS's first gradient is about as large as full fine-tuning's, at every rank",
        f"{min(miss):.2f} to {max(miss):.2f} of it; at the highest rank the most at"
        f" {' and '.join(sorted(loudest))}",
        1 / ALIKE < min(miss) and max(miss) < ALIKE,
    )


def norms_of_lora(real: dict[str, Case]) -> Claim:
    pairs = [pair for case in real.values() for pair in case.norm_ratios()]
    lora = [of_lora for _, of_lora in pairs]
    smaller = [of_miss > of_lora for of_miss, of_lora in pairs]
    grows = []  # for neighbouring ranks on every model: whether the norm grows
    for case in real.values():
        norms = [of_lora for _, of_lora in case.pairs(lambda first: first.norm)]
        grows += [b > a for a, b in itertools.pairwise(norms)]
    return Claim(
        "LoRA's is smaller, and grows with the rank",
        f"{min(lora):.2f} to {max(lora):.2f} of it, smaller than MiSS's at"
        f" {sum(smaller)} of {len(smaller)} ranks and models, larger with the next"
        f" rank at {sum(grows)} of {len(grows)}; 2 sqrt(r / 3 k) for independent columns",
        all(smaller) and all(grows),
    )


def direction(real: dict[str, Case], random: Case) -> Claim:
    scales = [of_miss for of_miss, _ in random.norm_ratios()]
    cosines = [pair for case in real.values() for pair in case.pairs(lambda first: first.cosine)]
    ahead = sum(of_miss > of_lora for of_miss, of_lora in cosines)
    return Claim(
        "so MiSS is closer to full fine-tuning",
        f"it is a scale: random gradients give {min(scales):.2f} to {max(scales):.2f} at every rank. In"
        " its direction the first SGD step of MiSS is nearer to full fine-tuning's than LoRA's at"
        f" {ahead} of {len(cosines)}",
        ahead == len(cosines),
    )


def balanced_shards(real: dict[str, Case]) -> Claim:
    label = "miss, balanced"
    ratios = [case.ratio(label, rank) for case in real.values() for rank in case.ranks(label)]
    return Claim(
        "(balanced shards are not the paper's)",
        f"every other block of columns subtracted: {min(ratios):.2f} to {max(ratios):.2f} of full "
        "fine-tuning's norm",
    )


def draw(found: dict[str, Case], figure) -> None:
    """Draw the ratio against the rank, one plot a case, and the legend in the last place."""
    columns, rows = 3, len(found) // 3 + 1
    figure.set_size_inches(15, 4.5 * rows)
    axes = list(figure.subplots(rows, columns, sharey=True, squeeze=False).flat)
    labels = labels_of(found)
    for axis, (name, case) in zip(axes, found.items()):
        for number, label in enumerate(labels):
            ranks = case.ranks(label)
            axis.plot(
                ranks,
                [case.ratio(label, rank) for rank in ranks],
                "o-" if number < 10 else "o--",
                markersize=3,
                label=label,
                color="k" if label == "miss" else f"C{number}",
            )
        axis.axhline(1, color="k", linestyle=":", label="full")
        axis.set(yscale="log", xlabel="rank", ylabel="norm / full fine-tuning's", title=name)
        axis.set_xscale("log", base=2)
    for axis in axes[len(found) :]:
        axis.set_axis_off()
    axes[-1].legend(*axes[0].get_legend_handles_labels(), loc="center")


def run(settings: Settings) -> PaperResult:
    torch.set_num_threads(1)  # a second one costs such small models more than it brings
    found = cases(settings)
    rank = settings.ranks[-1]
    rows = []
    for name, case in found.items():
        if ("miss", rank) in case.found:
            rows += [(name, kind, ratio) for kind, ratio in case.by_leaf("miss", rank).items()]
    kinds = Table(
        f"The same by kind of linear, MiSS, r = {rank}: more where inputs have a mean (behind relu^2,"
        " ffn.value), since columns of G are then alike",
        ("gradients", "linears", "norm / full"),
        rows,
    )
    return PaperResult(
        "The first gradient: its norm against full fine-tuning's (Section 5.4, Fig. 4 right)",
        "Over the linears that the paper adapts. rwkv6-3m: a small RWKV-6 on Shakespeare; rwkv7-reverse and"
        " demo: small RWKV-7 that reverse digits or letters, on a task changed for fine-tuning. random:"
        " independent columns in the shapes of the first model; random, relu^2: G = dY^T X with inputs"
        " relu(z)^2. One backward for each. A cell is empty where a rank does not fit the model, or a method"
        " (DoRA and magnitudes: rwkv7-reverse has rows of zeros). Agrees: at every rank on every model;"
        f" about as large is {1 / ALIKE:g} to {ALIKE:g} times.",
        claims(found),
        [
            table(
                "Norm of the first gradient / full fine-tuning's",
                found,
                lambda case, label, rank: case.ratio(label, rank),
            ),
            table(
                "Cosine of the change of the weights by the first SGD step with full fine-tuning's (sqrt(r /"
                " k) where columns are independent)",
                found,
                lambda case, label, rank: case.found[label, rank].cosine,
            ),
            kinds,
        ],
        lambda figure: draw(found, figure),
    )
