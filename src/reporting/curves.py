"""Curves of a run as images."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence

from ..common.files import write_bytes
from ..losses.metrics import LossMetrics

CURVE = "loss.png"


def draw_pictures(described: LossMetrics, metrics: list[dict], history: list[dict], folder: str) -> None:
    """Draw the files of pictures()."""
    if described.by_loss:
        draw_losses(metrics, history, os.path.join(folder, CURVE), f"per {described.loss_of}")
    if described.picture:
        draw_panels(described, metrics, history, os.path.join(folder, described.picture))


def pictures(described: LossMetrics) -> list[str]:
    """List the pictures of a run, in Markdown."""
    files = {CURVE: "training and validation loss over the steps"} if described.by_loss else {}
    if described.picture:
        files[described.picture] = described.caption
    return [f"![{caption}]({file})" for file, caption in files.items()]


def draw_losses(metrics: list[dict], history: list[dict], path: str, unit: str = "per token") -> None:
    """Draw the loss over steps as a PNG, with a running mean, and the loss on held-out documents."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(7, 4))
    steps, losses = _points(metrics, "loss")
    axes.plot(steps, losses, alpha=0.35, label="loss")
    axes.plot(steps, running_mean(losses), label=f"mean of {window_of(losses)} steps")
    evaluated, losses = _points(history, "loss")
    if evaluated:
        axes.plot(evaluated, losses, _marks(evaluated), label="validation loss")
    axes.set(xlabel="optimizer step", ylabel=f"loss ({unit})")
    axes.legend()
    _write(plt, figure, path)


def draw_panels(described: LossMetrics, metrics: list[dict], history: list[dict], path: str) -> None:
    """Draw a PNG of the metrics other than the loss: running means over the steps, evaluations as marks."""
    plt = _pyplot()
    figure, panels = plt.subplots(2, 2, figsize=(11, 7.5), sharex=True)
    for axes, (title, names) in zip(panels.flat, described.panels, strict=True):
        for number, name in enumerate(names):
            steps, values = _points(metrics, name)
            label = name.replace("_", " ")
            if steps:
                axes.plot(steps, running_mean(values), color=f"C{number}", label=label)
            evaluated, values = _points(history, name)
            if evaluated:
                marks = _marks(evaluated)
                axes.plot(evaluated, values, marks, color=f"C{number}", alpha=0.6, label=f"{label}, held out")
        axes.set_title(title, loc="left", pad=20)
        axes.grid(alpha=0.3)
        _legend_above(axes)
    for axes in panels[-1]:
        axes.set(xlabel="optimizer step (marks: held out)" if history else "optimizer step")
    _write(plt, figure, path)


def _legend_above(axes) -> None:
    """Put the legend under the title, where it covers no curve; marks have the colour of their curve."""
    curves = {}
    for drawn in axes.lines:
        curves.setdefault(drawn.get_color(), drawn)
    if curves:
        axes.legend(
            handles=[*curves.values()],
            loc="lower left",
            bbox_to_anchor=(0.0, 1.0),
            ncols=len(curves),
            fontsize="small",
            frameon=False,
            borderaxespad=0.0,
            columnspacing=1.2,
            handlelength=1.2,
        )


def running_mean(values: Sequence[float]) -> list[float]:
    """Average each value and those before it, at most a window."""
    window = window_of(values)
    parts = [values[max(0, end - window) : end] for end in range(1, len(values) + 1)]
    return [sum(part) / len(part) for part in parts]


def window_of(values: Sequence[float]) -> int:
    """Choose the number of steps of a running mean."""
    return max(1, len(values) // 20)


def _points(lines: list[dict], name: str) -> tuple[list[int], list[float]]:
    """Return (steps, values) of the lines that have a metric."""
    with_value = [line for line in lines if line.get(name) is not None]
    return [line["step"] for line in with_value], [line[name] for line in with_value]


def _marks(evaluated: list[int]) -> str:
    # two points are no curve
    return "o-" if len(evaluated) > 2 else "o"


def _pyplot():
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    return plt


def _write(plt, figure, path: str) -> None:
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120, bbox_inches="tight")
    plt.close(figure)
    write_bytes(path, image.getvalue())
