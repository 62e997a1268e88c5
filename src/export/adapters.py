"""Adapters as other programs take them without a merge: a LoRA for llama.cpp, states for Ai00."""

from __future__ import annotations

from pathlib import Path

from rwkv_miss.convert import format_of, read_any
from rwkv_miss.convert.formats import Adapter, refuse_what_would_be_lost
from rwkv_miss.convert.hf_export import whole_tensors
from rwkv_miss.convert.peft_forms import as_lora
from rwkv_miss.convert.source import open_source
from rwkv_miss.errors import UserError
from rwkv_miss.files.checkpoint import Arch
from rwkv_miss.files.provenance import Provenance

from . import ai00, gguf, gguf_table

MERGE = "merge the adapter into its base (rwkv-miss merge) and export the result"


def adapter_at(path) -> Adapter | None:
    """Read an adapter of any project; None for a model."""
    return read_any(path)[1] if format_of(open_source(path)) else None


def write_gguf(path, adapter: Adapter, out, kind: str) -> list[str]:
    """Write the adapter as a LoRA; returns notes. Raises UserError for one that is none."""
    arch = arch_of(path, adapter)
    gguf.check(arch, gguf.DEFAULT_TYPE)
    refuse_what_would_be_lost(adapter, "gguf")
    if whole := next(iter(whole_tensors(adapter)), ""):
        raise UserError(f"{path}: {whole} is trained as a whole, which no LoRA holds; {MERGE}")
    stored = {name: gguf_table.lora_name(arch.version, name) for name in adapter.metadata["linears"]}
    if other := next((name for name in stored if not stored[name]), ""):
        raise UserError(f"{path} adapts {other}, to which llama.cpp applies no LoRA; {MERGE}")
    factors = as_lora(adapter).tensors
    named = {
        f"{stored[name]}.lora_{part.lower()}": factors[f"{name}.lora_{part}.weight"]
        for name in stored
        for part in "AB"
    }
    return gguf.write_lora(out, named, arch.version, kind, Path(path).stem)


def write_ai00(path, adapter: Adapter, out, kind: str) -> list[str]:
    """Write initial states; returns notes. Raises UserError for an adapter of anything else."""
    if other := next((name for name in adapter.tensors if not name.endswith(".att.time_state")), ""):
        raise UserError(f"{path} trains {other}, and Ai00 takes no adapters but initial states; {MERGE}")
    return ai00.write(out, adapter.tensors, Provenance.of(adapter.tensors, None))


def arch_of(path, adapter: Adapter) -> Arch:
    """Return the sizes of the adapter's base. Raises UserError if it does not record them."""
    if recorded := adapter.metadata.get("arch"):
        return Arch.from_dict(recorded)
    raise UserError(
        f"{path} records no sizes of its model; python -m rwkv_miss convert {path} OUT.pth --to native --base"
        " MODEL, the base's file or folder, adds them"
    )


# form -> (the name of what is written, its writer)
WRITERS = {"gguf": ("GGUF LoRA", write_gguf), "ai00": ("Ai00 states", write_ai00)}
