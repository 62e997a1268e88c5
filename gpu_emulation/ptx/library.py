"""The CUDA library with an interpreter of PTX in the place of libcudart: `load`."""

from __future__ import annotations

import ctypes
import functools
import json
import os
import pathlib
import re
import subprocess

from src.common.device import cpu_features
from src.ops import build
from src.ops.toolchain import find_cxx, find_nvcc

HERE = pathlib.Path(__file__).parent
SIZES = [f"wkv{n}{form}_{of}" for n in (6, 7) for form in ("", "_chunked") for of in ("saved", "scratch")]


@functools.cache
def load(architecture: str) -> ctypes.CDLL:
    """Return the library of cuda/*.cu and faults.cu for "80" or another architecture, on a CPU's memory.

    It is compiled as by src/ops/build.py, with PTX in the place of machine code. -lineinfo adds lines of the
    sources and changes no instruction. Raises BuildError.
    """
    nvcc = find_nvcc()
    for_the_interpreter = "-Xcompiler=-O2,-fPIC,-march=native,-ffp-contract=off,-ftree-vectorize"
    code = [f"-gencode=arch=compute_{architecture},code=compute_{architecture}", "-no-compress", "-lineinfo"]
    host = os.environ.get("NVCC_CCBIN") or find_cxx()
    path = build.build(
        f"wkv_ptx_{architecture}",
        f"the CUDA kernels as PTX for sm_{architecture}",
        40,
        [*sorted(build.CUDA.glob("*.cu")), *sorted(HERE.glob("*.cu")), *sorted(HERE.glob("*.cpp"))],
        [*build.headers(), *HERE.glob("*.h")],
        [nvcc.path, "-ccbin", host, "-std=c++17", "-O3", for_the_interpreter, *code, *nvcc.compile_flags],
        # Bsymbolic: the interpreter's functions, also where torch has loaded a libcudart
        ["-ccbin", host, "-cudart", "none", "-Xlinker", "-Bsymbolic"],
        cpu_features(),
    )
    library = ctypes.CDLL(str(path))
    library.device = "cuda"  # whose interface it has
    for name in (*SIZES, "wkv6_chunked_forward_scratch", "wkv7_chunked_forward_scratch"):
        if hasattr(library, name):
            getattr(library, name).restype = ctypes.c_int64
    for name in ("findings", "code", "kernels"):
        getattr(library, f"ptx_{name}").restype = ctypes.c_char_p
    library.run_fault.restype = ctypes.c_char_p
    library.ptx_register.argtypes = [*[ctypes.c_uint64] * 2, ctypes.c_char_p, *[ctypes.c_int] * 2]
    library.ptx_unregister.argtypes = [ctypes.c_uint64] * 2
    library.ptx_last_row_of.argtypes = [ctypes.c_uint64]
    return library


def kernels(library: ctypes.CDLL) -> dict[str, tuple[int, int, int]]:
    """Map each kernel of cuda/ to its launches, its instructions, and how many of these were executed."""
    found = json.loads(library.ptx_kernels())
    return {name: tuple(counts) for name, counts in found.items() if "_cu_" in name}


@functools.cache
def readable(kernel: str) -> str:
    """Return a mangled name as "wkv7.cu forward<Layout<64, 1>>"."""
    file = re.search(r"_[0-9a-f]{8}_\d+_(\w+?)_cu_", kernel)  # a hash, which may be digits alone; a length
    name = subprocess.run(["c++filt", kernel], capture_output=True, text=True).stdout.strip()
    name = re.sub(r"^void |\(anonymous namespace\)::", "", name).partition("(")[0]
    return f"{file[1] + '.cu ' if file else ''}{name}".replace("> >", ">>")
