"""Outputs of a run: the trained tensors."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform

import torch
from torch import nn

import rwkv_miss
from rwkv_miss.adapter_file import adapter_tensors
from rwkv_miss.errors import UserError
from rwkv_miss.files.checkpoint import Arch, write_checkpoint
from rwkv_miss.files.model_files import read_tensors

from ..config import Config, Settled
from ..data.encode import Encoder
from ..model import RWKV
from .run_folder import NEW_MODEL


def write_new_model(config: Config, arch: Arch, tokenizer) -> None:
    """Write the initialisation as a file, for --init_only."""
    path = os.path.join(config.proj_dir, NEW_MODEL)
    if os.path.exists(path):
        raise UserError(f"{path} is there already; give it as --load_model, or choose another --proj_dir")
    torch.manual_seed(config.random_seed)
    described = {"format": "rwkv-miss trained", "step": 0, "eod": config.eod}
    if tokenizer:
        described["tokenizer"] = tokenizer.name
    write_checkpoint(path, whole_model("", RWKV(arch)), described)
    print(f"wrote {path}: {arch.describe()}, not trained yet; go on with --load_model {path} --peft none")


def writer(config: Settled, model: RWKV, encoder: Encoder):
    """Return a function that writes the trained tensors or, in full training, the whole model.

    It is called on every rank. Its keywords become metadata.
    """
    from .trainer import whole_parameters  # lightning, which merge and chat need not import

    versions = {name: importlib.metadata.version(name) for name in ("torch", "lightning", "numpy")} | {
        "python": platform.python_version()
    }
    # facts about the base of the training; the merge needs none
    made_with = {
        "tokenizer": encoder.tokenizer.name,
        "eod": config.eod,
        "template": encoder.template.record,
        "bos": list(encoder.bos),
        "versions": versions,
        "quant": None if config.quant == "none" else config.quant,
    }

    def write(trainer, path: str, **described) -> None:
        described |= {"step": trainer.global_step, **made_with}
        if config.peft != "none":
            saved = [p for p in adapter_tensors(model).values() if isinstance(p, nn.Parameter)]
            with whole_parameters(trainer, saved):
                if trainer.is_global_zero:
                    rwkv_miss.save_adapter(model, path, **described)
            return
        items = whole_model(config.load_model, model, lambda p: whole_parameters(trainer, [p]))
        try:
            if trainer.is_global_zero:
                write_checkpoint(path, items, {"format": "rwkv-miss trained", **described})
        finally:
            for _ in items:
                pass  # every rank takes part in what is gathered, also when rank 0 can't write

    return write


def whole_model(load_model: str, model: RWKV, gather=contextlib.nullcontext):
    """Yield (name, tensor) of a fully trained model, one in memory at a time.

    Order, shapes and dtypes are those of the base, --load_model; a new model is bf16. Inside
    `gather(parameter)` the parameter is whole, so all ranks must walk through.
    """
    trained = dict(model.named_parameters())
    like = read_tensors(load_model) if load_model else dict.fromkeys(trained)
    for name, base in like.items():
        with gather(trained[name]):
            p = trained[name].detach()
            yield name, p.to(torch.bfloat16) if base is None else p.to("cpu", base.dtype).view_as(base)
