"""Names of tensors and files in Hugging Face folders of RWKV-7, official and flash-linear-attention's."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from .tensor_map import LARGE, LOW_RANK, VECTOR, TensorMap

WEIGHTS, CONFIG = "model.safetensors", "config.json"
INDEX = "model.safetensors.index.json"  # maps each tensor to one of several files
VALUE_RESIDUAL_FILE = "block_0_value_residual.safetensors"  # read only when a folder becomes a .pth again
# the tokenizer and its chat template; older folders have the template in TOKENIZER_CONFIG
TOKENIZER, TOKENIZER_CONFIG, CHAT_TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
VOCABULARY = "rwkv_vocab_v20230424.txt"  # in World's format; rwkv7-hf uses this name for every vocabulary
OFFICIAL = "rwkv7."  # prefix in the official layout of every name but head.weight
PREFIX = "model.layers"  # prefix of a block's tensors in flash-linear-attention's layout
FLA_SIGN = "model.embeddings.weight"  # a tensor that only flash-linear-attention's layout has
# layout -> how to load such a folder: the last line that a command prints
LOADERS = {
    "official": (
        "loaded by: a transformers release with Rwkv7ForCausalLM; 5.25 lacks it. --layout fla is for rwkv7-hf"
    ),
    "fla": "loaded by: rwkv7-hf (pip install rwkv7-hf) or flash-linear-attention",
}
PROJECTIONS = {"receptance": "r_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}


def _norm(stored: str, name: str) -> list[TensorMap]:
    return [TensorMap(f"{stored}.{part}", (f"{name}.{part}",), "same", VECTOR) for part in ("weight", "bias")]


def _low_rank(name: str) -> list[TensorMap]:
    """Map a low-rank map: two matrices and, except for g, a bias."""
    stored = f"attn.{name}_lora.lora"
    matrices = [
        TensorMap(f"{stored}.0.weight", (f"att.{name}1",), "transposed", LOW_RANK),
        TensorMap(f"{stored}.2.weight", (f"att.{name}2",), "transposed", LOW_RANK),
    ]
    if name == "g":
        return matrices
    return [TensorMap(f"{stored}.2.bias", (f"att.{name}0",), "flat", VECTOR), *matrices]


OUTSIDE = [
    TensorMap("model.embeddings.weight", ("emb.weight",), "same", LARGE),
    *_norm(f"{PREFIX}.0.pre_norm", "blocks.0.ln0"),
    *_norm("model.norm", "ln_out"),
    TensorMap("lm_head.weight", ("head.weight",), "same", LARGE),
]
LAYER_TENSORS = [
    *_norm("attn_norm", "ln1"),
    *_norm("ffn_norm", "ln2"),
    *_norm("attn.g_norm", "att.ln_x"),
    *(
        TensorMap(f"attn.{to}.weight", (f"att.{name}.weight",), "same", LARGE)
        for name, to in PROJECTIONS.items()
    ),
    *(TensorMap(f"ffn.{name}.weight", (f"ffn.{name}.weight",), "same", LARGE) for name in ("key", "value")),
    *(TensorMap(f"attn.x_{name}", (f"att.x_{name}",), "wide", VECTOR) for name in "rwkvag"),
    *(TensorMap(f"attn.{name}", (f"att.{name}",), "flat", VECTOR) for name in ("k_k", "k_a")),
    TensorMap("attn.r_k", ("att.r_k",), "same", VECTOR),
    TensorMap("ffn.x_k", ("ffn.x_k",), "flat", VECTOR),
    *_low_rank("w"),
    *_low_rank("a"),
    *_low_rank("g"),
    *_low_rank("v"),
]


def table(n_layer: int) -> list[TensorMap]:
    """Build flash-linear-attention's whole table; block 0 has no value residual there: nothing reads it."""
    layers = [mapped.at(i, PREFIX) for i in range(n_layer) for mapped in LAYER_TENSORS]
    return OUTSIDE + [mapped for mapped in layers if not mapped.stored.startswith(f"{PREFIX}.0.attn.v_lora.")]


def official_name(name: str) -> str:
    """Name a checkpoint's tensor as in the official layout."""
    return name if name == "head.weight" else OFFICIAL + name


def plain_name(name: str) -> str:
    """Invert official_name()."""
    return name.removeprefix(OFFICIAL)


# names of a block's tensors in RWKV's usual order
BLOCK = """
    ln0.weight ln0.bias ln1.weight ln1.bias ln2.weight ln2.bias
    att.x_r att.x_w att.x_k att.x_v att.x_a att.x_g att.k_k att.k_a att.w0 att.a0 att.r_k
    att.w1 att.w2 att.a1 att.a2 att.g1 att.g2 att.v0 att.v1 att.v2
    att.receptance.weight att.key.weight att.value.weight att.output.weight att.ln_x.weight att.ln_x.bias
    ffn.x_k ffn.key.weight ffn.value.weight
""".split()


def in_usual_order(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sort the tensors in RWKV's order, which safetensors do not keep. Unknown names end their block."""
    places = {name: place for place, name in enumerate(BLOCK)}

    def place(name: str) -> tuple[int, int, int]:
        if match := re.fullmatch(r"blocks\.(\d{1,9})\.(.+)", name):
            return 1, int(match[1]), places.get(match[2], len(places))
        roots = ("emb.", "blocks.", "ln_out.weight", "ln_out.bias", "head.")
        return next((i for i, root in enumerate(roots) if name.startswith(root)), len(roots)), 0, 0

    return {name: tensors[name] for name in sorted(tensors, key=place)}
