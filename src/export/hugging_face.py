"""Folders for Hugging Face's transformers; rwkv7-hf and flash-linear-attention load RWKV-7 from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from rwkv_miss.errors import UserError
from rwkv_miss.files.checkpoint import Arch
from rwkv_miss.files.hf_names import CONFIG, UNREAD, WEIGHTS, table
from rwkv_miss.files.output import write_bytes, write_folder, write_json
from rwkv_miss.files.provenance import Provenance
from rwkv_miss.files.safetensors_io import write_safetensors
from rwkv_miss.files.tensor_map import VALUE_RESIDUAL

from ..data.chat_template import Template
from ..data.rwkv_template import RwkvTemplate
from ..data.tokenizer import ByteTokenizer, JsonTokenizer, Tokenizer
from .chat_template import rwkv_jinja

VOCABULARY = "rwkv_vocab_v20230424.txt"  # rwkv7-hf looks for this name, whatever the vocabulary
END, PADDING = "<|endoftext|>", "<|padding|>"


def check(arch: Arch) -> None:
    """UserError for a model that the loaders would compute wrongly."""
    if arch.version == 6:
        raise UserError(
            "Hugging Face: the loader of RWKV-6 folders, flash-linear-attention, normalises the heads with"
            " the eps of the layers, 1e-5; RWKV-6 has 64e-5 there, so the logits would be others. GGUF and"
            " safetensors take RWKV-6"
        )
    if arch.head_size != 64:
        raise UserError(
            "Hugging Face: the loaders, rwkv7-hf and flash-linear-attention, scale ln_x's eps with the head"
            f" size, here to {arch.head_size}e-5; RWKV-7 has 64e-5 with heads of any size, so the logits"
            " would be others. Only heads of 64 are right"
        )


def config(arch: Arch, tensors: Mapping[str, Tensor]) -> dict[str, object]:
    """config.json, for both loaders."""
    return {
        "architectures": ["RWKV7ForCausalLM"],
        "model_type": "rwkv7",
        "vocab_size": arch.vocab_size,
        "hidden_size": arch.n_embd,
        "num_hidden_layers": arch.n_layer,
        "num_heads": arch.n_head,
        "head_dim": arch.head_size,
        "intermediate_size": arch.dim_ffn,
        "hidden_ratio": arch.dim_ffn / arch.n_embd,
        "hidden_act": "sqrelu",
        "norm_first": True,
        "norm_bias": True,
        "norm_eps": 1e-5,
        "decay_low_rank_dim": arch.ranks["w"],
        "a_low_rank_dim": arch.ranks["a"],
        "v_low_rank_dim": arch.ranks["v"] or 32,
        "gate_low_rank_dim": arch.ranks["g"],
        "value_dim": [arch.n_embd] * arch.n_layer,
        "attn_mode": "chunk",
        "fuse_norm": False,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "use_cache": True,
        "torch_dtype": str(tensors["emb.weight"].dtype).removeprefix("torch."),
    }


def write(
    out,
    tensors: Mapping[str, Tensor],
    arch: Arch,
    tokenizer: Tokenizer | None,
    template: Template,
    provenance: Provenance,
) -> list[str]:
    """Write a checked model as a new folder, whole or not at all. Returns notes: what is not in it."""
    stored = {mapped.stored: mapped.store(tensors) for mapped in table(arch.n_layer)}
    unread = {name: tensor for name, tensor in tensors.items() if name in VALUE_RESIDUAL}
    writers: dict[str, Callable[[str], None]] = {
        WEIGHTS: lambda path: write_safetensors(path, stored, provenance.header())
    }
    if unread:
        writers[UNREAD] = lambda path: write_safetensors(path, unread, Provenance.of(unread, {}).header())
    writers[CONFIG] = lambda path: write_json(path, config(arch, tensors))
    of_tokenizer, notes = _tokenizer_files(tokenizer, template, arch.vocab_size)
    write_folder(out, writers | of_tokenizer)
    return notes


def _tokenizer_files(
    tokenizer: Tokenizer | None, template: Template, vocab_size: int
) -> tuple[dict[str, Callable[[str], None]], list[str]]:
    """(writers of the files by name, notes)."""
    jinja = rwkv_jinja(template.name) if isinstance(template, RwkvTemplate) else template.record
    if isinstance(tokenizer, JsonTokenizer):
        described: dict[str, object] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": tokenizer.decode(tokenizer.eod),
        }
        table, content = "tokenizer.json", Path(tokenizer.name).read_bytes()
    elif isinstance(tokenizer, ByteTokenizer) and tokenizer.encoding == "utf-8" and tokenizer.eod == (0,):
        described = {
            "tokenizer_class": "RWKV7Tokenizer",
            "model_vocab_size": vocab_size,
            "eos_token": END,
            "pad_token": PADDING,
            "errors": "replace",
            "split_special_tokens": True,  # what a user types is text, also END
        }
        pieces = [(token, piece) for token, piece in sorted(tokenizer.table.items()) if piece]
        table = VOCABULARY
        content = "".join(f"{token} {piece!r} {len(piece)}\n" for token, piece in pieces).encode()
    else:
        reason = f"rwkv7-hf has none like {tokenizer.name}" if tokenizer else "none was asked for"
        return {}, [f"no tokenizer is in the folder: {reason}"]
    described["chat_template"] = jinja
    return {
        table: lambda path: write_bytes(path, content),
        "tokenizer_config.json": lambda path: write_json(path, described),
    }, []
