"""Throughput of training on this machine: two layers and the head, timed briefly on random weights."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from rwkv_miss.adapter import adapted_linears
from rwkv_miss.files.checkpoint import Arch

from ..common.device import PRECISIONS
from ..config import Config
from ..config.adapter_options import AdapterOptions
from ..model import RWKV
from ..model.layers import Head
from ..model.rwkv import replace_tensors
from ..sources import source_of
from ..sources.estimates import Speed
from ..sources.held_out_answers import MOST_ASKED
from .plan import Plan
from .step_memory import model_on_meta

LAYERS = 2  # the fewest in which RWKV-7's value residual takes part
WIDE = 2048  # channels from which a model is so slow that a shorter row is timed
TOKENS = {False: 256, True: 64}  # tokens of one row, in a narrow model and in a wide one
SECONDS = 1.0  # after this time nothing is timed again
ENOUGH = 0.1  # seconds; shorter work is timed with more rows, up to those of a micro-batch
NOISE = 99_991  # random numbers for the weights; a prime, so that no two rows of a matrix are alike


def speed_here(plan: Plan) -> Speed:
    """Measure the speed of a whole run on this machine."""
    arch, config, schedule = plan.arch, plan.settings, plan.schedule
    device = "cuda" if config.accelerator == "gpu" else "cpu"
    trained = sum(schedule.targets) / sum(schedule.lengths)
    one = measured_speed(arch, config, config.wkv, config.precision, device, max(schedule.lengths), trained)
    # processes of a CPU share its cores
    devices = config.world if device == "cuda" else config.num_nodes
    return dataclasses.replace(one, tokens=one.tokens * devices, drawn=one.drawn * devices)


def measured_speed(
    arch: Arch, config: Config, kernel: str, precision: str, device: str, row: int, trained: float
) -> Speed:
    """Time one process with rows of at most `row` tokens, forward and backward.

    Rows of a narrow model are timed together, because one would not occupy the device. The share `trained` of
    its tokens are targets. Answers are timed with one token after MOST_ASKED prompts, and drawing, if a run
    draws, with one token of each row.
    """
    tokens = min(row, TOKENS[arch.n_embd >= WIDE])
    full = config.peft == "none"
    half = PRECISIONS[precision]
    dtype = torch.float32 if full else half
    random = _random_tensors(dtype, device)
    small = dataclasses.replace(arch, n_layer=min(LAYERS, arch.n_layer), vocab_size=16)
    # the layers below all adapters have a forward alone, which is timed by itself
    below = config.adapted_layers(arch.n_layer)[0] / small.n_layer
    token = "0" if config.train_tokens else ""  # one of the small vocabulary
    model = _random_model(small, dataclasses.replace(config, layers="", train_tokens=token).adapter, random)
    if config.quant != "none":
        model.quantise(config.quant, dtype)
    model.grad_cp = config.grad_cp
    model.set_kernel(kernel)
    if full:
        model.computes_in = half
    head = _random_head(arch, kernel, dtype, full, random)
    ids = torch.zeros(1, tokens, dtype=torch.int64, device=device)

    def layers() -> None:
        features, _ = model.features(ids)
        features.float().square().sum().backward()

    @torch.no_grad()
    def forward() -> None:
        model.features(ids)

    def logits() -> None:
        head(x, ids.flatten()).backward()

    @torch.no_grad()
    def next_tokens(rows: int) -> float:
        """Time one more token of each of `rows` rows."""
        inputs, outputs = ids[:1, :1].expand(rows, 1), x[:1].expand(rows, -1)

        def next_token() -> None:
            model.features(inputs)

        def next_logits() -> None:
            head(outputs)

        return _fastest(next_token, device) * depth + _fastest(next_logits, device)

    depth = arch.n_layer / small.n_layer
    model.features(ids[:, :2])[0].sum().backward()  # torch imports on the first call, above all for --grad_cp
    while (seconds := _fastest(layers, device)) < ENOUGH and 2 * len(ids) <= config.micro_bsz:
        ids = ids.repeat(2, 1)
    x = torch.empty(ids.numel(), arch.n_embd, dtype=half, device=device).normal_().requires_grad_()
    seconds *= depth - below
    if below:
        seconds += below * _fastest(forward, device)
    seconds += trained * _fastest(logits, device)
    reason = "two layers and the head were timed here just now; saving and the optimizer are not in it"
    accelerator = "gpu" if device == "cuda" else "cpu"
    if rows := source_of(config).cost.sampled_at_once(arch, precision, accelerator):
        return Speed(ids.numel() / seconds, source=reason, drawn=rows / next_tokens(rows))
    answer = next_tokens(MOST_ASKED) if config.eval_samples else 0.0
    return Speed(ids.numel() / seconds, answer, reason)


def _random_tensors(dtype: torch.dtype, device: str) -> Callable[[str, Tensor], Tensor]:
    """Return a function of a name and a tensor without memory that makes one with numbers.

    Tensors of the base get this dtype.
    """
    noise = torch.empty(NOISE, device=device).normal_(std=0.02)

    def random(name: str, tensor: Tensor) -> Tensor:
        of_base = isinstance(tensor, nn.Parameter) and not tensor.requires_grad
        new = torch.zeros(tensor.shape, dtype=dtype if of_base else tensor.dtype, device=device)
        if new.is_floating_point():
            # repeat the same numbers: drawing new ones takes seconds for a large model
            for part in new.view(-1).split(NOISE):
                part.copy_(noise[: len(part)])
        return new

    return random


def _random_model(arch: Arch, adapter: AdapterOptions | None, random: Callable) -> RWKV:
    """Build the model of a run, with its adapter, with random numbers."""
    model = model_on_meta(arch, adapter)
    replace_tensors(model, random)
    with torch.no_grad():
        for layer in adapted_linears(model).values():
            layer.prepare()  # else stored norms are random numbers, and give NaN
    return model


def _random_head(arch: Arch, kernel: str, dtype: torch.dtype, trained: bool, random: Callable) -> Head:
    with torch.device("meta"):
        head = Head(arch.n_embd, arch.vocab_size, kernel)
    head.weight = nn.Parameter(random("head.weight", head.weight).to(dtype), requires_grad=trained)
    return head


def _fastest(work, device: str) -> float:
    """Time the faster of two calls, after one that warms up; if the first was slow, it alone counts."""
    seconds: list[float] = []
    while len(seconds) < 3 and sum(seconds) < SECONDS:
        begun = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    return min(seconds[1:] or seconds)
