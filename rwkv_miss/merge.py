"""Base + adapter -> merged `.pth`, tensor by tensor: fp32 addition, one rounding, everything else byte for byte as it was."""

from __future__ import annotations

import dataclasses
import os
import time
from typing import Any

import torch
from torch import Tensor

from .adapter import METHODS
from .checkpoint import fingerprint, read_checkpoint, read_metadata, require_writable, write_checkpoint
from .errors import UserError
from .inject import layer_tensors, read_adapter

MERGED_FORMAT = "rwkv-miss merged"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LOSS_LIMIT = 0.05  # share of the update that rounding may take before the user is warned


@dataclasses.dataclass
class Rounding:
    """Squared norms of the update and of what the rounding took from it, summed over layers."""

    update: float = 0.0
    error: float = 0.0
    worst: float = 0.0
    worst_name: str = ""

    def add(self, name: str, update: float, error: float) -> None:
        self.update += update
        self.error += error
        lost = (error / update) ** 0.5 if update else 0.0
        if lost > self.worst:
            self.worst, self.worst_name = lost, name

    @property
    def lost(self) -> float:
        """||rounded update - update|| / ||update|| over all merged linears."""
        return (self.error / self.update) ** 0.5 if self.update else 0.0


@dataclasses.dataclass
class MergeReport:
    """What merge_file did."""

    out: str
    linears: int
    replaced: int
    dtype: str
    rounding: Rounding
    seconds: float

    def lines(self) -> list[str]:
        """What the user is told: one line, and a warning when rounding took more than 5 % of the update."""
        r = self.rounding
        worst = f", worst {r.worst_name} {100 * r.worst:.2g} %" if r.worst_name else ""
        replaced = f" and {self.replaced} whole tensors" if self.replaced else ""
        lines = [f"merged {self.linears} linears{replaced} into {self.out} ({self.dtype}) in {self.seconds:.1f} s; "
                 f"rounding lost {100 * r.lost:.2g} % of the update{worst}"]
        if r.lost > LOSS_LIMIT:
            lines.append(f"warning: more than {100 * LOSS_LIMIT:.0f} % of what was trained is lost in {self.dtype}; "
                         "merge with --dtype fp16 (8 times finer than bf16) or --dtype fp32")
        return lines


class _Merger:
    """Makes the merged value of each tensor of the base, and keeps the account of what rounding took."""

    def __init__(self, adapter: dict[str, Tensor], metadata: dict[str, Any]):
        self.method, self.options, self.linears = METHODS[metadata["method"]], metadata["options"], metadata["linears"]
        self.adapter = adapter
        self.by_weight = {f"{name}.weight": name for name in self.linears}
        self.whole = {n: t for n, t in adapter.items() if n.rpartition(".")[0] not in self.linears and not n.startswith("shared.")}
        self.rounding = Rounding()

    def check(self, base: dict[str, Tensor]) -> None:
        """Every adapted linear and every whole tensor must fit the base."""
        for key, name in self.by_weight.items():
            if key not in base:
                raise UserError(f"the adapter changes {name}, which the base does not have; merge into the base it was trained on")
        for key, name in self.by_weight.items():
            try:
                with torch.device("meta"):
                    layer = {n: torch.empty(t.shape) for n, t in layer_tensors(self.method, name, self.adapter).items()}
                    self.method.merged_weight(torch.empty(base[key].shape), layer, self.options)
            except UserError as error:
                raise UserError(f"the adapter does not fit {name} of the base, {tuple(base[key].shape)}: {error}") from None
        for key, tensor in self.whole.items():
            if key in base and base[key].numel() != tensor.numel():
                raise UserError(f"{key} is {tuple(tensor.shape)} in the adapter, {tuple(base[key].shape)} in the base")

    def merged(self, key: str, base: Tensor, dtype: torch.dtype) -> Tensor:
        """The value of one tensor of the merged file, in `dtype`."""
        if key in self.whole:
            return _round(key, self.whole[key].view_as(base), dtype)
        if key not in self.by_weight:
            return _round(key, base, dtype)
        name = self.by_weight[key]
        weight = base.float()
        merged = self.method.merged_weight(weight, layer_tensors(self.method, name, self.adapter), self.options)
        rounded = _round(key, merged, dtype)
        if rounded is merged:
            update = merged.sub(weight)
            self.rounding.add(name, float(update.norm()) ** 2, 0.0)
            return rounded
        update = merged.sub_(weight)
        norm = float(update.norm()) ** 2
        # the update as it stands in the file, against a base rounded the same way, minus the true one
        kept = update.neg_().add_(rounded).sub_(base if base.dtype == dtype else base.to(dtype))
        self.rounding.add(name, norm, float(kept.norm()) ** 2)
        return rounded


