"""What runs on the device with numbers; the stub has to be loaded before this is imported."""

from __future__ import annotations

import multiprocessing
import os

import torch

from src.ops import native
from tests import program
from tests.conftest import emulated_kernels
from tests.recorded_graph import Graph

from .device import answer

# imported once, before the processes are forked
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  isort: skip
import src.run  # noqa: F401  isort: skip
import src.training.trainer  # noqa: F401  isort: skip


def install() -> None:
    """Let torch.cuda be a card of sm_80 whose kernels are cuda/*.cu, compiled for this CPU."""
    answer((8, 0), Graph, lambda graph: graph)
    torch.cuda.device_count = lambda: 2
    path = emulated_kernels()._name
    native.cuda_library = lambda architectures: path
    program.CONTEXT = multiprocessing.get_context("fork")


def _as_on_a_card(rank: int) -> None:
    os.environ["DS_ACCELERATOR"] = "cuda"


def train(flags: list[str]) -> tuple[int, str]:
    """train.py with these flags, in --devices processes."""
    return program.run(flags, _as_on_a_card)
