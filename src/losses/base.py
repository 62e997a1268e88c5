"""Interface of a loss: formula, options, checks, words. A file of this folder has one.

A loss has options and no state. It sees the model and a batch, and knows no files, devices or processes.
`data` says what its rows are, and `source` names the file of src/sources that makes examples of them.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor

from rwkv_miss.errors import UserError

from ..common.batch import Batch, Reads
from .metrics import SUPERVISED, LossMetrics, Shown

if TYPE_CHECKING:
    from ..model.batch_loss import Chunks
    from ..model.rwkv import RWKV

# documents; pairs of answers; single answers with a label; questions, whose answers the model draws
DOCUMENTS, PAIRS, LABELS, QUESTIONS = DATA = ("documents", "pairs", "labels", "questions")
NO_METRICS = torch.zeros(0, dtype=torch.float64)
Keep = Callable[[Tensor], None] | None  # takes ln p of a micro-batch's trained tokens, (n,)
Default = tuple[str, object, str]  # (setting, value, why)
LOSSES: dict[str, type[Loss]] = {}


class Settings(Protocol):
    """Settings of a run, a config.Config, as a loss sees them."""

    loss: str

    def is_automatic(self, name: str) -> bool: ...

    def __getattr__(self, name: str) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Words:
    """Words of a loss in the plan and in reports."""

    example: str = "document"
    duplicate: str = "word for word"  # how an example is in two files
    reference: str = "reference"  # the model of --reference
    row: str = "row"  # name of the parts that a step consists of
    content: str = ""  # content of a row; "": as many documents as fit
    evaluation: str = "loss on"


@dataclasses.dataclass(frozen=True)
class Facts:
    """Numbers of a loss that the plan's choices ask for."""

    passes: int = 1  # forward passes over an example in a step or an evaluation
    rate_share: float = 1.0  # the chosen rate, as a part of a supervised training's
    usual_rows: int = 8  # the most rows that are chosen for a step
    usual_steps: int = 600  # steps of a run over few data, which are read several times
    has_small_steps: bool = True  # whether a step has fewer of them over few data
    evaluations_between: int = 0  # the most that are chosen between the first evaluation and the last
    asks_samples: bool = True  # whether an evaluation has sample answers in addition to its loss
    keeps_reference: bool = False  # whether the model of --reference stays in memory during the training


