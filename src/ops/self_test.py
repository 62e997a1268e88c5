"""Self-test of a device's native code: whether it can be built, and is right (kernel_errors.py).

status() builds and tests. The verdict is kept next to the library, so that only the first process tests.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import re
import time
from typing import NamedTuple

import torch

from rwkv_miss.errors import UserError
from rwkv_miss.files.output import write_text

from ..common.device import cuda_of_driver
from . import native
from .kernel_errors import largest_error
from .launch_errors import LaunchError
from .toolchain import BuildError

# Largest relative error that a self-test lets pass: rounding in fp32, and bf16 operands of tensor cores
LARGEST_ERROR = {False: 1e-5, True: 2e-2}
REPORT = "please report it, and use --wkv torch"


class Status(NamedTuple):
    """Result of building and testing the kernels of a device."""

    built: bool
    passed: bool
    path: str = ""  # the library
    seconds: float = 0.0  # for the build and the test; milliseconds when both are found done
    error: float | None = None  # the largest relative error of the self-test
    reason: str = ""  # why they must not be used, and what to do, in one line


@functools.cache
def status(device: str) -> Status:
    """Build the kernels of "cpu" or "cuda" and compare them with the reference.

    A library is built once in its life, and tested once on each kind of GPU. The GPU is the current one at
    the first call.
    """
    started = time.perf_counter()
    try:
        path = native.library(device).path
    except BuildError as error:
        return Status(False, False, reason=str(error))
    kind = card() if device == "cuda" else ""
    verdict = verdict_file(path, kind)
    error, problem = read_verdict(verdict), ""
    if error is None:
        error, problem = test_forms(device)
        if not problem:
            write_verdict(verdict, error, kind)
    seconds = time.perf_counter() - started
    reason = f"the {device} kernels {problem}" if problem else ""
    return Status(True, not problem, path, seconds, error, reason)


def card() -> str:
    """Name the kind of GPU and its driver, which a self-test on the current GPU holds for."""
    major, minor = torch.cuda.get_device_capability()
    driver = str(cuda_of_driver())
    with contextlib.suppress(OSError, AttributeError), open("/proc/driver/nvidia/version") as file:
        driver = re.search(r"\b\d+\.\d+(\.\d+)?\b", file.readline())[0]
    return f"{torch.cuda.get_device_name()}, architecture {major}{minor}, driver {driver}"


def test_forms(device: str) -> tuple[float, str]:
    """Test the kernels of a device: (the error, what is wrong with them, or "")."""
    tensor_cores = device == "cuda" and torch.cuda.get_device_capability() >= (8, 0)
    forms = [False, True] if tensor_cores else [False]
    try:
        # also if the first to ask is a program that has turned gradients off
        with torch.inference_mode(False), torch.enable_grad():
            errors = {chunked: largest_error(device, chunked) for chunked in forms}
    except LaunchError as failure:
        help = ", or use --wkv torch" if failure.of_the_machine else ""
        return math.nan, f"do not run on this machine: {failure}{help}"
    except RuntimeError as failure:
        return math.nan, f"do not run on this machine ({' '.join(str(failure).split())}); {REPORT}"
    if all(errors[chunked] < LARGEST_ERROR[chunked] for chunked in forms):  # NaN is not smaller
        return errors[False], ""
    return max(errors.values()), f"are wrong on this machine (errors of the self-test: {errors}); {REPORT}"


def verdict_file(path: str, card: str) -> str:
    """Return the path of the verdict about a library, on one kind of GPU or on its CPU."""
    kind = f".{hashlib.sha256(card.encode()).hexdigest()[:8]}" if card else ""
    return f"{path}{kind}.tested"


def read_verdict(path: str) -> float | None:
    """Read the error of a self-test that passed before. A power cut may have left the file empty."""
    with contextlib.suppress(OSError, ValueError), open(path) as file:
        return json.load(file)["error"]
    return None


def write_verdict(path: str, error: float, card: str) -> None:
    """Record a passed self-test. A cache that others built may be read-only: each process then tests."""
    with contextlib.suppress(OSError, UserError):
        write_text(path, json.dumps({"error": error} | ({"card": card} if card else {})))
