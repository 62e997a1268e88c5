"""Adapters as other programs take them without a merge: a GGUF LoRA for llama.cpp."""

from __future__ import annotations

from pathlib import Path

from rwkv_miss.convert import format_of, read_any
from rwkv_miss.convert.formats import Adapter, refuse_what_would_be_lost
from rwkv_miss.convert.hf_export import whole_tensors
from rwkv_miss.convert.peft_forms import as_lora
from rwkv_miss.convert.source import open_source
from rwkv_miss.errors import UserError
from rwkv_miss.files.checkpoint import Arch

from . import gguf, gguf_table


def adapter_at(path) -> Adapter | None:
    """Read an adapter of any project; None for a model."""
    return read_any(path)[1] if format_of(open_source(path)) else None


def write_gguf(path, adapter: Adapter, out, kind: str) -> list[str]:
    """Write the adapter as a LoRA; returns notes. Raises UserError for one that is none."""
    arch = arch_of(path, adapter)
    gguf.check(arch, gguf.DEFAULT_TYPE)
    refuse_what_would_be_lost(adapter, "gguf")
    way = "merge the adapter into its base (rwkv-miss merge) and export the result"
    if whole := next(iter(whole_tensors(adapter)), ""):
        raise UserError(f"{path}: {whole} is trained as a whole, which no LoRA holds; {way}")
    stored = gguf_table.adapted(arch.version, arch.n_layer)
    if other := next((name for name in adapter.metadata["linears"] if name not in stored), ""):
        raise UserError(f"{path} adapts {other}, to which llama.cpp applies no LoRA; {way}")
    factors = as_lora(adapter).tensors
    named = {
        f"{stored[name]}.lora_{part.lower()}": factors[f"{name}.lora_{part}.weight"]
        for name in adapter.metadata["linears"]
        for part in "AB"
    }
    return gguf.write_lora(out, named, arch.version, kind, Path(path).stem)


def arch_of(path, adapter: Adapter) -> Arch:
    """Return the sizes of the adapter's base. Raises UserError if it does not record them."""
    if recorded := adapter.metadata.get("arch"):
        return Arch.from_dict(recorded)
    raise UserError(
        f"{path} records no sizes of its model; python -m rwkv_miss convert {path} OUT.pth --to native --base"
        " MODEL.pth adds them"
    )
