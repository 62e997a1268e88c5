"""Preview of pairs and labelled answers as a whole, for scripts.preview."""

from __future__ import annotations

import numpy as np

from src.config import Config
from src.data.examples import Examples
from src.data.formats import Report
from src.data.preferences import Preferences
from src.sources import source_of


def answer_figures(examples: Examples, report: Report) -> dict:
    """Compute figures about preferences, name -> number; {} for other documents.

    The lengths of answers are medians in tokens, including the end of document.
    """
    if not isinstance(examples, Preferences):
        return {}
    compared = examples.answer_targets
    chosen, rejected = compared[examples.chosen], compared[~examples.chosen]
    left_out: dict[str, int] = {}
    for found in report.files.values():
        for reason, (count, _) in found.left_out.items():
            left_out[reason] = left_out.get(reason, 0) + count
    figures = {
        "chosen": len(chosen),
        "rejected": len(rejected),
        "chosen_length": float(np.median(chosen)) if len(chosen) else None,
        "rejected_length": float(np.median(rejected)) if len(rejected) else None,
        "too_long": examples.too_long,
        "left_out": left_out,
    }
    if examples.paired:
        figures["chosen_longer"] = float((chosen > rejected).mean())
        figures["rejected_longer"] = float((chosen < rejected).mean())
    return figures


def answer_lines(config: Config, figures: dict, examples: Examples, report: Report) -> list[str]:
    """Write the lines about answer_figures()."""
    if not isinstance(examples, Preferences):
        return []
    lines = [_compared(figures, examples), *report.left_out_lines()]
    if too_long := examples.too_long_text(config.ctx_len):
        lines.append(f"left out   {too_long}")
    return lines + [f"warning    {text}" for text in source_of(config).warnings(examples, None)]


def _compared(figures: dict, examples: Preferences) -> str:
    """Write the line about the number of answers, and their lengths."""
    if examples.paired:
        return (
            f"pairs      {len(examples):,}; a chosen answer has {figures['chosen_length']:g} tokens in the"
            f" median, a rejected one {figures['rejected_length']:g}; the chosen one is longer in"
            f" {figures['chosen_longer']:.0%} of the pairs, shorter in {figures['rejected_longer']:.0%}"
        )
    lines = [
        f"{figures[name]:,} {label}, of {figures[f'{name}_length']:g} tokens in the median"
        for name, label in (("chosen", "to prefer"), ("rejected", "to avoid"))
        if figures[name]
    ]
    return f"answers    {'; '.join(lines)}"
