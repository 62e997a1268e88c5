"""Seconds to initialise a method on one n x n linear, and of a training step on it, against full
fine-tuning's (part of no-free-lunch).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import rwkv_miss

from .methods import systems
from .results import Claim, Table

TOKENS = 64
LONG = 0.1  # an initialisation of this many seconds or more is measured once


def cpu_seconds(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def square(width: int) -> nn.Module:
    model = nn.Sequential(nn.Linear(width, width, bias=False))
    with torch.no_grad():  # values of a trained weight's size, because SVDs depend on the spectrum
        model[0].weight.normal_(std=width**-0.5)
    return model


def initialise(width: int, method: str, options: dict[str, Any]) -> tuple[float, nn.Module]:
    """Return (seconds to initialise a method on a square(width), the model)."""
    model = square(width)
    return cpu_seconds(lambda: rwkv_miss.inject(model, method, targets=["0"], **options)), model


def make_step(model: nn.Module, width: int) -> Callable[[], None]:
    """Make a step of forward, backward and AdamW on 64 tokens; the input needs a gradient, as in a model."""
    x = torch.randn(TOKENS, width, requires_grad=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


@dataclasses.dataclass(frozen=True)
class Row:
    """One system at one width: trained parameters, CPU seconds of the initialisation (None: there is none)
    and of a step.
    """

    system: str
    width: int
    parameters: int
    start: float | None
    step: float


@dataclasses.dataclass(frozen=True)
class Timing:
    rows: list[Row]

    def of(self, system: str) -> list[Row]:
        return [row for row in self.rows if row.system == system]

    def tables(self) -> list[Table]:
        full = {row.width: row.step for row in self.of("full")}
        return [
            Table(
                f"n x n linears, {TOKENS} tokens, one thread, CPU time; a step is forward, backward and"
                " AdamW",
                ("method", "n", "parameters", "initialisation ms", "step ms", "step / full"),
                [
                    (
                        row.system,
                        row.width,
                        row.parameters,
                        row.start and 1e3 * row.start,
                        1e3 * row.step,
                        row.step / full[row.width],
                    )
                    for row in self.rows
                ],
            )
        ]

    def claims(self) -> list[Claim]:
        last = {row.system: row for row in self.rows if row.width == max(row.width for row in self.rows)}
        miss = last["miss"]
        slow = {name: row.start for name, row in last.items() if name.startswith("pissa")}
        says = ", ".join(
            f"{name} {1e3 * seconds:.3g} ms"
            for name, seconds in sorted({**slow, "lora": last["lora"].start}.items())
        )
        return [
            Claim(
                "MiSS starts at once, PiSSA slowly",
                f"on {miss.width} x {miss.width}: miss {1e3 * miss.start:.2g} ms, {says}",
                miss.start < min(slow.values()) if slow else None,
            )
        ]

    def draw(self, start, step) -> None:
        for number, name in enumerate(dict.fromkeys(row.system for row in self.rows)):
            rows, style = (
                self.of(name),
                {"color": f"C{number - 1}" if number else "k", "markersize": 3, "label": name},
            )
            line = "o-" if number <= 10 else "o--"
            step.plot([row.parameters for row in rows], [row.step for row in rows], line, **style)
            if rows[0].start is not None:
                start.plot([row.parameters for row in rows], [row.start for row in rows], line, **style)
        start.set(
            xscale="log",
            yscale="log",
            xlabel="trained parameters",
            ylabel="CPU s",
            title="Initialisation of one n x n linear",
        )
        step.set(
            xscale="log",
            yscale="log",
            xlabel="trained parameters",
            ylabel="CPU s",
            title=f"A training step of it on {TOKENS} tokens",
        )
        step.legend(fontsize=8)


def measure(widths: tuple[int, ...], rounds: int) -> Timing:
    """Time every system at every width: LoRA of rank n / 64, the others with as many parameters. They take
    turns, and the fastest round of each counts.
    """
    rows = []
    for width in widths:
        named, start, models = systems(max(1, width // 64), width, width), {}, {"full": square(width)}
        named["pissa, exact SVD"] = ("pissa", {**named["pissa"][1], "niter": 0})
        for label, (method, options) in named.items():
            start[label], models[label] = initialise(width, method, options)
        steps = {label: make_step(model, width) for label, model in models.items()}
        seconds = dict.fromkeys(steps, float("inf"))
        for _ in range(rounds + 1):
            for label, step in steps.items():
                seconds[label] = min(seconds[label], cpu_seconds(step))
            for label, (method, options) in named.items():
                if start[label] < LONG:
                    start[label] = min(start[label], initialise(width, method, options)[0])
        rows += [
            Row(
                label,
                width,
                sum(p.numel() for p in model.parameters() if p.requires_grad),
                start.get(label),
                seconds[label],
            )
            for label, model in models.items()
        ]
    return Timing(rows)
