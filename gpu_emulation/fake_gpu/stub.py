"""Compiles the stub (15 s, kept with the kernels) and loads it in the place of libtorch_cuda."""

import ctypes
import hashlib
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys

HERE = pathlib.Path(__file__).parent
SOURCES = [HERE / "fake_cuda.cpp", HERE / "numbers.cpp"]


class Unavailable(Exception):
    """The stub cannot be had on this machine; the message has the reason."""


def load() -> None:
    """Has to come before the first import of torch. Raises Unavailable."""
    if "torch" in sys.modules:
        raise RuntimeError("the stub must be loaded before torch is imported")
    torch = pathlib.Path(importlib.util.find_spec("torch").origin).parent
    if any((torch / "lib").glob("libtorch_cuda*")):
        raise Unavailable(
            "this torch has CUDA, and the stub is for its CPU wheel; use an environment that has this one."
            " benchmarks/gpu_predictions.json has what was counted there"
        )
    library = _build(torch)
    try:
        for path in (
            *(torch / "lib" / f"lib{name}.so" for name in ("torch_global_deps", "c10", "torch_cpu")),
            library,
        ):
            ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise Unavailable(f"the stub cannot be loaded into this torch: {error}") from None


def _build(torch: pathlib.Path) -> pathlib.Path:
    compiler = shutil.which("g++")
    if compiler is None:
        raise Unavailable("no g++ on PATH")
    read = [path.read_bytes() for path in (*SOURCES, HERE / "numbers.h", torch / "version.py")]
    key = hashlib.sha256(b"".join(read)).hexdigest()[:16]
    folder = pathlib.Path(os.environ.get("RWKV_KERNEL_CACHE") or "~/.cache/rwkv-miss/kernels").expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"fake_cuda-{key}.so"
    if not library.exists():
        temporary = folder / f"fake_cuda-{key}.{os.getpid()}"
        command = [
            compiler,
            "-std=c++20",
            "-O1",
            "-fPIC",
            "-shared",
            *SOURCES,
            f"-I{torch}/include",
            f"-L{torch}/lib",
            "-lc10",
            "-ltorch_cpu",
            "-o",
            temporary,
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[-300:])
            raise Unavailable(f"g++ does not compile the stub against this torch: {first}")
        temporary.replace(library)
    return library
