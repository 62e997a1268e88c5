"""The programs that native kernels are built with: `find_cxx`, `find_ninja`, `find_nvcc`.

A kernel made by nvcc contains a part of its CUDA version, and a driver runs no CUDA that is newer than its
own. So the nvcc has to fit the driver; without a driver, as on a login node, it has to fit torch.
"""

from __future__ import annotations

import contextlib
import glob
import importlib.util
import json
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from rwkv_miss.errors import UserError
from rwkv_miss.files.output import user_cache, write_text

from ..common import device

TOOLKITS = "/usr/local/cuda*/bin"
# compute capabilities that the sources are written for; a build has only those of the GPUs in the machine
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
JETSON = (87, 101, 110)  # they run no code that was compiled for another GPU of their generation
OLDEST = "11.8"  # the first CUDA whose PTX has movmatrix (PTX ISA 7.8), which the WKV kernels use
# glibc 2.42 declares rsqrt with noexcept, and an older nvcc's headers without: no kernel compiles
NEW_GLIBC, FIRST_FOR_NEW_GLIBC = "2.42", "13.2"
FALLBACK = "or use --wkv torch, which needs no compiler"
# nvcc and what it needs, all of one release, on PyPI; before CUDA 13 there is no nvcc in it
WHEELS, FIRST_WHEELS = "cuda-toolkit[cccl,crt,cudart,nvcc,nvvm]", 13


class BuildError(RuntimeError):
    """Failure to get a library, in one line: the reason and what to do about it."""


class Nvcc(NamedTuple):
    """CUDA compiler, with the flags for its own headers and libraries."""

    path: str
    compile_flags: tuple[str, ...] = ()
    link_flags: tuple[str, ...] = ()


class Release(NamedTuple):
    """Version of an nvcc and the architectures that it knows."""

    cuda: str  # "13.0"; "" if unknown
    architectures: tuple[int, ...]  # targets of the compiler: 90 for compute capability 9.0


def cache_folder() -> pathlib.Path:
    """Return RWKV_KERNEL_CACHE, else rwkv-miss/kernels in the user's cache folder. It need not exist."""
    if chosen := os.environ.get("RWKV_KERNEL_CACHE"):
        return pathlib.Path(chosen).expanduser().absolute()
    return user_cache("kernels")


def find_cxx() -> str:
    """Find $CXX, else the first of c++, g++ and clang++ on PATH. Raises BuildError."""
    if chosen := os.environ.get("CXX"):
        if path := shutil.which(chosen):
            return path
        raise BuildError(
            f"CXX={chosen} is no program; expected a C++ compiler without options, as in CXX=g++-13, or no"
            f" CXX, {FALLBACK}"
        )
    for name in ("c++", "g++", "clang++"):
        if path := shutil.which(name):
            return path
    raise BuildError(
        "no C++ compiler: c++, g++ and clang++ are not on PATH; install one, on Debian and Ubuntu: apt"
        f" install g++, {FALLBACK}"
    )


def find_ninja() -> str:
    """Find ninja in this Python's environment, which need not be activated, else on PATH."""
    with contextlib.suppress(ImportError):
        import ninja

        if path := shutil.which("ninja", path=ninja.BIN_DIR):
            return path
    if path := shutil.which("ninja"):
        return path
    raise BuildError(
        f"no ninja, neither next to {sys.executable} nor on PATH; install it: pip install ninja, {FALLBACK}"
    )


def find_nvcc() -> Nvcc:
    """Find the first nvcc that fits: in CUDA_HOME, PATH, /usr/local, the PyPI packages of this environment.

    Raises BuildError if there is none, or if each is too old or too new.
    """
    newest, whose = newest_cuda()
    unfit = []
    for nvcc in every_nvcc():
        cuda = ask(nvcc.path).cuda
        if cuda and numbers(cuda) < numbers(OLDEST):
            unfit.append(f"{nvcc.path} of CUDA {cuda} cannot compile them: they need {OLDEST} or newer")
        elif cuda and needs_new_headers() and numbers(cuda) < numbers(FIRST_FOR_NEW_GLIBC):
            unfit.append(
                f"{nvcc.path} of CUDA {cuda} does not compile with this system's glibc"
                f" {platform.libc_ver()[1]}: expected CUDA {FIRST_FOR_NEW_GLIBC} or newer"
            )
        elif newest and numbers(cuda)[:1] > numbers(newest)[:1]:
            unfit.append(
                f"kernels by {nvcc.path} of CUDA {cuda} would not start (error 35): {whose} runs CUDA up to"
                f" {newest}"
            )
        else:
            return nvcc
    if unfit:
        raise BuildError(
            f"no nvcc that fits the kernels and this machine: {'; '.join(unfit)}. {how_to_install(newest)},"
            f" {FALLBACK}"
        )
    raise BuildError(
        f"no nvcc: it is not in CUDA_HOME/bin, on PATH, in {TOOLKITS} or in this environment."
        f" {how_to_install(newest)}, {FALLBACK}"
    )


