"""Unmerge check: whether a file is the merge of adapters into a base, from the files alone."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..convert import NO_HINTS, Hints
from ..errors import UserError
from ..files.checkpoint import blocks
from ..files.hf_folder import is_folder
from ..files.identity import Identity
from ..files.wrapped import is_model
from .members import LARGEST_WEIGHT, Combination, Member, is_state, merged_adapters, read_members
from .merge import read_base
from .places import placed
from .rounding import TABLE_ROWS, Layer, Rounding, Scratch, bits, percent, round_to, text_table

# allowed difference of sums of fp32 products between machines, as a share of the largest value
SUMS = 2.0**-21


@dataclasses.dataclass(frozen=True)
class Changed:
    """Tensor that differs from the base's.

    name: its key. entries, differing: number of all entries, and of those that differ from the base.
    distance: ||merged - base|| / ||base||. apart: number of entries that differ from the merge's in a bit;
    None without adapters. not_undone: number of entries that subtracting the change does not restore.
    """

    name: str
    entries: int
    differing: int
    distance: float
    apart: int | None = None
    not_undone: int = 0


@dataclasses.dataclass
class MergeCheck:
    """Result of check_merge().

    problems: reasons why the file is not the merge. rounding: rounding losses of the adapters' changes.
    """

    base: str
    merged: str
    adapters: list[Member]
    tensors: int = 0
    same: int = 0
    changed: list[Changed] = dataclasses.field(default_factory=list)
    rounding: Rounding = dataclasses.field(default_factory=Rounding)
    problems: list[str] = dataclasses.field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems

    @property
    def not_undone(self) -> float:
        """Return the share of the changed tensors' entries that subtracting the change does not restore."""
        return sum(c.not_undone for c in self.changed) / max(1, sum(c.entries for c in self.changed))

    def lines(self, shown_rows: int | None = TABLE_ROWS) -> list[str]:
        """Return the lines for the user; `shown_rows` tensors of a table (None: all)."""
        lines = [
            f"{self.merged}: {self.same} of {self.tensors} tensors are those of {self.base}, bit for bit;"
            f" {len(self.changed)} differ"
        ]
        if self.adapters and self.ok:
            lines += self._merge_lines(shown_rows)
        if not self.adapters and self.changed:
            lines += self._table_of_changed(shown_rows)
        lines += [f"wrong: {problem}" for problem in self.problems[:shown_rows]]
        if shown_rows and len(self.problems) > shown_rows:
            lines.append(f"wrong: and {len(self.problems) - shown_rows} more; --layers shows all")
        if self.ok and self.changed:
            lines.append(f"to undo the merge, take {self.base} again")
            if self.adapters:
                lines.append(
                    "  subtracting the adapters instead would not give back"
                    f" {percent(self.not_undone)} of the entries of these tensors"
                )
        if self.ok and not self.changed:
            lines.append("no tensor differs, so there is nothing to undo")
        return lines

    def _merge_lines(self, shown_rows: int | None) -> list[str]:
        """Name the merged adapters and their rounding losses."""
        names = " + ".join(f"{m.weight:g} x {m.path}" if m.weight != 1 else m.path for m in self.adapters)
        apart = sum(c.apart or 0 for c in self.changed)
        exact = "bit for bit"
        if apart:
            exact = f"but for the order of sums: {apart:,} entries are rounded the other way"
        total = self.rounding.total
        return [
            f"these are what merging {names} gives, {exact}",
            f"rounding lost {percent(total.lost)} of the update and left"
            f" {percent(total.unchanged_share)} of its entries unchanged",
            *self.rounding.table(shown_rows),
        ]

    def _table_of_changed(self, shown_rows: int | None) -> list[str]:
        """Return a table of the tensors that are furthest from the base's."""
        worst = sorted(self.changed, key=lambda c: -c.distance)[:shown_rows]
        return text_table(
            [f"largest of {len(self.changed)}", "entries that differ", "|merged - base| / |base|"],
            [[c.name, percent(c.differing / max(1, c.entries)), f"{c.distance:.3g}"] for c in worst],
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, with every changed tensor."""
        total = self.rounding.total
        return {
            "ok": self.ok,
            "problems": self.problems,
            "base": self.base,
            "merged": self.merged,
            "tensors": self.tensors,
            "same": self.same,
            "adapters": [
                {"adapter": m.path, "weight": m.weight, "adapter_fingerprint": m.fingerprint}
                for m in self.adapters
            ],
            "changed": [dataclasses.asdict(c) for c in self.changed],
            "lost": total.lost,
            "unchanged": total.unchanged_share,
            "not_undone": self.not_undone if self.adapters else None,
            "layers": [layer.to_dict() for layer in self.rounding.worst()],
        }


def check_merge(
    base: str | os.PathLike[str],
    merged: str | os.PathLike[str],
    adapters: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    weights: Sequence[float] | None = None,
    hints: Hints = NO_HINTS,
) -> MergeCheck:
    """Compare two mapped files tensor by tensor: find the ones that differ, and check that they are a merge.

    Tensors that no adapter changes must equal the base's, bit for bit, after rounding to the merged file's
    dtype. With adapters the other tensors must equal merge_file()'s; `hints` are as there. The weights are by
    default those that the merged file records, else 1; the order is the recorded one.

    Differences are listed in `problems`. Raises UserError for files that can't be compared at all: no model,
    no adapter, an adapter that does not fit the base.

    Equal bits are required where the merge's sum and W + delta() agree to the bit. Sums of matrix products
    may have another order on another machine; then every entry must be within half a step of the file's
    dtype.
    """
    (tensors, _), (found, record) = read_base(base), read_base(merged)
    recorded = {entry["adapter_fingerprint"]: entry.get("weight", 1) for entry in merged_adapters(record)}
    hints = dataclasses.replace(hints, base=os.fspath(base))
    members = _as_recorded(read_members(adapters, weights, hints), recorded, weights is None)
    if is_folder(base) and not is_model(tensors):
        members = placed(base, tensors, members)
    check = MergeCheck(os.fspath(base), os.fspath(merged), members, len(tensors))
    combination = Combination(members)
    combination.check(tensors)
    check.problems += _false_claims(check, record, recorded, Identity(base, tensors))
    check.problems += _problems_of_layout(tensors, found, combination)
    scratch = Scratch()
    for key, tensor in tensors.items():
        if key in found and found[key].shape == tensor.shape and _writable(tensor.dtype, found[key].dtype):
            _check_tensor(check, key, tensor, found[key], combination, scratch)
    for key in combination.added(tensors):
        if key in found and found[key].shape == combination.added_value(key).shape:
            expected = round_to(key, combination.added_value(key), found[key].dtype)
            if not torch.equal(bits(expected.contiguous()), bits(found[key].contiguous())):
                check.problems.append(f"{key} is not the adapters'")
    if not members and not check.same and check.changed:
        check.problems.append("no tensor is the base's; a merge changes some and leaves the others")
    return check


def _as_recorded(members: list[Member], recorded: Mapping[str, Any], own_weights: bool) -> list[Member]:
    """Sort the adapters as in the merged file's record; own_weights: take their weights from it, too."""
    if own_weights:
        members = [dataclasses.replace(m, weight=_number(recorded.get(m.fingerprint, 1))) for m in members]
    places = {name: place for place, name in enumerate(recorded)}
    # sorted, because a sum in another order rounds differently
    return sorted(members, key=lambda m: places.get(m.fingerprint, len(places)))


def _check_tensor(
    check: MergeCheck, key: str, base: Tensor, found: Tensor, combination: Combination, scratch: Scratch
) -> None:
    """Compare one tensor of the base, and add the result to the check."""
    name = combination.name(key)
    if name != key or key in combination.whole:
        layer, changed, problem = _expected(key, base, found, combination, scratch)
        check.rounding.layers.append(dataclasses.replace(layer, name=name))
    else:
        changed, problem = _compare(key, base, found), ""
        if check.adapters and changed.differing:
            problem = (
                f"{key} differs from the base in {changed.differing:,} entries, and no adapter changes it"
            )
    if problem:
        check.problems.append(problem)
    if changed.differing:
        check.changed.append(changed)
    else:
        check.same += 1


def _number(weight: Any) -> float:
    """Read a weight from a file's metadata."""
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not abs(weight) < LARGEST_WEIGHT:
        raise UserError(
            f"the merged file records the weight {str(weight)[:40]!r}, which is no number to multiply with;"
            " give --weights"
        )
    return float(weight)


def _false_claims(
    check: MergeCheck, record: Mapping[str, Any], recorded: Mapping[str, Any], base: Identity
) -> list[str]:
    """Return a problem for each claim of the merged file's metadata that is not true."""
    problems = []
    fingerprint = record.get("base_fingerprint")
    if fingerprint is not None and base.fingerprint != str(fingerprint):
        problems.append(f"by its own record it is a merge into another base, {record.get('base')}")
    for m in check.adapters:
        if recorded and m.fingerprint not in recorded:
            problems.append(f"by its own record it is no merge of {m.path}")
        elif recorded and (weight := recorded[m.fingerprint]) != m.weight:
            problems.append(
                f"by its own record the weight of {m.path} is {str(weight)[:40]}, not {m.weight:g}"
            )
    if check.adapters and len(recorded) > len(check.adapters):
        problems.append(
            f"by its own record it is a merge of {len(recorded)} adapters, not of {len(check.adapters)}; give"
            " all of them"
        )
    return problems


def _problems_of_layout(
    base: Mapping[str, Tensor], found: Mapping[str, Tensor], combination: Combination
) -> list[str]:
    """Return a problem for each key, shape and dtype that a merge would not write."""
    added = set(combination.added(base)) if combination.members else {key for key in found if is_state(key)}
    problems = [f"{key} of the base is missing" for key in base if key not in found]
    problems += [
        f"{key} is in neither the base nor an adapter"
        for key in found
        if key not in base and key not in added
    ]
    if combination.members:
        problems += [f"{key} of the adapter is missing" for key in added if key not in found]
    both = [key for key in base if key in found]
    for key in both:
        if base[key].shape != found[key].shape:
            problems.append(f"{key} is {tuple(found[key].shape)}, {tuple(base[key].shape)} in the base")
        elif not _writable(base[key].dtype, found[key].dtype):
            problems.append(f"{key} is {found[key].dtype}, {base[key].dtype} in the base")
    dtypes = {found[key].dtype for key in both if found[key].dtype != base[key].dtype}
    if dtypes and len({found[key].dtype for key in both if base[key].is_floating_point()}) > 1:
        problems.append(
            f"some tensors are {' or '.join(map(str, dtypes))} and others keep the base's dtype; a merge"
            " converts all or none"
        )
    return problems


def _writable(base: torch.dtype, merged: torch.dtype) -> bool:
    """Tell whether a merge can turn the base's dtype into the merged one."""
    return (
        base == merged or base.is_floating_point and merged in (torch.bfloat16, torch.float16, torch.float32)
    )


def _compare(key: str, base: Tensor, found: Tensor) -> Changed:
    """Compare a tensor with the base's, rounded to the tensor's dtype."""
    differing, distance = 0, 0.0
    for before, kept in zip(blocks(base), blocks(found)):
        before = before.to(kept.dtype)
        if not torch.equal(bits(before), bits(kept)):
            differing += int((bits(before) != bits(kept)).sum())
            distance += float((kept.double() - before.double()).square().sum())
    size = sum(float(before.double().square().sum()) for before in blocks(base)) if differing else 0.0
    return Changed(key, base.numel(), differing, (distance / size) ** 0.5 if size else 0.0)


@torch.no_grad()
def _expected(
    key: str, base: Tensor, found: Tensor, combination: Combination, scratch: Scratch
) -> tuple[Layer, Changed, str]:
    """Compare a changed tensor with the merge's; returns (rounding loss, comparison, problem or "").

    The loss is computed from delta() and the files.
    """
    exact = combination.merged(key, base, scratch)
    change = _change(key, base, combination)
    compared = _compare(key, base, found)
    sums = _Sums()
    update = error = 0.0
    changing = unchanged = not_undone = 0
    for before, merged, delta, kept in zip(blocks(base), blocks(exact), blocks(change), blocks(found)):
        sums.add(before.float(), merged.float(), delta, kept)
        same = before.to(kept.dtype)
        missing = kept.double() - same.double() - delta
        update += float(delta.double().square().sum())
        error += float(missing.square().sum())
        moves, stays = delta != 0, bits(same) == bits(kept)
        changing += int(moves.sum())
        unchanged += int((moves & stays).sum())
        not_undone += int((bits((kept.float() - delta).to(kept.dtype)) != bits(same)).sum())
    exact = not any(m.sums_products(key) for m in combination.members if m.changes(key))
    problem = sums.problem(key, found, exact)
    changed = dataclasses.replace(compared, apart=sums.apart, not_undone=not_undone)
    return Layer(key, update, error, changing, unchanged), changed, problem


@dataclasses.dataclass
class _Sums:
    """Comparison of a file's tensor with the merge's sum and with W + delta(), block by block.

    apart: number of entries whose bits differ from the merge's. excess: their largest distance from
    W + delta(), in units of the possible rounding error. gap: the largest difference of the two sums. size:
    the largest value.
    """

    apart: int = 0
    excess: float = 0.0
    gap: float = 0.0
    size: float = 0.0

    def add(self, base: Tensor, merged: Tensor, delta: Tensor, kept: Tensor) -> None:
        """Add one block: the file's is `kept`, in its dtype; all others are fp32."""
        by_definition = base + delta
        self.gap = max(self.gap, float((by_definition - merged).abs().max()))
        self.size = max(self.size, float(by_definition.abs().max()))
        others = bits(merged.to(kept.dtype)) != bits(kept)
        if others.any():
            self.apart += int(others.sum())
            reference = base[others].double() + delta[others]
            allowed = _half_step(reference, kept.dtype) + SUMS * float(by_definition.abs().max())
            away = (kept[others].double() - reference).abs() / allowed
            self.excess = max(self.excess, float(away.nan_to_num(math.inf).max()))

    def problem(self, key: str, found: Tensor, exact: bool) -> str:
        """Describe the tensor's problem, or return "". exact: its sum is the same on every machine."""
        if self.apart and (exact or self.excess > 1):
            problem = f"{key} is not what the merge writes in {self.apart:,} of {found.numel():,} entries"
            if self.excess > 1:
                dtype = str(found.dtype).removeprefix("torch.")
                problem += f", by up to {self.excess:.3g} times the rounding of {dtype}"
            return problem
        if self.gap > SUMS * self.size:
            return (
                f"{key}: the merge's sum is not the base + delta(), they differ by {self.gap:.3g}; this is a"
                " mistake of the package"
            )
        return ""


def _change(key: str, base: Tensor, combination: Combination) -> Tensor:
    """Compute sum of w_i delta_i, fp32, by the methods' own delta(), not by the merge's faster ways."""
    weight = base.to(torch.float32, copy=True)
    total = torch.zeros_like(weight)
    for m in combination.members:
        if key in m.whole:
            total.add_(m.whole[key].reshape(weight.shape).float() - weight, alpha=m.weight)
        elif key in m.by_weight:
            total.add_(m.delta(key, weight, torch.empty_like(weight), fast=False), alpha=m.weight)
    return total


def _half_step(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute half the distance between neighbouring numbers of a dtype at float64 values.

    One rounding changes a value by at most this half.
    """
    facts = torch.finfo(dtype)
    _, exponent = torch.frexp(value.abs().clamp(min=facts.smallest_normal))
    return torch.ldexp(torch.full_like(value, facts.eps / 4), exponent)
