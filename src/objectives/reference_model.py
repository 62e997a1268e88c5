"""The model of --reference."""

from __future__ import annotations

from rwkv_miss.files.checkpoint import Arch
from rwkv_miss.files.identity import Identity

from ..common.device import PRECISIONS
from ..config import Config
from ..config.launcher import is_first_process
from ..model import RWKV, read_model_file
from ..model.settings import dtype_of, dtype_of_base


def reference_of(reference: str) -> Identity | None:
    """Identify the model of --reference; None if the base itself is the reference."""
    return Identity(reference, shown=is_first_process()) if reference else None


def build_reference(config: Config) -> RWKV:
    """Load the model of --reference, which computes as the base without its adapter does."""
    dtype = PRECISIONS[config.precision]
    of_base = dtype_of_base(config.peft, config.quant, dtype)
    model = RWKV.load(config.reference, of_base, kernel=config.wkv)
    model.computes_in = dtype_of(config.peft, config.precision)
    if config.quant != "none":
        model.quantise(config.quant, dtype)
    return model.requires_grad_(False).eval()


def reference_arch(reference: str) -> Arch:
    """Return the sizes of the model of --reference."""
    return Arch.detect(read_model_file(reference))