def newest_cuda() -> tuple[str | None, str]:
    """Return (the newest CUDA that kernels may be made with, as "13.0", who says so); None if nobody does."""
    if driver := device.cuda_of_driver():
        return f"{driver // 1000}.{driver % 1000 // 10}", "this driver"
    return torch.version.cuda, f"torch {torch.__version__}"


def needs_new_headers() -> bool:
    """Tell whether this system's glibc is too new for the headers of nvcc before FIRST_FOR_NEW_GLIBC."""
    name, version = platform.libc_ver()
    return name == "glibc" and numbers(version) >= numbers(NEW_GLIBC)


def numbers(text: str) -> list[int]:
    """Return the numbers in a version or a path: "11.8" -> [11, 8]."""
    return list(map(int, re.findall(r"\d+", text)))


def how_to_install(newest: str | None) -> str:
    """Tell in one line how to install an nvcc of at most this CUDA, or first a torch that sees the GPU."""
    if unseen := device.unseen_gpu():
        return f"{unseen}; nvcc comes after that"
    # torch's own version if the driver runs it: then pip changes nothing of torch's
    torchs = torch.version.cuda
    wanted = torchs if torchs and (newest is None or numbers(torchs)[0] <= numbers(newest)[0]) else newest
    if newest and numbers(newest)[0] < FIRST_WHEELS:
        if needs_new_headers():
            return "update the driver to 580 or newer, which runs the nvcc that this glibc needs"
        return (
            f"PyPI has none before CUDA {FIRST_WHEELS}: install the toolkit of CUDA {wanted} from"
            " https://developer.nvidia.com/cuda-toolkit-archive (with --toolkit --toolkitpath=FOLDER, without"
            " root) and set CUDA_HOME to its folder, or update the driver to 580 or newer"
        )
    version = wanted if wanted and numbers(wanted)[0] >= FIRST_WHEELS else f"{FIRST_WHEELS}.0"
    if needs_new_headers() and numbers(version) < numbers(FIRST_FOR_NEW_GLIBC):
        return f'pip install "{WHEELS}>={FIRST_FOR_NEW_GLIBC},<{numbers(version)[0] + 1}" brings one'
    return f'pip install "{WHEELS}=={version}.*" brings one'


def every_nvcc() -> Iterator[Nvcc]:
    """Yield every installed nvcc, in the order in which they are tried."""
    home = os.environ.get("CUDA_HOME")
    toolkits = sorted(glob.glob(TOOLKITS), key=numbers)
    for folder in [*([f"{home}/bin"] if home else []), *os.get_exec_path(), *reversed(toolkits)]:
        if folder and (path := shutil.which("nvcc", path=folder)):
            yield Nvcc(path)
    spec = importlib.util.find_spec("nvidia")
    places = spec.submodule_search_locations if spec else ()
    parts = [part for place in places for part in sorted(pathlib.Path(place).iterdir())]
    for part in reversed(parts):
        if path := shutil.which("nvcc", path=str(part / "bin")):
            # nvcc's default settings miss the wheels' lib. An environment on top of another has two folders
            # of one name, each with a share of the files.
            shares = [other for other in parts if other.name == part.name]
            yield Nvcc(
                path,
                tuple(f"-I{share}/include" for share in shares),
                tuple(f"-L{share}/lib" for share in shares),
            )


def ask(nvcc: str) -> Release:
    """Ask an nvcc for its version; the answer is kept in the kernel cache, as asking starts two processes."""
    status = os.stat(nvcc)
    key = f"{os.path.realpath(nvcc)} {status.st_size} {status.st_mtime_ns}"
    path = cache_folder() / "nvcc.json"
    releases: dict = {}
    with contextlib.suppress(OSError, ValueError):
        releases = json.loads(path.read_text("utf-8"))
    with contextlib.suppress(KeyError, TypeError):
        cuda, architectures = releases[key]
        return Release(cuda, tuple(architectures))
    match = re.search(r"release (\d+\.\d+)", output_of(nvcc, "--version"))
    release = Release(
        match[1] if match else "",
        tuple(map(int, re.findall(r"^compute_(\d+)$", output_of(nvcc, "--list-gpu-arch"), re.MULTILINE))),
    )
    with contextlib.suppress(OSError, UserError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({**releases, key: release}))
    return release


def output_of(*command: str) -> str:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
    return ""


def code_for(architectures: Sequence[str], known: Sequence[int]) -> list[str]:
    """Return nvcc's flags for these compute capabilities, "90" for 9.0, given those that it knows.

    A GPU that is newer than nvcc runs code for an older one of its generation, but not a Jetson, nor what is
    made for a Jetson. If nvcc knows none of those, it gets PTX of the newest older one that nvcc knows, which
    the driver compiles at the first start.
    """
    flags = []
    for arch in architectures:
        code = f"sm_{arch}"
        number = int(re.match(r"\d+", arch)[0])
        older = [other for other in ARCHITECTURES if other in known and other < number]
        if number not in known and older:
            arch = str(older[-1])
            relative = older[-1] // 10 == number // 10 and number not in JETSON
            code = f"sm_{arch}" if relative else f"compute_{arch}"
        flags.append(f"-gencode=arch=compute_{arch},code={code}")
    return sorted(set(flags), key=flags.index)
