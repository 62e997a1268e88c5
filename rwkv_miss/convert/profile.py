"""The layer profiles of RWKV-LM-RLHF: a table with the rank and alpha of each layer's LoRA.

The adapter's file keeps the ranks only.
"""

from __future__ import annotations

import csv
import os
import re

from ..errors import UserError

LARGEST = 1 << 20  # bytes


def read_alphas(path: str | os.PathLike[str], ranks: dict[str, int]) -> dict[str, float]:
    """Read linear -> alpha, for the linears in `ranks` (linear -> rank).

    Raises UserError for a file that is no profile, or is another training's.
    """
    rows = {row["Layer"]: row for row in read_rows(path)}
    alphas: dict[str, float] = {}
    for linear, rank in ranks.items():
        found = re.match(r"blocks\.(\d+)\.", linear)
        layer = found[1] if found else linear.partition(".")[0]  # such as "head"
        row = rows.get(layer)
        if row is None:
            raise UserError(f"{path} has no row for layer {layer}, the layer of {linear}")
        try:
            given, alpha = int(row["Rank"]), float(row["Alpha"])
        except (TypeError, ValueError):
            raise UserError(
                f"{path}: layer {layer} has Rank {row['Rank']!r} and Alpha {row['Alpha']!r}, expected numbers"
            ) from None
        if given != rank or row["Mode"] != "lora" or not 0 < alpha < float("inf"):
            raise UserError(
                f"{path}: layer {layer} has Mode {row['Mode']}, Rank {given} and Alpha {alpha:g},"
                f" and {linear} is a LoRA of rank {rank}; the profile is of another training"
            )
        alphas[linear] = alpha
    return alphas


def read_rows(path: str | os.PathLike[str]) -> list[dict[str, str]]:
    """Read the rows of the table, each as column -> text."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{path} is no regular file")  # reading a pipe could wait for ever
    try:
        if os.path.getsize(path) > LARGEST:
            raise UserError(f"{path} has {os.path.getsize(path):,} bytes, too many for a layer profile")
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is no table: {str(error)[:100]}") from None
    missing = [column for column in ("Layer", "Mode", "Rank", "Alpha") if not rows or column not in rows[0]]
    if missing:
        raise UserError(f"{path} is no layer profile: it has no column {missing[0]}")
    return rows
