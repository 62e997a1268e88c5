"""Checks of the PTX interpreter (ptx/): kernels that are wrong on purpose, each with its finding."""

import ctypes
import json

import torch

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
