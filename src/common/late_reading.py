"""What is told about a device's work without making it wait: when a piece was done, and numbers from it.

A GPU does its work behind the program that gives it. To read a number at once is to wait until all of it is
done, and then the GPU waits for the program.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor


class Moment:
    """The end of all work that the current stream of a device has been given so far."""

    def __init__(self, device: torch.device):
        self.event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        if self.event:
            self.event.record()
        self.time = time.perf_counter()

    def wait(self) -> None:
        """Come back when it is over."""
        if self.event:
            self.event.synchronize()

    def seconds_since(self, earlier: Moment) -> float:
        """Seconds between two moments that are over, by the clock of the device."""
        if self.event:
            return earlier.event.elapsed_time(self.event) / 1000
        return self.time - earlier.time


class Numbers:
    """Numbers of a device on their way to the CPU."""

    def __init__(self, numbers: Tensor):
        # from a GPU into pinned memory, and nobody waits
        self.numbers, self.sent = numbers.to("cpu", non_blocking=True), Moment(numbers.device)

    def read(self) -> list[float]:
        """Wait until they are there."""
        self.sent.wait()
        return self.numbers.tolist()
