"""Merge of a base and adapters into a `.pth` or a folder, tensor by tensor: fp32 addition and one rounding.

All other tensors are copied byte for byte.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from ..adapter_file import ADAPTER_FORMAT, read_described
from ..convert import NO_HINTS, Hints
from ..errors import UserError, listed
from ..files.checkpoint import Arch, refuse_run_checkpoint, write_checkpoint
from ..files.file_kinds import check_output
from ..files.hf_folder import is_folder, read_config
from ..files.identity import Identity, weights_fingerprint
from ..files.model_files import name_of, read_model, weight_paths
from ..files.output import refuse_inputs, require_writable
from ..files.provenance import Provenance
from ..files.safetensors_io import file_order, is_safetensors
from ..files.weight_files import WEIGHT_ENDINGS, check_new_folder, of_all, read_weights, write_like
from ..files.wrapped import is_model
from ..fit import refuse_other_base, refuse_other_weights
from ..progress import tensors_with_progress
from .members import Combination, Member, common_record, is_state, merged_adapters, read_members
from .places import placed
from .rounding import LOSS_LIMIT, TABLE_ROWS, Rounding, Scratch, percent, round_into, round_to

MERGED_FORMAT = "rwkv-miss merged"
DTYPE_NAMES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclasses.dataclass
class MergeReport:
    """Result of merge_file().

    record: the metadata of the merged file. choice: the reason of --dtype auto for its choice, else "".
    """

    out: str
    linears: int
    replaced: int
    states: int
    dtype: str
    rounding: Rounding
    seconds: float
    bytes: int
    record: dict[str, Any] = dataclasses.field(default_factory=dict)
    parts: list[str] = dataclasses.field(default_factory=list)
    weights: list[float] = dataclasses.field(default_factory=lambda: [1.0])
    choice: str = ""
    read: list[str] = dataclasses.field(default_factory=list)  # notes about reading the files

    def lines(self, shown_rows: int | None = TABLE_ROWS) -> list[str]:
        """Return the lines for the user: a sentence, a table of the layers with the largest losses, notes
        and warnings.

        shown_rows: rows of the table; None: all.
        """
        r = self.rounding
        parts = f" ({', '.join(self.parts)})" if self.parts else ""
        replaced = f" and {self.replaced} whole tensors{parts}" if self.replaced else ""
        several = f" of {len(self.weights)} adapters" if len(self.weights) > 1 else ""
        factors = ", ".join(f"{w:g}" for w in self.weights)
        times = f", times {factors}," if any(w != 1 for w in self.weights) else ""
        lines = [
            f"merged {self.linears} linears{replaced}{several}{times} into {self.out} ({self.dtype}) in"
            f" {self.seconds:.1f} s; rounding lost {percent(r.lost)} of the update and left"
            f" {percent(r.total.unchanged_share)} of its entries unchanged"
        ]
        return lines + r.table(shown_rows) + self.notes() + [f"warning: {text}" for text in self.warnings()]

    def notes(self) -> list[str]:
        notes = [f"note: {note}" for note in self.read] + ([self.choice] if self.choice else [])
        if self.states:
            notes.append(
                "note: the file carries the initial state as blocks.i.att.time_state of every layer i,"
                " (heads, value, key). This project applies it, and so does the package rwkv for RWKV-6; for"
                " RWKV-7 put it into the state there: state[3 * i + 1] = time_state.float()"
            )
        return notes

    def warnings(self) -> list[str]:
        warnings = []
        if self.linears and not self.rounding.total.update:
            warnings.append(
                "the update is zero: nothing was trained in the linears, or the weights make nothing of it"
            )
        broken = [layer for layer in self.rounding.layers if layer.broken]
        if broken:
            warnings.append(
                f"in {listed([layer.name for layer in broken], 3)} the base has infinite or NaN values"
                f" ({sum(layer.broken for layer in broken)}), which stay: the model will answer nonsense;"
                " download or convert the base again"
            )
        if self.rounding.lost > LOSS_LIMIT:
            is_fp16 = "float16" in self.dtype.split(", ")
            finer = "" if is_fp16 else "--dtype fp16 (8 times finer than bf16) or "
            warnings.append(
                f"more than {100 * LOSS_LIMIT:.0f} % of what was trained is lost in {self.dtype}; "
                f"merge with {finer}--dtype fp32"
            )
        return warnings

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, with every layer."""
        total = self.rounding.total.to_dict()
        return {
            "out": self.out,
            "dtype": self.dtype,
            "choice": self.choice or None,
            "bytes": self.bytes,
            "seconds": round(self.seconds, 3),
            "linears": self.linears,
            "replaced": self.replaced,
            "parts": self.parts,
            "states": self.states,
            "lost": total["lost"],
            "unchanged": total["unchanged"],
            "warnings": self.warnings(),
            "notes": self.read,
            "layers": [layer.to_dict() for layer in self.rounding.worst()],
            "base": self.record["base"],
            "base_fingerprint": self.record["base_fingerprint"],
            "fingerprint": Identity(self.out).fingerprint,
            "adapters": self._adapters(),
        }

    def _adapters(self) -> list[dict[str, Any]]:
        """Return the merged adapters from the record, with their weights."""
        fields = "adapter_fingerprint", "method", "options", "train_parts", "step"
        found = []
        for entry, weight in zip(merged_adapters(self.record), self.weights):
            found.append({**{name: entry.get(name) for name in fields}, "weight": weight})
        return found


