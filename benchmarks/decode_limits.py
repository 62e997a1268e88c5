"""What this machine can do at most, in the same run: bytes read and multiply-adds a second."""

import ctypes
import pathlib

import torch

from src.common.device import cpu_features
from src.ops import build, toolchain

from .common import timed

# kinds of multiply-adds, as decode_peers.cpp numbers them
KINDS = {"fp32": 0, "int8": 1, "bf16": 2}


def native() -> ctypes.CDLL:
    """The library of decode_peers.cpp."""
    source = pathlib.Path(__file__).with_name("decode_peers.cpp")
    command = [toolchain.find_cxx(), "-std=c++17", "-O3", "-march=native", "-fPIC", "-pthread"]
    path = build.build(
        "decode_peers",
        "the decoder's peers",
        3,
        [source],
        build.headers(),
        command,
        ["-pthread"],
        cpu_features(),
    )
    return ctypes.CDLL(str(path))


class Limits:
    """Reading a large buffer, as a bound for one row: a decoder reads every weight for every token.

    Multiplying in registers, as a bound for many rows.
    """

    def __init__(self):
        self.buffer = torch.ones(300_000_000 // 4)
        self.library = native()

    def read_seconds(self, threads: int) -> float:
        pointer, size = ctypes.c_void_p(self.buffer.data_ptr()), ctypes.c_int64(self.buffer.nbytes)
        return timed(lambda: self.library.read_bytes(pointer, size, ctypes.c_int64(threads)), threads)

    def multiply_adds_per_second(self, kind: str, threads: int, rounds: int = 1_000_000) -> float:
        """0 where the CPU has no instruction for the kind."""
        function = self.library.multiply_adds
        function.restype = ctypes.c_int64
        given = (ctypes.c_int64(number) for number in (KINDS[kind], rounds, threads))
        counted = []
        seconds = timed(lambda: counted.append(function(*given)), threads)
        return counted[0] / seconds
