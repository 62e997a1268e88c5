"""GPU without a GPU: its memory, of which the interpreter knows where tensors begin and what they hold."""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import mmap
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor

from src import ops
from src.ops import elementwise_ops, mix7, native

from .library import load, readable

NORESERVE = 0x4000  # a flag of mmap: memory is taken where it is touched
NUMBER = 1  # this GPU; the current one is another


class Device:
    """One library of the interpreter, with the memory and the findings of a test.

    Contents of new memory are NaN, and reading them is a finding. Inputs may not be written.
    """

    context = ctypes.c_int(NUMBER), ctypes.c_void_p((NUMBER + 1) << 8)  # the number and a stream of it

    def __init__(self, architecture: str):
        self.architecture, self.library = architecture, load(architecture)
        self.clear()

    def clear(self, rows: int = 0, **options: int) -> None:
        """Forget tensors and findings.

        `rows`: tensors of that many rows follow, of which only the last has numbers and only its blocks run.
        `options`: see machine.h.
        """
        self.rows, self.maps, self.storages, self.calls, self.copies = rows, [], {}, [], []
        self.library.ptx_forget_memory()
        self.library.ptx_clear()
        self.library.ptx_last_row_of(rows)
        self.library.ptx_options(*(options.get(name, 0) for name in ("mma", "approx", "reverse", "traffic")))

    def empty(self, shape, dtype: torch.dtype = torch.float32, known: bool = False, readonly: bool = False):
        """Allocate a tensor at a multiple of 16 bytes and not of 32: native.ALIGNMENT promises no more."""
        size = math.prod(shape) * dtype.itemsize
        if not size:
            return original_empty_like(torch.tensor(0.0), dtype=dtype).expand(shape)
        self.maps.append(mmap.mmap(-1, size + 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE))
        # not a view, which autograd treats in another way
        x = torch.frombuffer(self.maps[-1], dtype=dtype, count=math.prod(shape), offset=16).view(tuple(shape))
        if not self.rows:
            x.view(torch.uint8).fill_(0xFF)
        self.storages[x.untyped_storage().data_ptr()] = x
        name = f"tensor {len(self.maps)} {tuple(shape)}"
        self.library.ptx_register(x.data_ptr(), size, name.encode(), known or self.rows > 0, readonly)
        return x.detach()

    def put(self, x: Tensor | None, readonly: bool = True) -> Tensor | None:
        """Copy a tensor to this device; where there are many rows, it becomes the last one."""
        if x is None:
            return None
        y = self.empty((self.rows or len(x), *x.shape[1:]), x.dtype, True, readonly)
        y[-len(x) :].copy_(x)
        return y

    def vector(self, x: Tensor) -> Tensor:
        """Copy a tensor that has no rows."""
        return self.empty(x.shape, x.dtype, True, True).copy_(x)

    def findings(self) -> list[str]:
        """Describe what the interpreter saw since `clear`, and whether another device is the current one."""
        found = [
            f"{f['kind']} ({f['count']} times) in {readable(f['kernel'])}, {f['where']}: {f['instruction']};"
            f" {f['example']}"
            for f in json.loads(self.library.ptx_findings())
        ]
        current = ctypes.c_int()
        self.library.cudaGetDevice(ctypes.byref(current))
        if current.value:
            self.library.cudaSetDevice(0)
            found.append("a function of the library left another current device")
        return found

    def check(self) -> None:
        assert not (found := self.findings()), "\n".join(found)

    @contextlib.contextmanager
    def in_place_of_cuda(self) -> Iterator[list[str]]:
        """Have the project's operators run this library on the CPU's tensors; yields the functions they call.

        Outputs and scratch are allocated here. Other arguments may be read only.
        """

        def addresses(function, device, tensors, copies):
            if copies is not self.copies:  # else a list among the arguments
                self.calls.append(function)
                self.copies = copies
            found = original_addresses(function, device, tensors, copies)
            self.lend(*copies, *(x for x in tensors if isinstance(x, Tensor)))
            return found

        def new_empty(x, *shape, dtype=None):
            shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
            return self.empty(shape, dtype or x.dtype)

        with contextlib.ExitStack() as stack:
            for where, name, value in [
                (native, "library", lambda device: self.library),
                (elementwise_ops, "library", lambda device: self.library),
                (native, "addresses", addresses),
                (elementwise_ops, "addresses", addresses),
                (native, "context", lambda like: self.context),
                (native, "on_tensor_cores", tensor_cores),
                (mix7, "on_tensor_cores", tensor_cores),
                (ops, "NATIVE", {"cuda": "cpu", "cuda-exact": "cpu"}),
                (torch, "empty_like", lambda x, dtype=None: self.empty(x.shape, dtype or x.dtype)),
                (Tensor, "new_empty", new_empty),
            ]:
                stack.enter_context(mock.patch.object(where, name, value))
            stack.enter_context(mock.patch.dict(native.ACTIVATION_DTYPES, cpu=tuple(native.DTYPE_CODES)))
            yield self.calls

    def lend(self, *tensors: Tensor) -> None:
        """Let kernels read tensors that were made elsewhere. They are kept: none may take their place."""
        for x in tensors:
            storage = x.untyped_storage()
            if storage.nbytes() and storage.data_ptr() not in self.storages:
                self.storages[storage.data_ptr()] = x
                self.library.ptx_register(storage.data_ptr(), storage.nbytes(), b"an argument", 1, 1)


def tensor_cores(kernel: str, r: Tensor) -> bool:
    """Tell whether there is a tensor-core form; below a chunk the project takes the recurrence."""
    return kernel == "cuda" and r.dtype != torch.float32 and r.shape[-1] == 64


original_addresses, original_empty_like = native.addresses, torch.empty_like
