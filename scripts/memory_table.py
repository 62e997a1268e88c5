"""The README's memory table, as `scripts.plan` counts: python -m scripts.memory_table"""

from __future__ import annotations

from src.doorway import importing

with importing():
    from rwkv_miss.errors import one_line_errors
    from src.allocation import model_on_meta
    from src.config import Config
    from src.memory import GIB, memory_parts
    from src.model import default_arch

MODELS = {"0.1B": (12, 768), "0.4B": (24, 1024), "1.5B": (24, 2048), "2.9B": (32, 2560), "7.2B": (32, 4096), "13.3B": (61, 4096)}
ROW = 1024  # tokens, all of them trained


def main() -> None:
    with one_line_errors():
        for name, (n_layer, n_embd) in MODELS.items():
            print(row(name, n_layer, n_embd))


def row(name: str, n_layer: int, n_embd: int) -> str:
    """A model's row: MiSS r=64 beside a bf16 base on one GPU, one row of 1024 tokens at a time, recomputed layers or kept ones."""
    arch = default_arch(7, n_layer, n_embd)
    trainable = model_on_meta(arch, Config()).injection.trainable
    recomputed, kept = (
        memory_parts(arch, Config(micro_bsz=1, grad_cp=grad_cp), "gpu", "cuda", "bf16", ROW, ROW) for grad_cp in (1, 0)
    )
    adapter = sum(recomputed[part] for part in ("trained", "gradients", "Adam"))
    columns = [recomputed["base"], adapter, sum(recomputed.values()), sum(kept.values())]
    return f"| RWKV-7 {name} | {n_layer} x {n_embd} | {trainable:,} | " + " | ".join(f"{size / GIB:.1f} GiB" for size in columns) + " |"


if __name__ == "__main__":
    main()
