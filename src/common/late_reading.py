"""Late reading of a device's numbers and times, without making it wait.

A GPU works asynchronously. Reading a number at once waits until all of its work is done, and then the GPU
waits for the program.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import Tensor


class DeviceMoment:
    """End of all work that the current stream of a device has been given so far."""

    def __init__(self, device: torch.device):
        self.event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        if self.event:
            self.event.record()
        self.time = time.perf_counter()

    def wait(self) -> None:
        """Wait until the moment has come."""
        if self.event:
            self.event.synchronize()

    def seconds_since(self, earlier: DeviceMoment) -> float:
        """Return the seconds between two moments that have come, by the device's clock."""
        if self.event:
            return earlier.event.elapsed_time(self.event) / 1000
        return self.time - earlier.time


class LateNumbers:
    """Numbers of a device on their way to the CPU."""

    def __init__(self, numbers: Tensor):
        # from a GPU into pinned memory, without waiting
        self.numbers, self.sent = numbers.to("cpu", non_blocking=True), DeviceMoment(numbers.device)

    def array(self) -> np.ndarray:
        """Wait for the numbers and return them."""
        self.sent.wait()
        return self.numbers.numpy()

    def read(self) -> list[float]:
        """Wait for the numbers and return them as a list."""
        return self.array().tolist()
