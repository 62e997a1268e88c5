"""Linears that an adapter is for: chosen by name, and refused where it would not work."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

from .errors import UserError
from .quantised import dense, is_of_others, shape_of, undo_first_forward
from .sharding import local
from .targets import DEFAULT_TARGETS, READ, Layers, Target, choose

# attributes in which torch keeps a module's hooks
HOOKS = """
    _forward_hooks _forward_pre_hooks _backward_hooks _backward_pre_hooks _state_dict_hooks
    _state_dict_pre_hooks _load_state_dict_pre_hooks _load_state_dict_post_hooks
""".split()


def find_targets(
    model: nn.Module,
    targets: str | list[str] | None,
    exclude: str | list[str] | None = None,
    layers: Layers | None = None,
) -> dict[str, Target]:
    """Map name -> target for the arguments of inject().

    Raises UserError, with the names that exist, for targets None with a model that is no RWKV, for names that
    match nothing, and for a linear whose change would have no effect, or a different effect once merged.
    """
    if targets is None:
        # key and value alone would match some linears of many models and silently miss the others
        names = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)}
        if not any(name.endswith("receptance") for name in names):
            raise UserError(
                f"without targets RWKV's linears are adapted ({', '.join(DEFAULT_TARGETS)}), and this is no"
                f" RWKV model; name some of its linear layers: {', '.join(sorted(names)) or 'it has none'}"
            )
        targets = [name for name in DEFAULT_TARGETS if name in names]
    chosen = choose(model, targets, exclude, layers)
    refuse_unfit(model, chosen)
    return chosen


def refuse_unfit(model: nn.Module, targets: dict[str, Target]) -> None:
    """Raise UserError for a target whose change would have no effect, or a different effect once merged."""
    modules = dict(model.named_modules(remove_duplicate=False))
    places: dict[int, list[str]] = {}
    for name, module in modules.items():
        places.setdefault(id(module), []).append(name)
    for module in modules.values():  # also linears without an adapter: a state_dict() would spoil them
        if isinstance(module, nn.Linear):
            undo_first_forward(module)
    memory = SharedMemory(model)
    for name, target in sorted(targets.items()):
        module, key = target.owner, target.view.key
        if len(places[id(module)]) > 1:
            first, second = places[id(module)][:2]
            raise UserError(
                f"{first} and {second} are one layer under two names; give each a layer of its own "
                "(copy.deepcopy), or drop the target"
            )
        held = _held_by_others(getattr(module, key.rpartition(".")[2]))
        if held:
            raise UserError(f"{key} is {held}")
        what = "" if target.form == READ else _more_than_plain(module)
        if what:
            raise UserError(
                f"{name} is no plain nn.{target.form.title()}: {what}, which an adapter in its place would"
                " drop; put a plain one there, or drop the target"
            )
        weight = target.weight
        if target.form == READ and not weight.is_floating_point():
            raise UserError(f"{key} is {weight.dtype}, no floating-point matrix; drop the target")
        others = memory.overlapping(key, weight)
        if others:
            raise UserError(
                f"{target.path} has the same weight as {others[0]}, which a merge would change as well; untie"
                " them or drop the target"
            )
        parent = modules.get(name.rpartition(".")[0])
        if isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
            raise UserError(
                f"{name} belongs to torch's TransformerEncoderLayer, which in eval reads its weight and does"
                " not call it: the adapter would do nothing there. Call"
                " torch.backends.mha.set_fastpath_enabled(False) first, here and wherever the adapter is"
                " used"
            )


def _held_by_others(weight: Tensor) -> str:
    """Describe a weight of another package that can't be expanded to plain numbers; "" for other weights."""
    kind = type(weight)
    if not is_of_others(weight):
        return ""
    package = kind.__module__.partition(".")[0]
    if package == "bitsandbytes" and weight.is_floating_point():
        why = "is not quantised yet: move the model to its device first"
    else:
        why = "can't be expanded to a matrix here"
        with contextlib.suppress(RuntimeError, NotImplementedError, AttributeError, AssertionError):
            if dense(weight, 0, torch.float32).shape == shape_of(weight):
                return ""
    return (
        f"quantised by {package} ({kind.__name__}), and {why}. Else load the model without that, inject(),"
        " and quantise the adapted linears with rwkv_miss.quantised.quantise_"
    )


def _more_than_plain(module: nn.Module) -> str:
    """Describe what a linear or an embedding does or has beyond its product and bias; "" if that is all."""
    children, own = [name for name, _ in module.named_children()], {"weight", "bias"}
    tensors = [name for name in (*module._parameters, *module._buffers) if name not in own]
    kind, quantised = type(module), is_of_others(module.weight)
    # bitsandbytes' linears have a forward of their own, and a hook for state_dicts
    hooks = any(getattr(module, name, None) for name in HOOKS if not (quantised and "load" in name))
    plain = quantised or getattr(kind, "is_linear", False) or kind.__name__ == "Conv1D"
    own_forward = kind.forward not in (nn.Linear.forward, nn.Embedding.forward) and not plain
    found = {
        f"it has modules of its own ({', '.join(children)}), as a parametrization has": children,
        f"it has tensors of its own ({', '.join(tensors)}), as weight_norm has": tensors,
        "hooks are registered on it": hooks,
        f"{kind.__name__} has a forward of its own": own_forward or "forward" in vars(module),
        "it has a max_norm, which changes its weight": getattr(module, "max_norm", None) is not None,
    }
    return next((what for what, holds in found.items() if holds), "")


class SharedMemory:
    """Parameters and buffers of a model by their memory, under all names: tied tensors and views share it."""

    def __init__(self, model: nn.Module) -> None:
        self.tensors: dict[int, list[tuple[str, Tensor]]] = {}
        for name, tensor in (
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        ):
            self.tensors.setdefault(self._storage(local(tensor)), []).append((name, local(tensor)))

    @staticmethod
    def _storage(tensor: Tensor) -> int:
        # a key that all views share, also on the meta device, where tensors have no address
        return tensor.untyped_storage()._cdata

    @staticmethod
    def _range(tensor: Tensor) -> tuple[int, int]:
        """Return the places of a tensor's first byte in its storage, and of the byte after its last."""
        first = tensor.storage_offset() * tensor.itemsize
        if not tensor.numel():
            return first, first
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
        return first, first + (last + 1) * tensor.itemsize

    def overlapping(self, name: str, tensor: Tensor) -> list[str]:
        """Return the other names of tensors whose memory overlaps this one's."""
        tensor, found = local(tensor), []
        first, end = self._range(tensor)
        for other, t in self.tensors[self._storage(tensor)]:
            others_first, others_end = self._range(t)
            if other != name and others_first < end and first < others_end:
                found.append(other)
        return found
