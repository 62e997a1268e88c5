"""A model in llama.cpp's file format, without a vocabulary, as benchmarks.decode gives it to llama.cpp; needs `pip install gguf`."""

import numpy as np
import torch

from src.model import RWKV


def write_gguf(path, model: RWKV, kind: str) -> None:
    """`kind` F32, BF16 or Q8_0 is the type of the large matrices; the low-rank maps are bf16 with the last two, vectors always fp32."""
    import gguf

    arch, tensors = model.arch, {name: p.detach().float() for name, p in model.named_parameters()}
    name = f"rwkv{arch.version}"
    writer = gguf.GGUFWriter(path, name)
    large = gguf.GGMLQuantizationType[kind]
    low_rank = gguf.GGMLQuantizationType.F32 if kind == "F32" else gguf.GGMLQuantizationType.BF16
    writer.add_file_type({"F32": 0, "BF16": 32, "Q8_0": 7}[kind])
    for key, value in {
        "context_length": 1 << 20, "embedding_length": arch.n_embd, "block_count": arch.n_layer, "feed_forward_length": arch.dim_ffn,
        "attention.head_count": 0, "wkv.head_size": arch.head_size, "vocab_size": arch.vocab_size, **ranks(arch),
    }.items():
        writer.add_uint32(f"{name}.{key}", value)
    writer.add_float32(f"{name}.attention.layer_norm_epsilon", 1e-5)
    writer.add_tokenizer_model("none")

    def add(key: str, tensor: torch.Tensor, kind=gguf.GGMLQuantizationType.F32) -> None:
        array = np.ascontiguousarray(tensor.numpy())
        if kind == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(key, array)
        else:
            writer.add_tensor(key, gguf.quants.quantize(array, kind), raw_dtype=kind)

    add("token_embd.weight", tensors["emb.weight"], large)
    add("output.weight", tensors["head.weight"], large)
    norms = {"token_embd_norm": "blocks.0.ln0", "output_norm": "ln_out"}
    for i in range(arch.n_layer):
        block, att, ffn = f"blk.{i}.", f"blocks.{i}.att.", f"blocks.{i}.ffn."
        norms |= {block + "attn_norm": f"blocks.{i}.ln1", block + "attn_norm_2": f"blocks.{i}.ln2", block + "time_mix_ln": att + "ln_x"}
        linears = ["receptance", "key", "value", "output"] + ["gate"] * (arch.version == 6)
        for key in linears:
            add(f"{block}time_mix_{key}.weight", tensors[f"{att}{key}.weight"], large)
        for key in ["key", "value"] + ["receptance"] * (arch.version == 6):
            add(f"{block}channel_mix_{key}.weight", tensors[f"{ffn}{key}.weight"], large)
        vectors, maps = (layer7 if arch.version == 7 else layer6)(tensors, att, ffn)
        for key, tensor in vectors.items():
            add(f"{block}{key}.weight", tensor)
        for key, tensor in maps.items():
            add(f"{block}{key}.weight", tensor, low_rank)
    for key, norm in norms.items():
        for part in ("weight", "bias"):
            add(f"{key}.{part}", tensors[f"{norm}.{part}"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def ranks(arch) -> dict[str, int]:
    if arch.version == 6:
        return {"time_mix_extra_dim": arch.ranks["maa"], "time_decay_extra_dim": arch.ranks["decay"], "rescale_every_n_layers": 0}
    names = {"decay": "w", "iclr": "a", "value_residual_mix": "v", "gate": "g"}
    return {f"attention.{key}_lora_rank": arch.ranks[name] for key, name in names.items()}


def layer7(tensors, att: str, ffn: str):
    vectors = {"time_mix_lerp_fused": torch.stack([tensors[f"{att}x_{name}"].reshape(1, 1, -1) for name in "rwkvag"]),
               "channel_mix_lerp_k": tensors[f"{ffn}x_k"].flatten()}
    # block 0 must have a value residual, which nothing reads, of a's shape
    source = {name: "a" if name == "v" and ".0." in att else name for name in "wavg"}
    vectors |= {f"time_mix_{name}0": tensors[f"{att}{source[name]}0"].flatten() for name in "wav"}
    vectors |= {f"time_mix_{name}": tensors[f"{att}{name}"].flatten() for name in ("k_k", "k_a", "r_k")}
    return vectors, {f"time_mix_{name}{i}": tensors[f"{att}{source[name]}{i}"].t() for name in "wavg" for i in (1, 2)}


def layer6(tensors, att: str, ffn: str):
    vectors = {"time_mix_lerp_x": tensors[f"{att}time_maa_x"].flatten(), "time_mix_decay": tensors[f"{att}time_decay"].flatten(),
               "time_mix_lerp_fused": torch.stack([tensors[f"{att}time_maa_{name}"].reshape(1, 1, -1) for name in "wkvrg"]),
               "time_mix_first": tensors[f"{att}time_faaaa"]}
    vectors |= {f"channel_mix_lerp_{name}": tensors[f"{ffn}time_maa_{name}"].flatten() for name in "kr"}
    maps = {"time_mix_w1": tensors[f"{att}time_maa_w1"].t(), "time_mix_w2": tensors[f"{att}time_maa_w2"].permute(0, 2, 1)}
    return vectors, maps | {f"time_mix_decay_w{i}": tensors[f"{att}time_decay_w{i}"].t() for i in (1, 2)}