class Loss(abc.ABC):
    """Loss with its options."""

    name: ClassVar[str]
    about: ClassVar[str]  # in the help of --loss
    data: ClassVar[str] = DOCUMENTS  # one of DATA
    source: ClassVar[str] = "documents"  # a module of src/sources
    needs_reference: ClassVar[bool] = False
    needs_teacher: ClassVar[bool] = False  # --reference must be given
    words: ClassVar[Words] = Words()
    helps: ClassVar[dict[str, str]] = {}  # option that losses share -> what it is for this one, in the help
    instead: ClassVar[dict[str, str]] = {}  # option of other losses -> what this one has in its place
    metrics: LossMetrics = SUPERVISED  # metrics that are reported in addition to the loss

    @dataclasses.dataclass(frozen=True)
    class Options:
        """Options of the loss: its flags."""

    def __init__(self, options: Any = None):
        self.options = options or self.Options()

    # before a run

    @property
    def facts(self) -> Facts:
        return Facts()

    @classmethod
    def defaults(cls, config: Settings) -> Iterator[Default]:
        """Yield defaults of options that are left to the program."""
        return iter(())

    @classmethod  # noqa: B027
    def check(cls, config: Settings) -> None:
        """Raise UserError for options that do not fit together."""

    @property
    def description(self) -> str:
        """The loss with its options, its name first; "" for --loss sft, which a plan does not name."""
        return ""

    def reads(self) -> Reads:
        """Name the entries of a batch that the loss reads in addition to the tokens."""
        return Reads()

    def judge(self) -> Loss:
        """Return the loss that decides between learning rates."""
        return self

    # in a run

    @abc.abstractmethod
    def __call__(self, model: RWKV, batch: Batch, chunks: Chunks, keep: Keep = None) -> tuple[Tensor, Tensor]:
        """Return (the summed loss of a batch, which is divided by the step's weight; sums of the metrics).

        The sums are float64, as means() takes them. `keep`, of a feed that compares later steps with this
        one, gets ln p of the trained tokens, (n,). The plan gives tensors without values: no size may depend
        on a value.
        """

    def held_out(self, model: RWKV, batch: Batch, chunks: Chunks) -> tuple[Tensor, Tensor]:
        """Return __call__()'s results for held-out examples, by which states are compared."""
        return self(model, batch, chunks)

    def reported(self, loss: Tensor, metrics: Tensor) -> Tensor:
        """Return the loss of a batch that reports show, summed as the trained loss is, from __call__()'s
        results."""
        return loss.detach()

    def joined(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the sums of two micro-batches or processes together."""
        return a + b

    def means(self, sums: list[float]) -> dict[str, float]:
        """Return the metrics by name. `sums` are not empty."""
        return {}


class LogProbLoss(Loss):
    """Loss that is a function of ln p of the trained tokens."""

    def __call__(self, model: RWKV, batch: Batch, chunks: Chunks, keep: Keep = None) -> tuple[Tensor, Tensor]:
        log_probs = chunks.log_probs(model, batch)
        if keep:
            keep(log_probs.detach())
        return self.from_log_probs(log_probs, batch)

    @abc.abstractmethod
    def from_log_probs(self, log_probs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return __call__()'s results from log_probs (n,), in the order of batch.targets."""


class DocumentLoss(Loss):
    """Loss on documents. The loss of held-out ones is the cross entropy, so that all runs can be compared."""

    def held_out(self, model: RWKV, batch: Batch, chunks: Chunks) -> tuple[Tensor, Tensor]:
        return chunks.loss(model, batch), NO_METRICS


class TokenLoss(DocumentLoss, LogProbLoss):
    """Loss on documents that is a function of ln p of each trained token, times the token's weight.

    Reports show the cross entropy, and the loss as a metric of the loss's name.
    """

    @property
    def metrics(self) -> LossMetrics:
        shown = Shown((self.name,), lambda value: f"{self.name} loss {value:.4f}")
        titles = {**SUPERVISED.titles, self.name: f"{self.name} loss, per token"}
        return dataclasses.replace(SUPERVISED, titles=titles, line=(*SUPERVISED.line, shown))

    @abc.abstractmethod
    def token_losses(self, log_probs: Tensor) -> Tensor:
        """Return the loss of each token, (n,)."""

    def from_log_probs(self, log_probs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        weights = torch.ones_like(log_probs) if batch.weights is None else batch.weights
        loss = (self.token_losses(log_probs) * weights).sum()
        with torch.no_grad():
            return loss, torch.stack([-(log_probs * weights).sum(), loss, weights.sum()]).double()

    def reported(self, loss: Tensor, metrics: Tensor) -> Tensor:
        return metrics[0]

    def means(self, sums: list[float]) -> dict[str, float]:
        return {self.name: sums[1] / max(sums[2], 1e-30)}


def register(loss: type[Loss]) -> type[Loss]:
    """Add a loss to LOSSES, which is in the order of the docs: by data, sft first, then by name."""
    LOSSES[loss.name] = loss
    ordered = sorted(LOSSES.values(), key=lambda one: (DATA.index(one.data), one.name != "sft", one.name))
    LOSSES.clear()
    LOSSES.update((one.name, one) for one in ordered)
    return loss


def options_of() -> dict[str, tuple[dataclasses.Field, tuple[str, ...]]]:
    """Map option -> (its field, the losses that have it)."""
    found: dict[str, tuple[dataclasses.Field, tuple[str, ...]]] = {}
    for name, loss in LOSSES.items():
        for field in dataclasses.fields(loss.Options):
            found[field.name] = (field, (*found.get(field.name, (None, ()))[1], name))
    return found


def help_of(option: dataclasses.Field, losses: Iterable[str]) -> str:
    """Put together the help of an option: what it is for each of these losses, then what is true of all."""
    uses: dict[str, list[str]] = {}
    for name in losses:
        uses.setdefault(LOSSES[name].helps.get(option.name, ""), []).append(name)
    own = option.metadata["help"]
    parts = [f"{', '.join(names)}: {use or own}" for use, names in uses.items()]
    return ". ".join(parts if "" in uses else [*parts, own])


def loss_of(config: Settings) -> Loss:
    """Return the loss of a run's settings."""
    loss = LOSSES[config.loss]
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(loss.Options)}
    return loss(loss.Options(**values))


def check_options(config: Settings) -> None:
    """Check that every given option belongs to the loss. Raises UserError."""
    usual = type(config)()
    for name, (_, losses) in options_of().items():
        value = getattr(config, name)
        if config.loss in losses or value == getattr(usual, name):
            continue
        other = f"; {instead}" if (instead := LOSSES[config.loss].instead.get(name)) else ""
        if isinstance(value, dict):
            value = ",".join(f"{key}={item}" for key, item in value.items())
        raise UserError(
            f"--{name} {value} has no meaning with --loss {config.loss}: it is for"
            f" {', '.join(losses)}{other}; drop it, or choose another --loss"
        )