class _Merger:
    """Maker of the merged tensors, which also sums up the rounding losses."""

    def __init__(self, adapters: Combination):
        self.adapters = adapters
        self.rounding = Rounding()
        self.scratch = Scratch()
        self.turn = 0

    def merged(self, key: str, base: Tensor, dtype: torch.dtype) -> Tensor:
        """Compute one tensor of the merged file, in `dtype`, and record its rounding loss.

        The tensor's memory is used again by the second call after this one.
        """
        self.turn = 1 - self.turn
        out = self.scratch.get(f"out {self.turn}", base.shape, dtype)
        exact = self.adapters.merged(key, base, self.scratch, out if dtype == torch.float32 else None)
        self.rounding.layers.append(round_into(out, key, self.adapters.name(key), base, exact, self.scratch))
        return out

    def items(
        self, base: Mapping[str, Tensor], dtype: torch.dtype | None, names: Iterable[str]
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the named tensors of the merged file: the base's, and the adapters' new ones.

        dtype: None keeps each tensor's dtype.
        """
        changed = set(self.adapters.changed(base))
        for key in names:
            tensor = base[key] if key in base else self.adapters.added_value(key)
            yield key, (self.merged if key in changed else round_to)(key, tensor, dtype or tensor.dtype)


def _ahead(items: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield the items; a second thread makes each while the previous one is being written."""
    with ThreadPoolExecutor(1) as worker:
        coming = worker.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = worker.submit(next, items, None)
            yield item


def merge_file(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    dtype: str = "base",
    force: bool = False,
    weights: Sequence[float] | None = None,
    hints: Hints = NO_HINTS,
    shown: bool = False,
) -> MergeReport:
    """Merge adapter files into a base and write `out`, with the base's keys, shapes and order.

    If the base is a Hugging Face folder, of any model, `out` is a folder with the same files, or a .pth if it
    is named so.

    Several adapters give
    - W + sum of w_i delta_i(W) for an adapted linear, where every delta is computed from the base's weight,
    - base + sum of w_i (T_i - base) for a tensor trained as a whole,
    - sum of w_i state_i for an initial state, which comes last in the file as `blocks.i.att.time_state`.

    weights: w_i, 1 each by default; negative ones, and one for a single adapter, are allowed.
    hints: for adapters of other projects, as in convert().
    dtype: "base" keeps every tensor's; "bf16", "fp16", "fp32" convert the whole file. "auto" keeps the base's
    unless it would lose more than 5 % of the update; then it takes fp16, or fp32 if fp16 loses as much.
    shown: show a bar on stderr in long work.

    Raises UserError before anything is written: for a file that is no adapter, shapes that do not fit,
    adapters with different tokenizers, ends of document or templates; unless `force`, also for another base
    than an adapter's, and a second merge of the same adapter.
    """
    started = time.perf_counter()
    if dtype not in ("base", "auto", *DTYPE_NAMES):
        raise UserError(f"dtype {dtype!r} is unknown; choose one of: base, auto, {', '.join(DTYPE_NAMES)}")
    paths = [adapter] if isinstance(adapter, (str, os.PathLike)) else list(adapter)
    _refuse_quantised(base, paths, out)
    to_folder = is_folder(base) and not os.fspath(out).endswith(".pth")
    if to_folder:
        if os.fspath(out).endswith(WEIGHT_ENDINGS):
            raise UserError(f"{out} is the name of a file; name a folder to write, or a .pth")
        refuse_inputs(out, base, *paths)
        check_new_folder(out)
    else:
        check_output(out, (base, *paths), MERGED_FORMAT)
    hints = dataclasses.replace(hints, base=os.fspath(base))
    (tensors, before), members = read_base(base), read_members(paths, weights, hints)
    identity = Identity(base, tensors)
    record = _record(base, before, identity.fingerprint, members)
    for m in members:
        _check_base(base, before, m, identity, tensors, force)
    files, header = read_weights(base) if to_folder else ({"": tensors}, {})
    stored = of_all(files)
    if to_folder or is_folder(base) and not is_model(tensors):
        members = placed(base, stored, members)
    adapters = Combination(members)
    if to_folder and is_model(tensors):
        _refuse_new_tensors(base, adapters.added(stored))
    _check_fit(base, stored, adapters, force)
    chosen, choice = _choose_dtype(stored, adapters) if dtype == "auto" else (DTYPE_NAMES.get(dtype), "")
    size = sum(map(functools.partial(_bytes_in, dtype=chosen), stored.values()))
    merger = _Merger(adapters)

    def values(names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        return tensors_with_progress(_ahead(merger.items(stored, chosen, names)), "merging", size, shown)

    notes: list[str] = []
    if to_folder:
        check_new_folder(out, size)
        forms = _forms(files, adapters, chosen)
        names = [name for part in forms.values() for name in file_order(part)]
        told = _provenance(base, header, tensors, chosen, record).header()
        notes = write_like(base, out, forms, values(names), told, _name(chosen) if chosen else "")
        if added := adapters.added(stored):
            notes.append(f"{listed(added, 3)}: new in the folder, as {base} has no tensor of such a name")
    else:
        require_writable(out, size)
        write_checkpoint(out, values([*stored, *adapters.added(stored)]), record)
        notes = _note_of_form(base, tensors)
    report = _report(out, record, merger, _dtypes(stored, adapters, chosen), choice)
    report.read = [*notes, *report.read]
    report.seconds = time.perf_counter() - started
    return report


def _refuse_quantised(base: str | os.PathLike[str], adapters: list[Any], out: str | os.PathLike[str]) -> None:
    """Raise UserError for a folder with quantised weights."""
    if how := is_folder(base) and read_config(os.fspath(base)).get("quantization_config"):
        method = how.get("quant_method") if isinstance(how, dict) else how
        given = " ".join(f"--adapter {path}" for path in adapters)
        raise UserError(
            f"{base} is quantised ({str(method)[:60]}): rounded to its steps, much of what was trained would"
            " be lost; merge into the model that it was made from: python -m rwkv_miss merge --base"
            f" UNQUANTISED {given} --output {out}"
        )


def _refuse_new_tensors(base: str | os.PathLike[str], names: list[str]) -> None:
    """Raise UserError for new tensors in an RWKV's folder that lacks them, or stores them in another form."""
    if names:
        raise UserError(
            f"{listed(names, 2)} can't be put into {base}, whose layout has no such tensors or has them in"
            " another form; merge into a .pth: --output MERGED.pth"
        )


def _forms(
    files: Mapping[str, Mapping[str, Tensor]], adapters: Combination, dtype: torch.dtype | None
) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of each file of a merged folder, without values: only shapes and dtypes."""
    forms = {file: dict(tensors) for file, tensors in files.items()}
    new = adapters.added(list(of_all(files)))
    forms[list(forms)[-1]] |= {name: adapters.added_value(name) for name in new}

    def form(tensor: Tensor) -> Tensor:
        kept = dtype if dtype and tensor.is_floating_point() else tensor.dtype
        return torch.empty(tensor.shape, dtype=kept, device="meta")

    return {file: {name: form(tensor) for name, tensor in part.items()} for file, part in forms.items()}


def _provenance(
    base: str | os.PathLike[str],
    header: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None,
    record: dict[str, Any],
) -> Provenance:
    """Build the metadata of a merged folder: the record, and for an RWKV also the checkpoint's tensors."""
    if not is_model(tensors):
        return Provenance({}, record)
    entries = (Provenance.found(header, base) or Provenance.of(tensors, None)).entries
    return Provenance({n: e._replace(dtype=dtype or e.dtype) for n, e in entries.items()}, record)


def _report(
    out: str | os.PathLike[str], record: dict[str, Any], merger: _Merger, dtypes: str, choice: str
) -> MergeReport:
    adapters = merger.adapters
    return MergeReport(
        out=os.fspath(out),
        linears=len(adapters.linears),
        replaced=len(adapters.whole),
        states=sum(map(is_state, adapters.whole)),
        dtype=dtypes,
        rounding=merger.rounding,
        seconds=0.0,
        bytes=sum(map(os.path.getsize, weight_paths(out))),
        record=record,
        parts=adapters.parts,
        weights=[m.weight for m in adapters.members],
        choice=choice,
        read=[note for m in adapters.members for note in m.notes],
    )


def _check_base(
    base: str | os.PathLike[str],
    before: dict[str, Any],
    adapter: Member,
    identity: Identity,
    tensors: dict[str, Tensor],
    force: bool,
) -> None:
    """Raise UserError for another base than the adapter's, and, unless `force`, for a second merge of it.

    before: the base's metadata.
    """
    earlier = {entry["adapter_fingerprint"] for entry in merged_adapters(before)}
    if not force and adapter.fingerprint in earlier:
        raise UserError(
            f"{base} is already a merge of {adapter.path} into {before.get('base')}; --force merges it a"
            " second time"
        )
    refuse_other_base(
        adapter.path,
        adapter.metadata,
        base,
        adapter.metadata.get("arch") and Arch.detect(tensors),
        lambda: identity.fingerprint,
        "merge into that one, or --force",
        force,
    )


def _check_fit(
    base: str | os.PathLike[str], stored: Mapping[str, Tensor], adapters: Combination, force: bool
) -> None:
    """Raise UserError unless the adapters fit the tensors and, without `force`, were trained on them."""
    adapters.check(stored)
    for m in () if force else adapters.members:
        if not m.rows:  # a folder may store a model's stack of experts as a tensor for each
            found = functools.partial(weights_fingerprint, [stored[key] for key in m.by_weight])
            refuse_other_weights(m.path, m.metadata, base, found, "merge into that one, or --force")


def _bytes_in(tensor: Tensor, dtype: torch.dtype | None) -> int:
    """Return the bytes of a tensor in a file of this dtype; integers, and all with None, keep their own."""
    return tensor.numel() * (dtype if dtype and tensor.is_floating_point() else tensor.dtype).itemsize


def read_base(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors and metadata of the file to merge into.

    Raises UserError for an adapter or the checkpoint of a run.
    """
    tensors, metadata = read_described(path, any_folder=True)
    refuse_run_checkpoint(path, metadata)
    if metadata.get("format") == ADAPTER_FORMAT:
        raise UserError(
            f"{path} is an adapter file, expected a model, such as the one that it was trained on"
        )
    return tensors, metadata


def _note_of_form(base: str | os.PathLike[str], tensors: Mapping[str, Tensor]) -> list[str]:
    """Note that the merged file is a .pth, if the base is in another form."""
    if not (os.path.isdir(base) or is_safetensors(base) or read_model(base).notes):
        return []
    names = "RWKV's names" if is_model(tensors) else f"the base's names, such as {next(iter(tensors))}"
    return [f"whatever the form of the base, the merged file is a plain .pth with {names}"]


def _record(base, before: dict[str, Any], base_fingerprint: str, members: list[Member]) -> dict[str, Any]:
    """Build the metadata of the merged file: facts for programs that read it, and its adapters."""
    head = {"format": MERGED_FORMAT, "base": name_of(base), "base_fingerprint": base_fingerprint}
    common = common_record(members, before)
    if len(members) == 1:
        return {**head, **members[0].record(), **common, "versions": members[0].metadata["versions"]}
    entries = [
        {"adapter": os.path.basename(m.path), **m.record(), "versions": m.metadata["versions"]}
        for m in members
    ]
    return {**head, "adapters": entries, **common}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtypes(tensors: dict[str, Tensor], adapters: Combination, chosen: torch.dtype | None) -> str:
    """Name the dtypes of the changed tensors in the merged file, for people."""
    dtypes = {_name(chosen or tensors[key].dtype) for key in adapters.changed(tensors)}
    return ", ".join(sorted(dtypes)) or "no tensor of the base"


def _choose_dtype(tensors: dict[str, Tensor], adapters: Combination) -> tuple[torch.dtype | None, str]:
    """Choose the dtype for --dtype auto: None (the base's), fp16 or fp32; returns the reason, too."""
    tried = []
    if not adapters.changed(tensors):
        return None, ""
    for dtype in (None, torch.float16):
        name = _dtypes(tensors, adapters, dtype)
        trial = _Merger(adapters)
        try:
            for key in adapters.changed(tensors):
                trial.merged(key, tensors[key], dtype or tensors[key].dtype)
            if dtype:
                for key, tensor in tensors.items():
                    round_to(key, tensor, dtype)
        except UserError:
            tried.append(f"{name} has no room for the largest values")
            continue
        loses = f"{name} loses {percent(trial.rounding.lost)} of the update"
        if trial.rounding.lost <= LOSS_LIMIT:
            before = f"{', '.join(tried)}; " if tried else ""
            return dtype, f"--dtype auto: {before}{loses}, at most {percent(LOSS_LIMIT)} is allowed"
        tried.append(loses)
    why = f"{', '.join(tried)}; at most {percent(LOSS_LIMIT)} is allowed, so the file is in float32"
    return torch.float32, f"--dtype auto: {why}"
