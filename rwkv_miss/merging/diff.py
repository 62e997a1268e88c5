"""Diff: the MiSS adapter that comes nearest to the difference of two checkpoints.

`rwkv-miss diff A.pth B.pth --rank r --out adapter.pth`

For a matrix dW = B - A and shards S_j of its columns, the D nearest in the sense of least squares consists of
means: D[j, o] is the mean of dW[o, i] over i in S_j. So ||dW - D^T P||^2 = ||dW||^2 - sum over j of
|S_j| ||D_j||^2, which is computed without reading the matrix again.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..adapter_file import ADAPTER_FORMAT
from ..convert.formats import described
from ..errors import UserError, listed
from ..files.checkpoint import Arch, blocks, write_checkpoint
from ..files.file_kinds import check_output
from ..files.identity import Identity
from ..files.model_files import name_of
from ..files.output import require_writable
from ..functional import shard_index, shard_sum
from ..methods.whole_tensors import PARTS, in_parts
from ..targets import DEFAULT_TARGETS
from .merge import read_base
from .rounding import TABLE_ROWS, bits, percent, text_table

ENTRIES_AT_ONCE = 1 << 20  # entries of a matrix in float64 at once


@dataclasses.dataclass(frozen=True)
class Difference:
    """Norms of a tensor that differs: ||B - A|| and ||A||.

    A linear also has `explained`, the share of ||B - A||^2 that the adapter reproduces, and `random`, r / in,
    the same share for a random matrix.
    """

    name: str
    norm: float
    base_norm: float
    explained: float | None = None
    random: float | None = None

    @property
    def relative(self) -> float:
        return self.norm / self.base_norm if self.base_norm else math.inf


@dataclasses.dataclass
class DiffReport:
    """Result of diff_files(): linears with their shares, and other tensors that differ.

    whole: the other tensors that the adapter's file has.
    """

    a: str
    b: str
    out: str
    rank: int
    linears: list[Difference]
    others: list[Difference]
    whole: list[str]
    parts: list[str]

    def share(self, name: str) -> float:
        """Return `explained` or `random` of all linears together."""
        total = sum(d.norm**2 for d in self.linears)
        return sum(getattr(d, name) * d.norm**2 for d in self.linears) / total

    def lines(self, shown_rows: int | None = TABLE_ROWS) -> list[str]:
        """Return the lines for the user; `shown_rows` tensors of a table (None: all)."""
        lines = [
            f"{self.out}: MiSS of rank {self.rank} has {percent(self.share('explained'))} of what"
            f" {len(self.linears)} linears of {self.b} differ by from {self.a}; of a random difference it"
            f" would have {percent(self.share('random'))}"
        ]
        least = sorted(self.linears, key=lambda d: d.explained)[:shown_rows]
        lines += text_table(
            [f"least of {len(self.linears)}", "explained", "of a random one", "|B - A| / |A|"],
            [[d.name, percent(d.explained), percent(d.random), f"{d.relative:.3g}"] for d in least],
        )
        if self.others:
            what = (
                f"are in the file as a whole ({', '.join(self.parts) or 'no part'})"
                if self.whole
                else "ARE LEFT OUT; --whole takes them along"
            )
            largest = sorted(self.others, key=lambda d: -d.norm)[:shown_rows]
            lines.append(
                f"{'note' if self.whole else 'warning'}: {len(self.others)} other tensors differ and {what}"
            )
            lines += text_table(
                [f"largest of {len(self.others)}", "  |B - A|", "|B - A| / |A|"],
                [[d.name, f"{d.norm:.3g}", f"{d.relative:.3g}"] for d in largest],
            )
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, with every tensor that differs."""
        return {
            "a": self.a,
            "b": self.b,
            "out": self.out,
            "rank": self.rank,
            "explained": self.share("explained"),
            "random": self.share("random"),
            "layers": [dataclasses.asdict(d) for d in sorted(self.linears, key=lambda d: d.explained)],
            "others": [{"name": d.name, "norm": d.norm, "base_norm": d.base_norm} for d in self.others],
            "whole": self.whole,
            "parts": self.parts,
        }


