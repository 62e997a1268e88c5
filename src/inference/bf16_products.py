"""Products of bf16 weights by the CPU's bf16 instructions, where they are: cuda/bf16_products.h."""

from __future__ import annotations

from ..ops import native


def instruction_is_there() -> bool:
    """Tell whether this CPU multiplies pairs of bf16. Others compute the same numbers, slowly."""
    return bool(native.library("cpu").bf16_fast())
