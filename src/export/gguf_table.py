"""Table between GGUF's tensors of RWKV-6 and RWKV-7 and the checkpoint's, for both directions.

GGUF's names are those of llama.cpp's src/llama-arch.cpp and of its models rwkv6 and rwkv7. GGUF lists shapes
reversed. A tensor that is not in the table is in neither file. The exception is block 0's value residual.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from rwkv_miss.files.checkpoint import Arch
from rwkv_miss.files.tensor_map import LARGE, LOW_RANK, VALUE_RESIDUAL, VECTOR, TensorMap


def _norm(gguf: str, name: str) -> list[TensorMap]:
    return [TensorMap(f"{gguf}.{part}", (f"{name}.{part}",), "same", VECTOR) for part in ("weight", "bias")]


def _linears(gguf: str, part: str, names: str) -> list[TensorMap]:
    return [
        TensorMap(f"{gguf}_{name}.weight", (f"{part}.{name}.weight",), "same", LARGE)
        for name in names.split()
    ]


def _tensor(gguf: str, form: str, kind: str, *names: str) -> TensorMap:
    return TensorMap(f"{gguf}.weight", names, form, kind)


BEFORE_LAYERS = [
    _tensor("token_embd", "same", LARGE, "emb.weight"),
    *_norm("token_embd_norm", "blocks.0.ln0"),
]
AFTER_LAYERS = [*_norm("output_norm", "ln_out"), _tensor("output", "same", LARGE, "head.weight")]
LAYER_TENSORS = [
    *_norm("attn_norm", "ln1"),
    *_norm("attn_norm_2", "ln2"),
    *_norm("time_mix_ln", "att.ln_x"),
    *_linears("time_mix", "att", "receptance key value output"),
    *_linears("channel_mix", "ffn", "key value"),
]
OF_VERSION = {
    6: [
        *_linears("time_mix", "att", "gate"),
        *_linears("channel_mix", "ffn", "receptance"),
        _tensor("time_mix_lerp_x", "flat", VECTOR, "att.time_maa_x"),
        _tensor("time_mix_lerp_fused", "fused", VECTOR, *(f"att.time_maa_{name}" for name in "wkvrg")),
        *(_tensor(f"time_mix_w{i}", "transposed", LOW_RANK, f"att.time_maa_w{i}") for i in (1, 2)),
        _tensor("time_mix_decay", "flat", VECTOR, "att.time_decay"),
        *(_tensor(f"time_mix_decay_w{i}", "transposed", LOW_RANK, f"att.time_decay_w{i}") for i in (1, 2)),
        _tensor("time_mix_first", "same", VECTOR, "att.time_faaaa"),
        *(_tensor(f"channel_mix_lerp_{name}", "flat", VECTOR, f"ffn.time_maa_{name}") for name in "kr"),
    ],
    7: [
        _tensor("time_mix_lerp_fused", "fused", VECTOR, *(f"att.x_{name}" for name in "rwkvag")),
        *(_tensor(f"time_mix_{n}", "flat", VECTOR, f"att.{n}") for n in ("w0", "a0", "v0", "k_k", "k_a")),
        _tensor("time_mix_r_k", "heads", VECTOR, "att.r_k"),
        *(_tensor(f"time_mix_{n}{i}", "transposed", LOW_RANK, f"att.{n}{i}") for n in "wavg" for i in (1, 2)),
        _tensor("channel_mix_lerp_k", "flat", VECTOR, "ffn.x_k"),
    ],
}


def table(version: int, n_layer: int) -> list[TensorMap]:
    """Build the whole table of a model, in GGUF's usual order."""
    of_layer = LAYER_TENSORS + OF_VERSION[version]
    layers = [mapped.at(layer, "blk") for layer in range(n_layer) for mapped in of_layer]
    return BEFORE_LAYERS + layers + AFTER_LAYERS


def lora_name(version: int, linear: str) -> str | None:
    """Return GGUF's name of the weight that llama.cpp adds a LoRA of this linear to; None without one.

    It ignores one of a low-rank map silently, and turns one of the embedding.
    """
    if linear == "head":
        return "output.weight"
    names = {m.names[0]: m.stored for m in LAYER_TENSORS + OF_VERSION[version] if m.kind == LARGE}
    block, layer, name = (*linear.split(".", 2), "", "")[:3]
    stored = names.get(f"{name}.weight") if block == "blocks" else None
    return stored and f"blk.{layer}.{stored}"


def keys(arch: Arch) -> dict[str, int]:
    """Return the sizes that llama.cpp asks for, under `rwkv6.` or `rwkv7.`."""
    sizes = {
        "context_length": 1 << 20,
        "embedding_length": arch.n_embd,
        "block_count": arch.n_layer,
        "feed_forward_length": arch.dim_ffn,
        "attention.head_count": 0,
        "wkv.head_size": arch.head_size,
    }
    if arch.version == 6:
        return sizes | {
            "time_mix_extra_dim": arch.ranks["maa"],
            "time_decay_extra_dim": arch.ranks["decay"],
            "rescale_every_n_layers": 0,
        }
    ranks = {"decay": "w", "iclr": "a", "value_residual_mix": "v" if arch.n_layer > 1 else "a", "gate": "g"}
    return sizes | {f"attention.{key}_lora_rank": arch.ranks[name] for key, name in ranks.items()}


def fill_block_0(tensors: Mapping[str, Tensor], arch: Arch) -> dict[str, Tensor]:
    """Give block 0 a value residual, of the rank that `a` has.

    llama.cpp needs it in RWKV-7, though nothing reads it. If the checkpoint has none, it is zeros. The
    checkpoint's own gets columns of zeros, or loses its last columns if its rank is larger.
    """
    if arch.version == 6:
        return dict(tensors)
    if arch.layer0_value_residual:
        residual = _with_rank([tensors[name] for name in VALUE_RESIDUAL], arch.ranks["a"])
    else:
        residual = [torch.zeros_like(tensors[name.replace("att.v", "att.a")]) for name in VALUE_RESIDUAL]
    return {**tensors, **dict(zip(VALUE_RESIDUAL, residual))}


def restore_block_0(tensors: Mapping[str, Tensor], rank: int | None) -> dict[str, Tensor]:
    """Invert fill_block_0(): the value residual of block 0 has the rank `rank`; None removes it."""
    if rank is None:
        return {name: tensor for name, tensor in tensors.items() if name not in VALUE_RESIDUAL}
    residual = _with_rank([tensors[name] for name in VALUE_RESIDUAL], rank)
    return {**tensors, **dict(zip(VALUE_RESIDUAL, residual))}


def _with_rank(residual: list[Tensor], rank: int) -> list[Tensor]:
    v0, v1, v2 = residual
    more = rank - v1.shape[1]  # where it is negative, pad() takes columns away
    return [v0, pad(v1, (0, more)), pad(v2, (0, 0, 0, more))]