def diff_files(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    out: str | os.PathLike[str],
    rank: int,
    targets: Sequence[str] | None = None,
    layout: str = "stride",
    whole: bool = False,
) -> DiffReport:
    """Write the MiSS adapter of checkpoint `a` that comes nearest to checkpoint `b`, as save_adapter() does.

    targets: names as in inject(); None: all linears of the paper. Only linears that differ are adapted.
    whole: write other tensors that differ, as in `b`, with all tensors of their parts
    (methods/whole_tensors.py). Without it they are left out.

    If `b` has another dtype, `a` is rounded to it before the comparison. Raises UserError for other keys or
    shapes, targets that match nothing or don't differ, a rank beyond a width, and NaN; no unfinished file is
    left.
    """
    check_output(out, (a, b), ADAPTER_FORMAT)
    (first, facts_a), (second, facts_b) = read_base(a), read_base(b)
    _check_alike(a, b, first, second)
    options = described("miss", {"rank": rank, "layout": layout}, [])["options"]
    linears, others = _what_differs(first, second, targets)
    if not linears:
        raise UserError(
            f"{b} has the same {', '.join(targets or DEFAULT_TARGETS)} as {a}, and MiSS is for linears;"
            f" {len(others)} other tensors differ"
        )
    _check_rank(first, linears, rank)
    parts, kept = _taken_along(second, others) if whole else ([], [])
    norms = [_difference(key, first.get(key), second[key]) for key in others]
    report = DiffReport(os.fspath(a), os.fspath(b), os.fspath(out), rank, [], norms, kept, parts)

    def items() -> Iterator[tuple[str, Tensor]]:
        for name in linears:
            key = f"{name}.weight"
            D, fit = nearest(name, first[key], second[key], rank, options["layout"] == "contiguous")
            report.linears.append(fit)
            yield f"{name}.miss", D
        for key in kept:
            yield key, second[key]

    numbers = sum(rank * len(first[f"{name}.weight"]) for name in linears)
    numbers += sum(second[key].numel() for key in kept)
    require_writable(out, 4 * numbers)
    counted = {"layout": options["layout"], "train_parts": parts, "trainable": numbers}
    facts = {**counted, **_files(a, b, first, second), **_texts(facts_a, facts_b)}
    write_checkpoint(out, items(), described("miss", options, linears, **facts))
    return report


def _files(a, b, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, Any]:
    """Record the two checkpoints for the adapter's metadata."""
    return {
        "arch": Arch.record_of(first),
        "base": name_of(a),
        "base_fingerprint": Identity(a, first).fingerprint,
        "difference_to": {"file": name_of(b), "fingerprint": Identity(b, second).fingerprint},
    }


def _what_differs(
    first: Mapping[str, Tensor], second: Mapping[str, Tensor], targets: Sequence[str] | None
) -> tuple[list[str], list[str]]:
    """Return (the linears among the targets that differ, the keys of all other tensors that differ)."""
    candidates = find_targets(first, targets)
    different = [key for key in second if key not in first or not _same(first[key], second[key])]
    linears = [name for name in candidates if f"{name}.weight" in different]
    adapted = {f"{name}.weight" for name in linears}
    return linears, [key for key in different if key not in adapted]


def _check_rank(tensors: Mapping[str, Tensor], linears: list[str], rank: int) -> None:
    """Raise UserError for a rank beyond the input width of a linear."""
    for name in linears:
        width = tensors[f"{name}.weight"].shape[1]
        if rank > width:
            raise UserError(f"rank {rank} does not fit {name}: it must be from 1 to the input width, {width}")


def _taken_along(second: Mapping[str, Tensor], others: list[str]) -> tuple[list[str], list[str]]:
    """Return (the parts that these tensors belong to, all tensors of these parts and `others`)."""
    for key in others:
        if not second[key].is_floating_point():
            raise UserError(
                f"{key} differs and is {second[key].dtype}, which no adapter holds; leave out --whole"
            )
    parts = [part for part in PARTS if any(re.fullmatch(PARTS[part], key) for key in others)]
    return parts, list(dict.fromkeys(in_parts(second, parts) + others))


