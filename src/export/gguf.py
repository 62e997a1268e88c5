"""GGUF files, which llama.cpp reads, written piece by piece through the package gguf.

The format is described in docs/gguf.md of ggml-org/ggml.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rwkv_miss.errors import UserError
from rwkv_miss.files.checkpoint import Arch
from rwkv_miss.files.hf_folder import LN_EPS
from rwkv_miss.files.output import whole_file
from rwkv_miss.files.provenance import KEY, Provenance
from rwkv_miss.files.tensor_map import LARGE, LOW_RANK
from rwkv_miss.progress import progress

from ..common.formatting import counted
from . import gguf_table
from .vocabulary import Vocabulary

# types of the large matrices, with GGUF's number for a file of mostly these
FILE_TYPES = {"F32": 0, "BF16": 32, "Q8_0": 7, "Q4_0": 2}
# F16 would round the activations too, and their squares in the channel mix can be beyond its range
DEFAULT_TYPE = "BF16"
FLOAT_TYPES = {"F32": torch.float32, "BF16": torch.bfloat16}
QUANT_ROW = 32  # weights that share a scale
PIECE = 1 << 19  # elements converted at once


def check(arch: Arch, kind: str) -> list[str]:
    """Raise UserError for a model that llama.cpp does not run or computes wrongly, and for a missing package.

    Returns notes on parts that not all of llama.cpp's backends run.
    """
    _package()
    if arch.dim_att != arch.n_embd:
        raise UserError(
            f"GGUF: the heads are {arch.dim_att} wide in all and the model {arch.n_embd}; llama.cpp has no"
            " models where they differ"
        )
    if arch.version == 7 and arch.head_size % 64:
        raise UserError(
            f"GGUF: an RWKV-7 with heads of {arch.head_size} would load in llama.cpp and compute something"
            " else silently: its WKV kernel for AVX-512 steps 64 channels at a time, into the next"
            " head. Heads of 64 or a multiple are right"
        )
    if kind in ("Q8_0", "Q4_0"):
        for name, width in (("width", arch.n_embd), ("ffn", arch.dim_ffn)):
            if width % QUANT_ROW:
                raise UserError(
                    f"GGUF: {kind} needs rows of a multiple of {QUANT_ROW}, the {name} is {width}; --type"
                    " BF16 takes any"
                )
    if arch.head_size not in (64, 128):
        return [
            f"heads of {arch.head_size}: llama.cpp runs them on a CPU; its CUDA kernels have heads of 64 and"
            " 128 only"
        ]
    return []


def write(
    path,
    tensors: Mapping[str, Tensor],
    arch: Arch,
    kind: str,
    name: str,
    vocabulary: Vocabulary,
    provenance: Provenance,
) -> list[str]:
    """Write a checked model, whole or not at all. Returns notes on parts that the file lacks.

    Large matrices get the type `kind`. Low-rank maps are BF16, or F32 where `kind` is F32. Vectors are F32. A
    piece of one tensor is in memory at a time.
    """
    gguf = _package()
    types = gguf.GGMLQuantizationType
    kinds = {LARGE: types[kind], LOW_RANK: types["F32" if kind == "F32" else "BF16"]}
    tensors = gguf_table.fill_block_0(tensors, arch)
    table = gguf_table.table(arch.version, arch.n_layer)
    type_of = {mapped.stored: kinds.get(mapped.kind, types.F32) for mapped in table}

    def add_keys(writer):
        _add_keys(writer, arch, kind, name, vocabulary, provenance)

    stored = [(m.stored, type_of[m.stored], functools.partial(m.store, tensors)) for m in table]
    _write(path, arch.version, add_keys, stored)
    type_of = {name: type_of[mapped.stored] for mapped in table for name in mapped.names}
    return _notes(arch, kind, type_of, provenance)


def write_lora(path, factors: Mapping[str, Tensor], version: int, kind: str, name: str) -> list[str]:
    """Write a LoRA for llama.cpp, whole or not at all: WEIGHT.lora_a and WEIGHT.lora_b by GGUF's names.

    Their product is the change of the weight. Returns notes. Raises UserError for a type that is no float.
    """
    gguf = _package()
    if kind not in FLOAT_TYPES:
        raise UserError(f"GGUF: a LoRA has --type {' or '.join(FLOAT_TYPES)}; {kind} is for whole models")
    ranks = {len(factor) for stored, factor in factors.items() if stored.endswith(".lora_a")}

    def add_keys(writer):
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_name(name)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        # llama.cpp divides it by the rank; without it the product counts as it is, of any rank
        if len(ranks) == 1:
            writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, *ranks)

    type_ = gguf.GGMLQuantizationType[kind]
    stored = [(name, type_, functools.partial(factors.get, name)) for name in factors]
    _write(path, version, add_keys, stored)
    if all(torch.equal(factor, factor.to(FLOAT_TYPES[kind]).float()) for factor in factors.values()):
        return []
    return [f"the factors had to be rounded to {kind}; --type F32 keeps all values"]


def _write(
    path, version: int, add_keys: Callable, stored: list[tuple[str, Any, Callable[[], Tensor]]]
) -> None:
    """Write keys and tensors: (name, type, the function that makes it)."""
    gguf = _package()
    shapes = [make().shape for _, _, make in stored]
    blocks = [gguf.GGML_QUANT_SIZES[type_] for _, type_, _ in stored]
    nbytes = [shape.numel() // block * size for shape, (block, size) in zip(shapes, blocks)]
    with whole_file(path, sum(nbytes)) as whole:
        writer = gguf.GGUFWriter(whole.name, f"rwkv{version}")
        try:
            add_keys(writer)
            for (name, type_, _), shape, size in zip(stored, shapes, nbytes):
                writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=type_)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            file = writer.fout[0]
            for _, type_, make in progress(stored, "writing GGUF", unit="tensors"):
                writer.write_padding(file, file.tell())
                for piece in _pieces(make(), type_):
                    file.write(piece)
            writer.write_padding(file, file.tell())
        finally:
            writer.close()


def _package():
    try:
        import gguf
    except ModuleNotFoundError:
        raise UserError("the package gguf, which writes these files, is absent: pip install gguf") from None
    return gguf


def _pieces(tensor: Tensor, type_) -> Iterator[memoryview]:
    """Yield the bytes of a tensor in a type, some rows at a time."""
    quantise = _package().quants.quantize
    rows = tensor.reshape(-1, tensor.shape[-1])
    for part in rows.split(max(1, PIECE // rows.shape[-1])):
        if type_.name in FLOAT_TYPES:
            array = part.to(FLOAT_TYPES[type_.name]).contiguous().view(torch.uint8).numpy()
        else:
            array = quantise(part.float().contiguous().numpy(), type_)
        yield memoryview(array).cast("B")


def _add_keys(
    writer, arch: Arch, kind: str, name: str, vocabulary: Vocabulary, provenance: Provenance
) -> None:
    writer.add_name(name)
    writer.add_file_type(FILE_TYPES[kind])
    for key, value in gguf_table.keys(arch).items():
        writer.add_uint32(f"{writer.arch}.{key}", value)
    # without it llama.cpp takes 0, silently
    writer.add_float32(f"{writer.arch}.attention.layer_norm_epsilon", LN_EPS)
    writer.add_tokenizer_model(vocabulary.model)
    if vocabulary.tokens:
        writer.add_token_list(vocabulary.tokens)
        writer.add_token_types(vocabulary.types)
        writer.add_bos_token_id(vocabulary.end if vocabulary.bos is None else vocabulary.bos)
        writer.add_add_bos_token(vocabulary.bos is not None)
        writer.add_eos_token_id(vocabulary.end)
        if vocabulary.eot is not None:
            writer.add_eot_token_id(vocabulary.eot)
        writer.add_chat_template(vocabulary.chat_template)
    else:
        writer.add_uint32(f"{writer.arch}.vocab_size", arch.vocab_size)
    writer.add_string(KEY, provenance.text())


def _notes(arch: Arch, kind: str, types: dict[str, object], provenance: Provenance) -> list[str]:
    notes: list[str] = []
    rounded = provenance.rounded(
        {name: FLOAT_TYPES.get(type_.name, torch.int8) for name, type_ in types.items()}
    )
    if rounded and kind in FLOAT_TYPES:
        better = "; --type F32 keeps all values" if kind == "BF16" else ""
        tensors = counted(len(rounded), "tensor")
        notes.append(f"{tensors}, {rounded[0]} first, had to be rounded to {kind}{better}")
    if arch.layer0_value_residual and provenance.entries["blocks.0.att.v1"].shape[1] > arch.ranks["a"]:
        notes.append(
            "the value residual of block 0, which no runtime reads, is cut to a's rank; the way back gives"
            " zeros in its place"
        )
    return notes
