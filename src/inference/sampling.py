"""Sampling of the next tokens of many answers: temperature, top-p, top-k, penalties, and logprobs.

The native code (cuda/sampling_cpu.cpp) takes all rows in one call. NumPy does the same, row by row. It is the
reference, and runs where the model's WKV is in torch. Neither wakes torch's other threads, which would spin
for a while on the cores that the decoder needs.
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rwkv_miss.errors import UserError
from rwkv_miss.flags import flag

from ..data.chat_template import begins_thoughts
from ..ops import PLAIN, native, self_test
from .constraint import Constraint
from .logit_changes import ChangedLogits

DEFAULT = "; default %(default)s"


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Settings of the choice of the next token.

    temperature 0 (below 1e-5) is greedy. top_k 0 and top_p 1 leave the distribution whole. The penalties
    lower the logit of a token that is in the answer already: presence once, frequency per occurrence. An
    occurrence fades by `penalty_decay` with every token.
    """

    temperature: float = flag(1.0, "how freely tokens are drawn; 0: always the likeliest one" + DEFAULT)
    top_p: float = flag(
        0.7, "draw among the likeliest tokens whose probabilities add up to this; 1: among all" + DEFAULT
    )
    top_k: int = flag(0, "draw among this many of the likeliest tokens; 0: among all" + DEFAULT)
    presence_penalty: float = flag(0.0, "lowers the logit of a token that is in the answer already" + DEFAULT)
    frequency_penalty: float = flag(
        0.0, "lowers a token's logit once for each time that it is in the answer" + DEFAULT
    )
    penalty_decay: float = 0.996

    def __str__(self) -> str:
        return ", ".join(f"{field.name} {getattr(self, field.name):g}" for field in dataclasses.fields(self))

    @property
    def greedy(self) -> bool:
        return self.temperature < 1e-5

    @property
    def penalises(self) -> bool:
        """Tell whether a token's logit depends on how often it is in the answer."""
        return bool(self.presence_penalty or self.frequency_penalty)

    def check(self) -> None:
        """Raise UserError for a number that is out of its range."""
        for name, fits, expected in (
            ("temperature", 0 <= self.temperature < math.inf, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("presence_penalty", math.isfinite(self.presence_penalty), "a finite number"),
            ("frequency_penalty", math.isfinite(self.frequency_penalty), "a finite number"),
            ("penalty_decay", 0 <= self.penalty_decay <= 1, "0 to 1"),
        ):
            if not fits:
                raise UserError(f"{name} {getattr(self, name)}: expected {expected}")


GREEDY = Sampling(temperature=0)
# recommended with the releases of the G1 models, for answers that begin with thoughts and with empty ones
OPEN_THINK = Sampling(0.96, 0.76, 32, presence_penalty=1.0, frequency_penalty=0.1, penalty_decay=0.988)
FAKE_THINK = Sampling(1.0, 0.28, 32)


def recommended(opening: str) -> Sampling | None:
    """Return the recommended sampling for answers after this opening; None if none is known."""
    if begins_thoughts(opening):
        return OPEN_THINK
    return FAKE_THINK if opening else None


class FadedCounts:
    """Counts of an answer's tokens: an occurrence fades by penalty_decay with every token after it.

    It counts only if the sampling has penalties. `ids` (n,) int64 and `counts` (n,) float64 are views,
    valid until the next token.
    """

    def __init__(self, sampling: Sampling):
        self.sampling = sampling
        self._places: dict[int, int] = {}
        self._ids, self._counts = np.empty(64, np.int64), np.empty(64)

    def add(self, token: int) -> None:
        """Count the answer's next token."""
        if not self.sampling.penalises:
            return
        self.counts[:] *= self.sampling.penalty_decay
        new = len(self._places)
        place = self._places.setdefault(token, new)
        if place == new:
            if new == len(self._ids):
                self._ids, self._counts = np.resize(self._ids, 2 * new), np.resize(self._counts, 2 * new)
            self._ids[new], self._counts[new] = token, 0.0
        self._counts[place] += 1

    @property
    def ids(self) -> np.ndarray:
        return self._ids[: len(self._places)]

    @property
    def counts(self) -> np.ndarray:
        return self._counts[: len(self._places)]

    def penalties(self) -> np.ndarray:
        """Return (n,) fp32: how far the logits of `ids` are lowered."""
        sampling = self.sampling
        return sampling.presence_penalty + sampling.frequency_penalty * self.counts.astype(np.float32)


@dataclasses.dataclass(frozen=True)
class RowInputs:
    """Inputs to the choice of one row's token.

    `seen`: the answer so far; None is an empty one. `generator` gives one number a token, if the sampling is
    not greedy; None is torch's own. `logprobs` k asks for ln p of the token and of the k likeliest. The token
    is one that the constraint allows, and is drawn from the changed logits.
    """

    sampling: Sampling
    seen: FadedCounts | None = None
    generator: torch.Generator | None = None
    logprobs: int | None = None
    constraint: Constraint | None = None
    changed: ChangedLogits | None = None


class Drawn(NamedTuple):
    """Token of a row, or an error instead.

    `logprob` is ln p of the token, `likeliest` holds (token, ln p), the likeliest first. p is the raw
    distribution's, before changes, penalties, temperature and constraint.
    """

    token: int | None
    logprob: float | None = None
    likeliest: list[tuple[int, float]] = []
    error: UserError | None = None


def runs_native(kernel: str) -> bool:
    """Tell whether native code chooses tokens, with this WKV kernel. It is built here if need be."""
    return kernel not in PLAIN and not self_test.status("cpu").reason


def choose(logits: Tensor, rows: Sequence[RowInputs], native_code: bool) -> list[Drawn]:
    """Choose one token for each row of logits (B, V), which may be a part of a larger tensor.

    A row whose largest logit is not finite, or whose constraint fails, has an error and disturbs no other. A
    row's token depends on nothing but the row. Raises ValueError unless there is a RowInputs for each.
    """
    if logits.dim() != 2 or len(logits) != len(rows) or not logits.numel():
        raise ValueError(f"logits are {tuple(logits.shape)}, expected (B, V) with B = {len(rows)} rows")
    logits = logits.detach().float().cpu()
    exact = torch.float64
    uniform = [
        0.0 if row.sampling.greedy else torch.rand((), dtype=exact, generator=row.generator).item()
        for row in rows
    ]
    choose_rows = choose_native if native_code else choose_numpy
    if not any(row.constraint or row.changed for row in rows):
        return choose_rows(logits, rows, uniform)
    return [_choose_changed(choose_rows, *given) for given in zip(logits.split(1), rows, uniform)]


def _choose_changed(choose_rows: Callable, logits: Tensor, row: RowInputs, uniform: float) -> Drawn:
    """Choose one row's token from its logits after the changes, (1, V), by the row's constraint.

    Its ln p is from the logits as they are.
    """
    if not (row.constraint or row.changed):
        return choose_rows(logits, [row], [uniform])[0]
    raw, allowed = logits[0].numpy(), None
    if row.constraint:
        try:
            allowed = np.flatnonzero(row.constraint.mask())
        except UserError as error:
            return Drawn(None, error=error)
        except Exception as error:  # whatever the thread that makes masks ended with
            what = f"{type(error).__name__}: {error}"
            return Drawn(None, error=UserError(f"which tokens fit the answer's form is unknown: {what}"))
    # where a form is complete and can't go on, its end is not held
    may_hold = allowed is None or len(allowed) > 1
    values = penalised(row.changed.apply(raw, may_hold) if row.changed else raw, row.seen)
    if allowed is not None:
        values = values.take(allowed)
    if row.changed:
        values = row.changed.drop_unlikely(values)
    (drawn,) = choose_rows(torch.from_numpy(values)[None], [RowInputs(row.sampling)], [uniform])
    if drawn.error:
        return drawn
    token = drawn.token if allowed is None else int(allowed[drawn.token])
    if row.logprobs is None:
        return Drawn(token)
    (first,) = choose_rows(logits, [RowInputs(GREEDY, logprobs=row.logprobs)], [0.0])
    behind = logits[0, first.token].item() - logits[0, token].item()
    return Drawn(token, first.logprob - behind, first.likeliest)


def penalised(logits: np.ndarray, seen: FadedCounts | None) -> np.ndarray:
    """Return logits (V,) without their penalties; the logits themselves if there are none."""
    if not seen or not len(seen.ids):
        return logits
    values = logits.copy()
    values[seen.ids] -= seen.penalties()
    return values


def overflow(largest: float) -> UserError:
    return UserError(
        f"the largest logit is {largest}, expected a finite number: the model overflows; the file may be"
        " damaged, or an adapter's scale too large"
    )


class Choice(ctypes.Structure):
    """Choice of cuda/sampling_cpu.cpp."""

    _fields_ = [
        *((name, ctypes.c_double) for name in ("temperature", "top_p", "uniform")),
        *((name, ctypes.c_int64) for name in ("top_k", "penalised", "logprobs")),
        *((name, ctypes.c_void_p) for name in ("ids", "penalties", "likeliest", "likeliest_logprobs")),
        ("logprob", ctypes.c_double),
        ("token", ctypes.c_int64),
        ("largest", ctypes.c_float),
    ]


def choose_native(
    logits: Tensor, rows: Sequence[RowInputs], uniform: Sequence[float], threads: int = 1
) -> list[Drawn]:
    """Choose by the native code, with a number of [0, 1) for each row. logits (B, V) fp32 on the CPU."""
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    vocabulary = logits.shape[1]
    choices = (Choice * len(rows))()
    arrays = [_fill(choice, *given, vocabulary) for choice, *given in zip(choices, rows, uniform)]
    native.library("cpu").choose_tokens(
        ctypes.c_void_p(logits.data_ptr()),
        ctypes.c_int64(logits.stride(0)),
        ctypes.c_int64(vocabulary),
        choices,
        ctypes.c_int64(len(rows)),
        ctypes.c_int(threads),
    )
    return [_drawn(*given) for given in zip(choices, rows, arrays)]


def _fill(choice: Choice, row: RowInputs, uniform: float, vocabulary: int) -> tuple[np.ndarray, ...]:
    """Fill a row's Choice for the native code; returns the arrays that it points to: penalties, ids, ln p."""
    sampling, seen = row.sampling, row.seen
    choice.temperature = 0.0 if sampling.greedy else sampling.temperature
    choice.top_p, choice.top_k, choice.uniform = sampling.top_p, min(sampling.top_k, vocabulary), uniform
    penalties = ids = logprobs = np.empty(0)
    if seen and len(seen.ids):
        penalties = seen.penalties()
        choice.penalised, choice.ids = len(penalties), seen.ids.ctypes.data
        choice.penalties = penalties.ctypes.data
    choice.logprobs = -1 if row.logprobs is None else min(row.logprobs, vocabulary)
    if row.logprobs:
        ids, logprobs = np.empty(choice.logprobs, np.int64), np.empty(choice.logprobs)
        choice.likeliest, choice.likeliest_logprobs = ids.ctypes.data, logprobs.ctypes.data
    return penalties, ids, logprobs


def _drawn(choice: Choice, row: RowInputs, arrays: tuple[np.ndarray, ...]) -> Drawn:
    if choice.token < 0:
        return Drawn(None, error=overflow(choice.largest))
    if row.logprobs is None:
        return Drawn(choice.token)
    _, ids, logprobs = arrays
    return Drawn(choice.token, choice.logprob, list(zip(ids.tolist(), logprobs.tolist())))


def choose_numpy(
    logits: Tensor, rows: Sequence[RowInputs], uniform: Sequence[float], threads: int = 1
) -> list[Drawn]:
    """Do as choose_native(), in one thread of NumPy."""
    return [_choose_one(*given) for given in zip(logits.numpy(), rows, uniform)]


def _choose_one(raw: np.ndarray, row: RowInputs, uniform: float) -> Drawn:
    values = penalised(raw, row.seen)
    if not np.isfinite(largest := values.max()):
        return Drawn(None, error=overflow(largest))
    token = int(values.argmax()) if row.sampling.greedy else _draw(values, row.sampling, uniform)
    if row.logprobs is None:
        return Drawn(token)
    shifted = raw.astype(np.float64) - raw.max()
    logprobs = shifted - np.log(np.exp(shifted).sum())
    likeliest = [(int(i), float(logprobs[i])) for i in _largest(raw, row.logprobs)]
    return Drawn(token, float(logprobs[token]), likeliest)


def _draw(values: np.ndarray, sampling: Sampling, uniform: float) -> int:
    """Return the token that a number of [0, 1) stands for, in the order of the ids."""
    order, weights, total = _likeliest(values, sampling)
    # the smallest set of tokens whose probability reaches top_p; the first one always stays
    before = weights.cumsum(dtype=np.float64) - weights
    likely = np.sort(order[: max(1, int((before < sampling.top_p * total).sum()))])
    shares = np.exp((values[likely].astype(np.float64) - values.max()) / sampling.temperature).cumsum()
    # rounding may make the product the whole sum: the last share has no upper bound
    return int(likely[np.searchsorted(shares[:-1], uniform * shares[-1], side="right")])


def _likeliest(logits: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, np.ndarray, float]:
    """Return (ids, weights, total weight) of the likeliest tokens in order: top_k, or enough for top_p.

    Of 65536 tokens 256 are most often enough. Sorting all takes longer than computing a small model's logits.
    """
    if sampling.top_k:
        order = _largest(logits, sampling.top_k)
        weights = np.exp(logits[order] - logits[order[0]])
        return order, weights, weights.sum(dtype=np.float64)
    weights = np.exp(logits - logits.max())
    total = weights.sum(dtype=np.float64)
    for count in (256, 4096, len(logits)):
        order = _largest(logits, count)
        if weights[order].sum(dtype=np.float64) >= sampling.top_p * total:
            break
    return order, weights[order], total


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Return the places of the `count` largest values, or of all, largest first; of equal ones the first."""
    order = np.arange(len(values))
    if not count:
        return order[:0]
    if count < len(values):
        order = np.flatnonzero(values >= np.partition(values, -count)[-count])
    return order[np.argsort(-values[order], kind="stable")][:count]
