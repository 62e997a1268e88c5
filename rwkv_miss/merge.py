"""Base + adapter -> merged `.pth`, tensor by tensor: fp32 addition, one rounding, everything else byte for byte as it was."""

from __future__ import annotations

import dataclasses
import os
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from .adapter import METHODS
from .checkpoint import (
    Arch,
    blocks,
    check_finite,
    fingerprint,
    is_finite,
    refuse_run_checkpoint,
    require_writable,
    write_checkpoint,
)
from .errors import UserError
from .inject import ADAPTER_FORMAT, layer_tensors, read_adapter, read_described
from .parts import PARTS

MERGED_FORMAT = "rwkv-miss merged"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LOSS_LIMIT = 0.05  # share of the update that rounding may take before the user is warned


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"


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
        """||(round(W + dW) - round(W)) - dW|| / ||dW|| over all changed tensors of the base; 0 for an adapter that changes nothing.

        Where W is on the grid of the output already, this is the rounding of W + dW. Where it is not (an fp32 base written as
        bf16), the rounding of W itself is no loss of the update and is left out.
        """
        return (self.error / self.update) ** 0.5 if self.update else 0.0


@dataclasses.dataclass
class MergeReport:
    """What merge_file did."""

    out: str
    linears: int
    replaced: int
    parts: list[str]
    states: int
    dtype: str
    rounding: Rounding
    seconds: float
    bytes: int

    def lines(self) -> list[str]:
        """What the user is told: one line, and a warning when rounding took more than 5 % of the update."""
        r = self.rounding
        worst = f", worst {r.worst_name} {_percent(r.worst)}" if r.worst_name else ""
        parts = f" ({', '.join(self.parts)})" if self.parts else ""
        replaced = f" and {self.replaced} whole tensors{parts}" if self.replaced else ""
        lines = [f"merged {self.linears} linears{replaced} into {self.out} ({self.dtype}) in {self.seconds:.1f} s; "
                 f"rounding lost {_percent(r.lost)} of the update{worst}"]
        if self.states:
            lines.append("note: the file carries the initial state as blocks.i.att.time_state of every layer i, (heads, value, key). This project "
                         "applies it, and so does the package rwkv for RWKV-6; for RWKV-7 put it into the state there: "
                         "state[3 * i + 1] = time_state.float()")
        if self.linears and not r.update:
            lines.append("warning: the update is zero, nothing was trained in the linears")
        if r.lost > LOSS_LIMIT:
            finer = "" if "float16" in self.dtype.split(", ") else "--dtype fp16 (8 times finer than bf16) or "
            lines.append(f"warning: more than {100 * LOSS_LIMIT:.0f} % of what was trained is lost in {self.dtype}; "
                         f"merge with {finer}--dtype fp32")
        return lines