def _round(key: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if not tensor.is_floating_point() or tensor.dtype == dtype:
        return tensor
    rounded = tensor.to(dtype)
    if dtype == torch.float16 and not torch.isfinite(rounded).all():
        raise UserError(f"{key} has values beyond fp16's largest, 65504; merge with --dtype bf16 or fp32")
    return rounded


@torch.no_grad()
def merge_file(base, adapter, out, dtype: str = "base", force: bool = False) -> MergeReport:
    """Merge an adapter file into a base file and write `out`, with exactly the base's keys, shapes and order.

    dtype: base keeps every tensor's dtype; bf16, fp16, fp32 convert the whole file; auto is base unless that would lose more than
    5 % of the update, then fp16, and fp32 if that is not enough. Refused with a UserError before anything is written: a file that
    is no adapter, another base than the adapter's, a second merge of the same adapter (both allowed by `force`), and shapes that
    do not fit.
    """
    started = time.perf_counter()
    if dtype not in ("base", "auto", *DTYPES):
        raise UserError(f"dtype {dtype!r} is unknown; choose one of: base, auto, {', '.join(DTYPES)}")
    for path in (base, adapter):
        if os.path.exists(out) and os.path.exists(path) and os.path.samefile(path, out):
            raise UserError(f"{out} is an input of the merge; choose another --out")
    tensors, (changes, metadata) = read_checkpoint(base), read_adapter(adapter)
    require_writable(out)
    record = {
        "format": MERGED_FORMAT, "base": os.path.basename(base), "base_fingerprint": fingerprint(tensors), "adapter_fingerprint": fingerprint(changes),
        "method": metadata["method"], "options": metadata["options"], "step": metadata.get("step"), "tokenizer": metadata.get("tokenizer"),
        "versions": metadata["versions"],
    }
    if not force:
        _check_base(base, adapter, record, metadata)
    _Merger(changes, metadata).check(tensors)
    chosen = _choose_dtype(tensors, changes, metadata) if dtype == "auto" else DTYPES.get(dtype)
    merger = _Merger(changes, metadata)
    new = [(name, t) for name, t in merger.whole.items() if name not in tensors]
    items = ((name, merger.merged(name, t, chosen or t.dtype)) for name, t in tensors.items())
    write_checkpoint(out, _chain(items, new), record)
    dtypes = sorted({str(chosen or tensors[key].dtype).removeprefix("torch.") for key in merger.by_weight} or {"no linear"})
    return MergeReport(os.fspath(out), len(merger.linears), len(merger.whole), ", ".join(dtypes), merger.rounding, time.perf_counter() - started)


def _chain(items, new):
    yield from items
    yield from new


def _choose_dtype(tensors: dict[str, Tensor], changes: dict[str, Tensor], metadata: dict[str, Any]) -> torch.dtype | None:
    """What --dtype auto stands for: None (the base's own), fp16 or fp32."""
    for dtype in (None, torch.float16):
        trial = _Merger(changes, metadata)
        try:
            for key in trial.by_weight:
                trial.merged(key, tensors[key], dtype or tensors[key].dtype)
            if dtype:
                for key, tensor in tensors.items():
                    _round(key, tensor, dtype)
        except UserError:
            continue
        if trial.rounding.lost <= LOSS_LIMIT:
            return dtype
    return torch.float32


def _check_base(base, adapter, record: dict[str, Any], metadata: dict[str, Any]) -> None:
    """Refuse a base that is not the adapter's, with the most telling reason."""
    before = read_metadata(base) or {}
    if before.get("adapter_fingerprint") == record["adapter_fingerprint"]:
        raise UserError(f"{base} is already a merge of this adapter into {before['base']}; --force merges it a second time")
    wanted = metadata.get("base_fingerprint")
    if wanted and wanted != record["base_fingerprint"]:
        raise UserError(f"{adapter} was trained on another base ({metadata.get('base')}), not on {base}; merge into that one, or --force")
