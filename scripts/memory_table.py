"""The README's memory table, from the sizes alone: python -m scripts.memory_table"""

from __future__ import annotations

import torch

import rwkv_miss
from rwkv_miss import Arch
from src import rwkv7
from src.model import RWKV

MODELS = {"0.1B": (12, 768), "0.4B": (24, 1024), "1.5B": (24, 2048), "2.9B": (32, 2560), "7.2B": (32, 4096), "13.3B": (61, 4096)}
GIB = 2**30


def main() -> None:
    """One row a model: bf16 base, and 16 bytes for every parameter of the adapter: fp32 value, gradient, two Adam moments."""
    for name, (n_layer, n_embd) in MODELS.items():
        dim_ffn, ranks = rwkv7.default_sizes(n_embd)
        arch = Arch(7, 65536, n_embd, n_layer, n_embd // 64, 64, n_embd, dim_ffn, ranks, True)
        with torch.device("meta"):
            model = RWKV(arch)
        base = 2 * sum(p.numel() for p in model.parameters()) / GIB
        trainable = rwkv_miss.inject(model, "miss", rank=64).trainable
        adapter = 16 * trainable / GIB
        print(f"| RWKV-7 {name} | {n_layer} x {n_embd} | {base:.1f} GiB | {trainable:,} | {adapter:.2f} GiB | {base + adapter:.1f} GiB |")


if __name__ == "__main__":
    main()