class _Merger:
    """Makes the merged value of each tensor of the base, and keeps the account of what rounding took."""

    def __init__(self, adapter: dict[str, Tensor], metadata: dict[str, Any]):
        self.method, self.linears = METHODS[metadata["method"]], metadata["linears"]
        self.options = self.method.Options.parse(metadata["options"])
        self.adapter = adapter
        self.by_weight = {f"{name}.weight": name for name in self.linears}
        shared = tuple(f"shared.{name}" for name in self.method.shared)
        self.whole = {n: t for n, t in adapter.items() if n.rpartition(".")[0] not in self.linears and not n.startswith(shared)}
        self.states = [name for name in self.whole if re.fullmatch(PARTS["state"], name)]
        self.rounding = Rounding()
        self.buffer = torch.empty(0)

    def changed(self, base: dict[str, Tensor]) -> list[str]:
        """The keys of the base whose values are not what they were."""
        return [key for key in base if key in self.by_weight or key in self.whole]

    def check(self, base: dict[str, Tensor]) -> None:
        """Every adapted linear and every whole tensor must fit the base."""
        for key, name in self.by_weight.items():
            if key not in base:
                raise UserError(f"the adapter changes {name}, which the base does not have; merge into the base it was trained on")
            if base[key].dim() != 2 or not base[key].is_floating_point():
                raise UserError(f"{key} of the base is {tuple(base[key].shape)}, {base[key].dtype}; a floating-point matrix is expected")
        for key, name in self.by_weight.items():
            try:
                # a layer on the meta device has shapes only, so every misfit is found before the first byte is written
                with torch.device("meta"):
                    own = layer_tensors(self.method, name, base[key].shape, self.adapter)
                    layer = {n: torch.empty(t.shape, dtype=t.dtype) for n, t in own.items()}
                    self.method.merged_weight(torch.empty(base[key].shape), layer, self.options.at(name))
            except UserError as error:
                raise UserError(f"the adapter does not fit {name} of the base, {tuple(base[key].shape)}: {error}") from None
        if self.states:
            arch = Arch.detect(base)
            wanted = {f"blocks.{i}.att.time_state": (arch.n_head, arch.head_size, arch.head_size) for i in range(arch.n_layer)}
            found = {name: tuple(self.whole[name].shape) for name in self.states}
            if found != wanted:
                raise UserError(f"the initial state is of {len(found)} layers, {found[self.states[0]]} each; this base has {arch.describe()}")
        for key, tensor in self.whole.items():
            if not tensor.is_floating_point():
                raise UserError(f"{key} is {tensor.dtype} in the adapter; a floating-point tensor is expected")
            if key in base and base[key].squeeze().shape != tensor.squeeze().shape:
                raise UserError(f"{key} is {tuple(tensor.shape)} in the adapter, {tuple(base[key].shape)} in the base")

    def merged(self, key: str, base: Tensor, dtype: torch.dtype) -> Tensor:
        """The value of one tensor of the merged file, in `dtype`."""
        if key in self.whole:
            trained = self.whole[key].reshape(base.shape)
            rounded = _round(key, trained, dtype)
            self.rounding.add(key, *_account(base, trained, rounded))
            return rounded
        if key not in self.by_weight:
            return _round(key, base, dtype)
        name = self.by_weight[key]
        weight = self.room(base.shape, dtype).copy_(base)
        merged = self.method.merged_weight(weight, layer_tensors(self.method, name, base.shape, self.adapter), self.options.at(name))
        rounded = _round(key, merged, dtype)
        self.rounding.add(name, *_account(base, merged, rounded))
        return rounded

    def room(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """An fp32 buffer for one weight. It is used again for the next, which saves most page faults, unless it may become the output."""
        if dtype == torch.float32:
            return torch.empty(shape)
        if self.buffer.numel() < shape.numel():
            self.buffer = torch.empty(shape.numel())
        return self.buffer[: shape.numel()].view(shape)

    def items(self, base: dict[str, Tensor], dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
        """The merged file: the base's tensors in its order, then the adapter's new ones. dtype None keeps each tensor's own."""
        for key, tensor in base.items():
            yield key, self.merged(key, tensor, dtype or tensor.dtype)
        for key, tensor in self.whole.items():
            if key not in base:
                yield key, _round(key, tensor, dtype or tensor.dtype)


def _round(key: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if not tensor.is_floating_point() or tensor.dtype == dtype:
        return tensor
    rounded = tensor.to(dtype)
    # a value that was infinite or NaN before is the file's own affair
    if dtype == torch.float16 and not is_finite(rounded) and bool((rounded.isinf() & tensor.isfinite()).any()):
        raise UserError(f"{key} has values beyond fp16's largest, 65504; merge with --dtype bf16 or fp32")
    return rounded


def _account(base: Tensor, merged: Tensor, rounded: Tensor) -> tuple[float, float]:
    """Squared norms of the update, merged - base, and of what is missing from it in the rounded file."""
    update = error = 0.0
    for before, after, kept in zip(blocks(base), blocks(merged), blocks(rounded)):
        # fp32, by promotion; a base in another dtype is rounded too, and what that alone changes is not the update's loss
        change, missing = after - before, kept - after
        if before.dtype != kept.dtype:
            missing += before - before.to(kept.dtype)
        update += float(change.dot(change))
        error += float(missing.dot(missing))
    return update, error


def _ahead(items: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The same items, each made by a second thread while the one before it is being written."""
    with ThreadPoolExecutor(1) as worker:
        coming = worker.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = worker.submit(next, items, None)
            yield item


def merge_file(base, adapter, out, dtype: str = "base", force: bool = False) -> MergeReport:
    """Merge an adapter file into a base file and write `out`, with exactly the base's keys, shapes and order.

    An initial state, which is no change of anything in the base, comes after them as `blocks.i.att.time_state`.

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
    require_writable(out)
    (tensors, before), (changes, metadata) = read_described(base), read_adapter(adapter)
    refuse_run_checkpoint(base, before)
    if before.get("format") == ADAPTER_FORMAT:
        raise UserError(f"{base} is an adapter file; --base is the model that the adapter was trained on")
    check_finite(changes)
    record = {
        "format": MERGED_FORMAT, "base": os.path.basename(base),
        "base_fingerprint": fingerprint(tensors), "adapter_fingerprint": fingerprint(changes),
        "method": metadata["method"], "options": metadata["options"], "train_parts": metadata.get("train_parts", []),
        "step": metadata.get("step"), **{name: metadata.get(name) for name in ("tokenizer", "eod", "template")}, "versions": metadata["versions"],
    }
    if not force and before.get("adapter_fingerprint") == record["adapter_fingerprint"]:
        raise UserError(f"{base} is already a merge of this adapter into {before['base']}; --force merges it a second time")
    _check_base(base, adapter, record, metadata, tensors, force)
    merger = _Merger(changes, metadata)
    merger.check(tensors)
    chosen = _choose_dtype(tensors, changes, metadata) if dtype == "auto" else DTYPES.get(dtype)
    require_writable(out, sum(t.numel() * (chosen if chosen and t.is_floating_point() else t.dtype).itemsize for t in tensors.values()))
    write_checkpoint(out, _ahead(merger.items(tensors, chosen)), record)
    dtypes = sorted({str(chosen or tensors[key].dtype).removeprefix("torch.") for key in merger.changed(tensors)} or {"no tensor of the base"})
    return MergeReport(os.fspath(out), len(merger.linears), len(merger.whole), record["train_parts"], len(merger.states), ", ".join(dtypes),
                       merger.rounding, time.perf_counter() - started, os.path.getsize(out))


def _choose_dtype(tensors: dict[str, Tensor], changes: dict[str, Tensor], metadata: dict[str, Any]) -> torch.dtype | None:
    """What --dtype auto stands for: None (the base's own), fp16 or fp32."""
    for dtype in (None, torch.float16):
        trial = _Merger(changes, metadata)
        try:
            for key in trial.changed(tensors):
                trial.merged(key, tensors[key], dtype or tensors[key].dtype)
            if dtype:
                for key, tensor in tensors.items():
                    _round(key, tensor, dtype)
        except UserError:
            continue
        if trial.rounding.lost <= LOSS_LIMIT:
            return dtype
    return torch.float32


def _check_base(base, adapter, record: dict[str, Any], metadata: dict[str, Any], tensors: dict[str, Tensor], force: bool) -> None:
    """Refuse a base that is not the adapter's, and say where the two differ when their sizes do; other widths never fit."""
    differs, misfit = "", False
    if metadata.get("arch"):
        trained, found = Arch.from_dict(metadata["arch"]), Arch.detect(tensors)
        if trained.describe() != found.describe():
            differs = f"; that one is {trained.describe()}, this one {found.describe()}"
        # a MiSS adapter does not know the input width of its linears, so the shapes alone would let this pass
        misfit = any(getattr(trained, width) != getattr(found, width) for width in ("n_embd", "dim_att", "dim_ffn"))
    wanted = metadata.get("base_fingerprint")
    if misfit or (not force and wanted and wanted != record["base_fingerprint"]):
        advice = "merge into that one" + ("" if misfit else ", or --force")
        raise UserError(f"{adapter} was trained on another base ({metadata.get('base')}), not on {base}{differs}; {advice}")
