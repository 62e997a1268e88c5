"""A short measurement of how fast this machine would train a model: two of its layers and its head, with random weights."""

from __future__ import annotations

import dataclasses
import time

import torch
from torch import Tensor, nn

from rwkv_miss.adapter import adapted_linears
from rwkv_miss.checkpoint import Arch

from .allocation import model_on_meta
from .config import Config
from .device import DTYPES
from .model import replace_tensors
from .shared import Head

LAYERS = 2  # the fewest in which RWKV-7's value residual takes part
TOKENS = {False: 256, True: 64}  # of one row; fewer in a model of at least 2048 channels, which is slow
WIDE = 2048


def measured_speed(arch: Arch, config: Config, kernel: str, precision: str, device: str, row: int, trained: float) -> float:
    """Tokens a second of one process: forward and backward of a row of up to `row` tokens, of which the share `trained` are targets."""
    tokens = min(row, TOKENS[arch.n_embd >= WIDE])
    small = dataclasses.replace(arch, n_layer=min(LAYERS, arch.n_layer), vocab_size=16)
    model = model_on_meta(small, config)
    dtype = torch.float32 if config.peft == "none" else DTYPES[precision]

    def random(name: str, tensor: Tensor) -> Tensor:
        of_base = isinstance(tensor, nn.Parameter) and not tensor.requires_grad
        new = torch.empty(tensor.shape, dtype=dtype if of_base else tensor.dtype, device=device)
        return new.normal_(std=0.02) if new.is_floating_point() else new.zero_()

    replace_tensors(model, random)
    with torch.no_grad():
        for layer in adapted_linears(model).values():
            layer.prepare()  # norms that are no norms would make NaN
    if config.quant != "none":
        model.quantise(config.quant, dtype)
    model.grad_cp = config.grad_cp
    model.set_kernel(kernel)
    ids = torch.zeros(1, tokens, dtype=torch.int64, device=device)
    head = Head(arch.n_embd, arch.vocab_size, kernel).to(device, dtype).requires_grad_(config.peft == "none")
    x = torch.empty(tokens, arch.n_embd, dtype=dtype, device=device).normal_().requires_grad_()

    def layers() -> None:
        with torch.autocast(device, DTYPES[precision], enabled=config.peft == "none" and precision != "fp32"):
            features, _ = model.features(ids)
        features.float().square().sum().backward()

    def logits() -> None:
        with torch.autocast(device, DTYPES[precision], enabled=config.peft == "none" and precision != "fp32"):
            loss = head(x, ids[0])
        loss.backward()

    seconds = _fastest(layers, device) * arch.n_layer / small.n_layer + trained * _fastest(logits, device)
    return tokens / seconds


def _fastest(work, device: str) -> float:
    """Seconds of the faster of two calls, after one that warms up."""
    seconds = []
    for _ in range(3):
        begun = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    return min(seconds[1:])
