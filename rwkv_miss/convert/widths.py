"""Widths of linears from the shapes of their tensors, for files without metadata."""

from __future__ import annotations

from torch import Tensor

from ..errors import UserError
from .base import RWKV_LINEARS
from .formats import origins


def sides(name: str) -> tuple[str, str]:
    """Name a linear's (outputs, inputs). RWKV's linears share these names; an unknown linear has its own."""
    known = (pair for end, pair in RWKV_LINEARS.items() if f".{name}".endswith(f".{end}"))
    return next(known, (f"{name} outputs", f"{name} inputs"))


def blocks_of(origin: str, shape: tuple[int, ...]) -> tuple[int, int | None, int | None]:
    """Return (rank, outputs, inputs) of a linear whose tensor has this shape in a file of this origin.

    A width is None if the shape does not tell it.
    """
    if len(shape) == 3:
        width = shape[0] * shape[1]
        return shape[1], *((None, width) if origin == "rwkv-peft" else (width, None))
    rank, outputs = shape if origin == "rwkv-peft" else shape[::-1]
    return rank, outputs, None


def fits(origin: str, shapes: dict[str, tuple[int, ...]]) -> bool:
    """Tell whether tensors of these shapes can belong to one model, if the file has this origin."""
    widths: dict[str, int] = {}
    ranks: dict[str, int] = {}
    for name, shape in shapes.items():
        ranks[name], *pair = blocks_of(origin, shape)
        for side, width in zip(sides(name), pair):
            if width is not None and widths.setdefault(side, width) != width:
                return False
    whole_blocks = origin == "bone-v0" or any(len(shape) == 3 for shape in shapes.values())
    for name, rank in ranks.items():
        outputs, inputs = (widths.get(side) for side in sides(name))
        if (
            inputs is not None
            and rank > inputs
            or whole_blocks
            and any(width is not None and width % rank for width in (outputs, inputs))
        ):
            return False
    return True


def origin_of_blocks(tensors: dict[str, Tensor], hint: str) -> str:
    """Find the origin of these linears' blocks: "rwkv-peft" or "bone-v0".

    Raises UserError if both are possible and the hint does not say which, or if neither is.
    """
    names = "rwkv-peft", "openmose", "bone-v0"
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    possible = [origin for origin in ("rwkv-peft", "bone-v0") if fits(origin, shapes)]
    first = next(iter(shapes))
    if hint == "peft":
        raise UserError(
            f"--origin peft: HF peft has no tensor of such a name as {first}'s; choose from:"
            f" {origins(*names)}"
        )
    expected = "rwkv-peft" if hint == "openmose" else hint
    if not possible or expected and expected not in possible:
        reason = f"--origin {hint}, but" if hint and possible else "contradiction:"
        raise UserError(
            f"{reason} the tensors are no blocks of one model's linears that way: "
            + ", ".join(f"{name} {list(shape)}" for name, shape in list(shapes.items())[:8])
        )
    if not expected and len(possible) > 1:
        raise UserError(
            f"{first} and the others are {list(shapes[first])}, which could be of two origins, with other"
            " results; say which: " + origins(*names)
        )
    return expected or possible[0]
