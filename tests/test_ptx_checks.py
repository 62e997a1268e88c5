"""Checks of the PTX interpreter (tests/ptx): kernels that are wrong on purpose, each with its finding.

And a check of the sources that an execution cannot make.
"""

import ctypes
import json
import re

import torch

from src.ops.build import CUDA

from .ptx.runs import device_of


def test_each_check_finds_its_own_fault(nvcc):
    device = device_of("80")
    library = device.library
    assert library.fault_count() > 20
    for n in range(library.fault_count()):
        device.clear()
        given, out = device.put(torch.arange(64.0) + 1), device.empty((64,))
        pointers = [ctypes.c_void_p(p) for p in (given.data_ptr(), out.data_ptr(), 1 << 8)]
        expected = library.run_fault(n, *pointers).decode()
        library.cudaGetLastError()
        found = {finding["kind"] for finding in json.loads(library.ptx_findings())}
        assert expected in found if expected else not found, f"fault {n}: {found}, expected {expected!r}"
        # which races a race brings besides depends on who comes first
        assert found <= {expected} or "race" in expected, f"fault {n}: {found}, expected {expected!r} only"


def test_every_function_that_launches_sets_its_device():
    """A process may hold several GPUs, and an autograd thread has a current device of its own."""
    functions = [
        found.groups()
        for path in sorted(CUDA.glob("*.cu"))
        for found in re.finditer(r'extern "C" int (\w+)\(([^)]*)\) \{\n((?:.*\n){2})', path.read_text())
    ]
    assert {"wkv6_forward", "wkv7_chunked_backward", "dequantise_nf4"} <= {name for name, _, _ in functions}
    for name, arguments, start in functions:
        assert " ".join(arguments.split()).endswith("int dtype, int device, void* stream"), name
        assert start == "    OnDevice on(device);\n    if (on.error) return on.error;\n", name
