"""Fit of an adapter's file to a model: is it the one of its training, and do all tensors have room there."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import AdapterLinear, NoOptions
from .adapter_file import layer_tensors
from .errors import UserError
from .files.checkpoint import Arch
from .targets import View

Path = str | os.PathLike[str]


def refuse_other_base(
    path: Path,
    metadata: Mapping[str, Any],
    base: Path | None,
    arch: Arch | None,
    fingerprint: Callable[[], str | None],
    advice: str = "give that one as the base",
    force: bool = False,
) -> None:
    """Raise UserError, with the sizes that differ, for another model than the one of the file's metadata.

    base: the model's name. arch: its sizes; None for a model that is no RWKV. fingerprint: computes its
    digest, or None if it has none. `force` allows any model of the same widths.
    """
    differs, misfit = "", False
    if metadata.get("arch") and arch:
        trained = Arch.from_dict(metadata["arch"])
        if trained.describe() != arch.describe():
            differs = f"; that one is {trained.describe()}, this one {arch.describe()}"
        elif trained.layer0_value_residual != arch.layer0_value_residual:
            differs = (
                "; one of the two has no value residual in block 0, which nothing reads and which"
                " flash-linear-attention's folders lack: if all else is the same, --force is right"
            )
        # MiSS's tensors do not contain their linears' input width, so shapes alone would not show a misfit
        misfit = any(
            getattr(trained, width) != getattr(arch, width) for width in ("n_embd", "dim_att", "dim_ffn")
        )
    recorded = metadata.get("base_fingerprint")
    if misfit or not force and recorded and fingerprint() not in (None, recorded):
        raise UserError(
            f"{path} was trained on another base ({metadata.get('base')}), not on {base}{differs};"
            f" {advice.removesuffix(', or --force') if misfit else advice}"
        )


def refuse_other_weights(
    path: Path,
    metadata: Mapping[str, Any],
    base: Path | None,
    fingerprint: Callable[[], str | None],
    advice: str = "give that one as the base",
) -> None:
    """Raise UserError if an adapter of a model that is no RWKV was trained on other weights.

    fingerprint: computes weights_fingerprint() of the base's matrices that the adapter changes. If the
    adapter or the base has none, nothing is refused.
    """
    recorded = metadata.get("weights_fingerprint")
    if recorded and fingerprint() not in (None, recorded):
        raise UserError(
            f"{path} was trained on another base ({metadata.get('base')}), not on {base}: the weights that it"
            f" changes are others; {advice}"
        )


def check_matrices(
    path: Path, views: Iterable[tuple[str, View]], tensors: Mapping[str, Tensor], base: Path = "the base"
) -> None:
    """Raise UserError unless the base has each linear's floating-point matrix. views: (linear, its view)."""
    for name, view in views:
        if view.key not in tensors:
            raise UserError(
                f"{path} changes {name}, which {base} does not have; give the model that it was trained on"
            )
        weight = tensors[view.key]
        if not view.fits(weight) or not weight.is_floating_point():
            expected = "matrix" if view.index is None else f"stack of more than {view.index} matrices"
            raise UserError(
                f"{view.key} of {base} is {tuple(weight.shape)}, {weight.dtype}; a floating-point {expected}"
                f" is expected for {path}"
            )


def check_layer(
    path: Path,
    name: str,
    shape: tuple[int, int],
    method: type[AdapterLinear],
    options: NoOptions,
    owned: dict[str, dict[str, Tensor]],
) -> tuple[dict[str, Tensor], AdapterLinear]:
    """Return (an adapted linear's tensors in the file, the layer without values); shape (out, in).

    owned: by_owner() of the file's tensors. Raises UserError unless the tensors fit the linear.
    """
    try:
        tensors = layer_tensors(method, name, shape, owned)
        with torch.device("meta"):
            shared = {key: torch.empty(tensors[key].shape) for key in method.shared}
            layer = method.wrap(nn.Parameter(torch.empty(shape)), None, options, shared)
        layer.check(tensors)
    except UserError as error:
        raise UserError(f"{path} does not fit {name}, {tuple(shape)}: {error}") from None
    return tensors, layer


def check_whole(
    path: Path,
    whole: Mapping[str, Tensor],
    there: Mapping[str, Tensor],
    may_be_new: Callable[[str], bool] = lambda name: False,
) -> None:
    """Raise UserError for a whole tensor of the file that can't replace one of the model's, `there`."""
    for name, tensor in whole.items():
        if not tensor.is_floating_point():
            raise UserError(f"{path}: {name} is {tensor.dtype}; a floating-point tensor is expected")
        if name not in there:
            if may_be_new(name):
                continue
            raise UserError(
                f"{path} holds {name}, which this model does not have; give the model that it was trained on"
            )
        if not there[name].is_floating_point():
            raise UserError(
                f"{path} holds {name}, which is quantised in this model; load the adapter first and quantise"
                " after that"
            )
        if there[name].squeeze().shape != tensor.squeeze().shape:
            raise UserError(
                f"{path} does not fit {name}, {tuple(there[name].shape)}: it has {tuple(tensor.shape)}"
            )