def _texts(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Return tokenizer, end of document and template from the second file's metadata, else the first's.

    The BOS is taken from the second alone: a file without a BOS was trained without one.
    """
    source = second if second.get("tokenizer") else first  # so that the end of document fits the tokenizer
    return {
        "tokenizer": source.get("tokenizer"),
        "eod": source.get("eod"),
        "template": second.get("template") or first.get("template"),
        "bos": second.get("bos") or [],
    }


def _check_alike(a, b, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    """Raise UserError that names the first keys, or the shape, in which two checkpoints differ.

    The second may add initial states.
    """
    for path, missing in (
        (b, [key for key in first if key not in second]),
        (a, [key for key in second if key not in first and not re.fullmatch(PARTS["state"], key)]),
    ):
        if missing:
            raise UserError(
                f"{path} has no {listed(missing, 3)}; the two checkpoints must be of the same model"
            )
    for key in first:
        if first[key].shape != second[key].shape:
            raise UserError(
                f"{key} is {tuple(first[key].shape)} in {a} and {tuple(second[key].shape)} in {b}; the two"
                " must be of the same model"
            )


def find_targets(tensors: Mapping[str, Tensor], targets: Sequence[str] | None) -> list[str]:
    """Find the linears that the targets select among a checkpoint's matrices, as inject() does.

    Raises UserError for a target that matches nothing.
    """
    names = [
        key.removesuffix(".weight")
        for key, t in tensors.items()
        if key.endswith(".weight") and t.dim() == 2 and t.is_floating_point()
    ]
    names = [name for name in names if name != "emb"]
    chosen = []
    for target in targets or DEFAULT_TARGETS:
        matches = [name for name in names if name == target or name.endswith(f".{target}")]
        if targets and not matches:
            raise UserError(
                f"target {target!r} matches no linear; there are:"
                f" {', '.join(sorted({name.rpartition('.')[2] for name in names}))}"
            )
        chosen += matches
    return [name for name in names if name in set(chosen)]


def _same(first: Tensor, second: Tensor) -> bool:
    """Tell whether two tensors have the same bits, the first rounded to the dtype of the second."""
    return all(torch.equal(bits(x.to(y.dtype)), bits(y)) for x, y in zip(blocks(first), blocks(second)))


def _difference(key: str, first: Tensor | None, second: Tensor) -> Difference:
    first = torch.zeros(1).expand(second.shape) if first is None else first
    norm = base = 0.0
    for x, y in zip(blocks(first), blocks(second)):
        x, y = x.to(y.dtype).double(), y.double()
        norm += float((y - x).square().sum())
        base += float(x.square().sum())
    return _finite(Difference(key, norm**0.5, base**0.5))


def _finite(found: Difference) -> Difference:
    if not math.isfinite(found.norm) or not math.isfinite(found.base_norm):
        raise UserError(
            f"{found.name} holds NaN or infinite values in one of the checkpoints; it is damaged or its"
            " training diverged"
        )
    return found


def nearest(
    name: str, first: Tensor, second: Tensor, rank: int, contiguous: bool
) -> tuple[Tensor, Difference]:
    """Compute in float64 the D (rank, out) nearest to second - first, (out, in), and its error; D is fp32."""
    out, width = first.shape
    counts = torch.bincount(shard_index(width, rank, contiguous), minlength=rank).double()
    D = torch.empty(rank, out)
    norm = base = explained = 0.0
    rows_at_once = max(1, ENTRIES_AT_ONCE // width)
    for begin in range(0, out, rows_at_once):
        part = slice(begin, begin + rows_at_once)
        x = first[part].to(second.dtype).double()
        delta = second[part].double() - x
        means = shard_sum(delta, rank, contiguous) / counts.clamp(min=1)  # a contiguous shard may be empty
        D[:, part] = means.t()
        norm += float(delta.square().sum())
        base += float(x.square().sum())
        explained += float((means.square() * counts).sum())
    share = explained / norm if norm else 0.0
    return D, _finite(Difference(name, norm**0.5, base**0.5, share, int((counts > 0).sum()) / width))
