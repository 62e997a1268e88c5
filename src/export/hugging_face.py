"""Folders for Hugging Face's transformers, in one of two layouts.

official is `Rwkv7ForCausalLM`: the checkpoint's names and shapes behind `rwkv7.`. fla is
`RWKV7ForCausalLM` of flash-linear-attention, which rwkv7-hf loads too.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from rwkv_miss.errors import UserError
from rwkv_miss.files.checkpoint import Arch
from rwkv_miss.files.hf_folder import LN_EPS
from rwkv_miss.files.hf_names import CONFIG, VALUE_RESIDUAL_FILE, WEIGHTS, official_name, table
from rwkv_miss.files.output import write_folder, write_json
from rwkv_miss.files.provenance import Provenance
from rwkv_miss.files.safetensors_io import write_safetensors
from rwkv_miss.files.tensor_map import VALUE_RESIDUAL

from ..data.chat_template import Template
from ..data.tokenizer import Tokenizer
from ..model import RWKV
from .hf_tokenizer import fla_files, official_files

LAYOUTS = ("official", "fla")
GENERATION = "generation_config.json"
USUAL_RANK = 32  # rank of a value residual, if no block has one


def check(arch: Arch, layout: str) -> None:
    """Raise UserError for a model that the loaders of a layout would compute wrongly."""
    if arch.version == 6:
        official = "the official layout is RWKV-7's alone, and " if layout == "official" else ""
        raise UserError(
            f"Hugging Face: {official}the loader of RWKV-6 folders, flash-linear-attention, normalises the"
            " heads with the eps of the layers, 1e-5; RWKV-6 has 64e-5 there, so the logits would be others."
            " GGUF and safetensors take RWKV-6"
        )
    loaders = "rwkv7-hf and flash-linear-attention" if layout == "fla" else "those of Rwkv7ForCausalLM"
    if arch.head_size != 64:
        raise UserError(
            f"Hugging Face: the loaders, {loaders}, scale ln_x's eps with the head size, here to"
            f" {arch.head_size}e-5; RWKV-7 has 64e-5 with heads of any size, so the logits would be others."
            " Only heads of 64 are right"
        )
    if layout == "official" and arch.dim_att != arch.n_embd:
        raise UserError(
            f"Hugging Face: the heads are {arch.dim_att} wide in all and the model {arch.n_embd};"
            " Rwkv7ForCausalLM has no models where they differ"
        )


def common_config(arch: Arch) -> dict[str, object]:
    """Return the part of config.json that both layouts have."""
    return {
        "model_type": "rwkv7",
        "vocab_size": arch.vocab_size,
        "hidden_size": arch.n_embd,
        "num_hidden_layers": arch.n_layer,
        "num_heads": arch.n_head,
        "head_dim": arch.head_size,
        "intermediate_size": arch.dim_ffn,
        "decay_low_rank_dim": arch.ranks["w"],
        "a_low_rank_dim": arch.ranks["a"],
        "v_low_rank_dim": arch.ranks["v"] or USUAL_RANK,
        "gate_low_rank_dim": arch.ranks["g"],
        "norm_eps": LN_EPS,
        "norm_bias": True,
        "tie_word_embeddings": False,
        "use_cache": True,
    }


def special_ids(begin: int | None, end: int | None) -> dict[str, int | None]:
    """Return the ids of the tokens that begin and end a document.

    If no token begins one, it is the end of the document before: transformers' generate() starts from it
    without a prompt.
    """
    return {"bos_token_id": begin, "eos_token_id": end, "pad_token_id": end}


def fla_config(arch: Arch, dtype: str) -> dict[str, object]:
    """Build config.json of the other layout, for both of its loaders."""
    return {
        **common_config(arch),
        **special_ids(0, 0),
        "architectures": ["RWKV7ForCausalLM"],
        "hidden_ratio": arch.dim_ffn / arch.n_embd,
        "hidden_act": "sqrelu",
        "norm_first": True,
        "value_dim": [arch.n_embd] * arch.n_layer,
        "attn_mode": "chunk",
        "fuse_norm": False,
        "torch_dtype": dtype,
    }


def write(
    out,
    layout: str,
    tensors: Mapping[str, Tensor],
    arch: Arch,
    tokenizer: Tokenizer | None,
    template: Template,
    bos: tuple[int, ...],
    provenance: Provenance,
) -> list[str]:
    """Write a checked model as a new folder, whole or not at all. Returns notes on what is not in it."""
    dtype = str(tensors["emb.weight"].dtype).removeprefix("torch.")
    if layout == "official":
        stored, unread = _official_tensors(tensors, arch), {}
        end = tokenizer.eod[0] if tokenizer and len(tokenizer.eod) == 1 else None
        ids = special_ids(bos[0] if bos else end, end)
        ends = {"eos_token_id": [end, *turn_end]} if (turn_end := _turn_end(tokenizer, template)) else {}
        described = {
            CONFIG: {**common_config(arch), **ids, "architectures": ["Rwkv7ForCausalLM"], "dtype": dtype},
            GENERATION: ids | ends,
        }
        of_tokenizer, notes = official_files(tokenizer, template, bos)
    else:
        stored = {mapped.stored: mapped.store(tensors) for mapped in table(arch.n_layer)}
        unread = {name: tensor for name, tensor in tensors.items() if name in VALUE_RESIDUAL}
        described = {CONFIG: fla_config(arch, dtype)}
        of_tokenizer, notes = fla_files(tokenizer, template, bos, arch.vocab_size)
    writers: dict[str, Callable[[str], None]] = {
        WEIGHTS: lambda path: write_safetensors(path, stored, provenance.header())
    }
    if unread:
        writers[VALUE_RESIDUAL_FILE] = lambda path: write_safetensors(
            path, unread, Provenance.of(unread, {}).header()
        )
    for name, content in described.items():
        writers[name] = functools.partial(write_json, content=content)
    write_folder(out, writers | of_tokenizer)
    return notes


def _turn_end(tokenizer: Tokenizer | None, template: Template) -> list[int]:
    """Return the token that ends every answer, besides the end of document: a flower, ChatML's <|im_end|>."""
    text = template.turn_end.strip()
    try:
        ids = tokenizer.encode(text) if tokenizer and text else []
    except UserError:  # the vocabulary has no token for it
        return []
    return [token for token in ids if len(ids) == 1 and (token,) != tokenizer.eod]


def _official_tensors(tensors: Mapping[str, Tensor], arch: Arch) -> dict[str, Tensor]:
    """Rename the tensors as in the layout, in the shapes of released files.

    Block 0 has a value residual there. Nothing reads it, so one that the checkpoint lacks is zeros.
    """
    ranks = arch.ranks | {"v": arch.ranks["v"] or USUAL_RANK}
    with torch.device("meta"):
        full = RWKV(dataclasses.replace(arch, ranks=ranks, layer0_value_residual=True))
    stored = {}
    for name, p in full.named_parameters():
        tensor = tensors.get(name)
        if tensor is None:
            tensor = torch.zeros(p.shape, dtype=tensors["emb.weight"].dtype)
        stored[official_name(name)] = tensor.reshape(p.shape)
    return stored
