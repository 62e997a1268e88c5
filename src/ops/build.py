"""Native kernels, compiled on first use with ninja and kept in a cache: `cpu_library`, `cuda_library`.

Any number of processes may ask at once. One builds while it holds a lock of the operating system, which is
released when the process ends; the library appears under its final name in one rename. The name has a hash of
everything that decides what the compiler makes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import pathlib
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence

from rwkv_miss.progress import Progress, clear

from ..common.device import cpu_features
from .toolchain import (
    ARCHITECTURES,
    FALLBACK,
    BuildError,
    ask,
    cache_folder,
    code_for,
    find_cxx,
    find_ninja,
    find_nvcc,
)

CUDA = pathlib.Path(__file__).parents[2] / "cuda"
TOO_NEW_GCC = r"gcc versions later than (\d+) are not supported"  # in nvcc's own headers


def cpu_library() -> pathlib.Path:
    """Return the shared library of cuda/*_cpu.cpp for this CPU, built if need be. Raises BuildError."""
    require_unix()
    return build(
        "wkv_cpu",
        "the CPU kernels",
        10,
        sorted(CUDA.glob("*_cpu.cpp")),
        headers(),
        cpu_command(find_cxx()),
        ["-pthread"],
        cpu_features(),
    )


def cpu_command(compiler: str) -> list[str]:
    """Return the compiler with the flags of the CPU kernels."""
    native = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    return [
        compiler,
        "-std=c++17",
        "-O3",
        native,
        # products are fused where the sources call multiply_add (cpu.h), for the same bits in any thread
        "-ffp-contract=off",
        # no -ffast-math: it may assume that there is no NaN and no inf, and raw decays of +-inf are allowed
        "-fno-math-errno",
        "-fPIC",
        "-pthread",
    ]


def cuda_library(architectures: Sequence[str]) -> pathlib.Path:
    """Return the shared library of cuda/*.cu for these compute capabilities, "90" for 9.0, built if need be.

    A library for all ARCHITECTURES serves any of them. Raises BuildError.
    """
    require_unix()
    architectures = sorted(set(architectures), key=lambda arch: (len(arch), arch))
    for arch in architectures:
        if not (number := re.fullmatch(r"(\d+)[af]?", arch)) or int(number[1]) < 75:
            raise BuildError(
                f"a GPU of architecture {arch} is not supported, expected 75 (Turing) or newer; use --wkv"
                " torch"
            )
    nvcc = find_nvcc()
    known = ask(nvcc.path).architectures
    # nvcc leaves the host's part to a C++ compiler; NVCC_CCBIN is its own variable for another one
    host = os.environ.get("NVCC_CCBIN") or find_cxx()
    link = ["-ccbin", host, "-cudart", "static", *nvcc.link_flags]

    def command(architectures: Sequence[str]) -> list[str]:
        return [
            nvcc.path,
            "-ccbin",
            host,
            "-std=c++17",
            "-O3",
            "-Xcompiler",
            "-fPIC",
            *code_for(architectures, known),
            *nvcc.compile_flags,
        ]

    everything = [str(arch) for arch in ARCHITECTURES]
    sources = sorted(CUDA.glob("*.cu"))
    if set(architectures) <= set(everything):
        key = fingerprint("wkv_cuda", sources, headers(), command(everything), link, "")
        if (fat := library_path("wkv_cuda", key)).exists():
            return fat
    return build(
        "wkv_cuda",
        "the CUDA kernels",
        20 * len(architectures),
        sources,
        headers(),
        command(architectures),
        link,
    )


def headers() -> list[pathlib.Path]:
    return sorted([*CUDA.glob("*.h"), *CUDA.glob("*.cuh")])


def require_unix() -> None:
    if os.name != "posix":
        raise BuildError("native kernels are built on Linux and macOS only; use --wkv torch")


def library_path(name: str, key: str) -> pathlib.Path:
    return cache_folder() / f"{name}-{key}.so"


def build(
    name: str,
    title: str,
    seconds: int,
    sources: Sequence[pathlib.Path],
    headers: Sequence[pathlib.Path],
    command: Sequence[str],
    link: Sequence[str] = (),
    machine: str = "",
) -> pathlib.Path:
    """Build the shared library of the sources.

    `command` is the compiler and its flags, `link` more flags for the last step. `seconds`: the estimate that
    the user is told. `machine`: anything else that the result depends on. Raises BuildError.
    """
    folder = cache_folder()
    library = library_path(name, fingerprint(name, sources, headers, command, link, machine))
    log = library.with_suffix(".log")
    try:
        if library.exists():
            return library
        ninja = find_ninja()
        folder.mkdir(parents=True, exist_ok=True)
        begun = time.time()
        with locked(folder / f"{name}.lock", title):
            if library.exists():
                return library
            # an error that was logged while this process waited counts for it, too
            if not (log.exists() and log.stat().st_mtime > begun):
                for abandoned in folder.glob(f".{name}-*"):
                    shutil.rmtree(abandoned, ignore_errors=True)
                announce(f"building {title} with ninja (once, about {seconds} s)")
                start = time.monotonic()
                output = make(library, ninja, sources, command, link)
                if output is None:
                    announce(f"built in {time.monotonic() - start:.1f} s")
                    return library
                log.write_text(output, "utf-8")
            output = log.read_text("utf-8")
            raise BuildError(
                f"{title} did not compile: {reason(output)}; {other_compiler(output)}, {FALLBACK}; all of its"
                f" output: {log}"
            )
    except OSError as error:
        raise BuildError(
            f"the kernel cache {folder} cannot be used ({error}); set RWKV_KERNEL_CACHE to a folder of"
            f" your own that has space, {FALLBACK}"
        ) from None


def fingerprint(
    name: str, sources, headers, command: Sequence[str], link: Sequence[str], machine: str
) -> str:
    """Hash everything that decides the library.

    The compiler counts as its file: asking it for its version would start a process each time.
    """
    compiler = os.path.realpath(command[0])
    status = os.stat(compiler)
    digest = hash_files([*sources, *headers])
    digest.update(
        repr((name, compiler, status.st_size, status.st_mtime_ns, *command[1:], *link, machine)).encode()
    )
    return digest.hexdigest()[:16]


def hash_files(paths: Sequence[pathlib.Path]):
    digest = hashlib.sha256()
    for path in paths:
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)} ".encode() + content)
    return digest


def cuda_sources() -> str:
    """Hash the CUDA sources, so that the record of a run on a GPU names its sources."""
    return hash_files([*sorted(CUDA.glob("*.cu")), *headers()]).hexdigest()[:16]


@contextlib.contextmanager
def locked(path: pathlib.Path, title: str) -> Iterator[None]:
    """Hold the lock of a file.

    The system releases it when its process dies.
    """
    import filelock  # imported here: it takes 0.1 s, and most processes find the library built

    # for file systems without locks it would use a file as one, which outlives a killed process
    lock = filelock.FileLock(path, fallback_to_soft=False)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        announce(f"waiting for another process that builds {title}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def make(
    library: pathlib.Path,
    ninja: str,
    sources: Sequence[pathlib.Path],
    command: Sequence[str],
    link: Sequence[str],
) -> str | None:
    """Compile and link in a new folder next to the library, the sources in parallel.

    Returns None, or what was printed if that failed.
    """
    objects = [f"{source.name}.o" for source in sources]
    lines = ["rule run", "  command = $words"]
    for source, product in zip(sources, objects):
        lines += [
            f"build {product}: run",
            f"  words = {ninja_quote(*command, '-c', str(source.resolve()), '-o', product)}",
        ]
    lines += [
        f"build linked: run {' '.join(objects)}",
        f"  words = {ninja_quote(command[0], '-shared', *objects, *link, '-o', 'linked')}",
    ]
    with tempfile.TemporaryDirectory(
        dir=library.parent, prefix=f".{library.name}-", ignore_cleanup_errors=True
    ) as work:
        pathlib.Path(work, "build.ninja").write_text("\n".join(lines) + "\n", "utf-8")
        output = ""
        with (
            Progress("compiling", len(objects) + 1, "files") as bar,
            subprocess.Popen(
                [ninja, "-C", work],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env=os.environ | {"TMPDIR": work},  # files of a killed compiler are swept with the rest
            ) as process,
        ):
            for line in process.stdout:
                output += line
                bar.update(re.match(r"\[\d+/\d+\] ", line) is not None)
        if "No space left on device" in output:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if process.returncode:
            return output
        with open(os.path.join(work, "linked")) as file:
            os.fsync(file.fileno())  # else a power cut may leave an empty file under the final name
        os.replace(file.name, library)
    return None


def ninja_quote(*words: str) -> str:
    """Quote a command for the shell, inside a build.ninja."""
    return shlex.join(words).replace("$", "$$")


def reason(output: str) -> str:
    """Find the line of a compiler's output that says what is wrong."""
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["no output"]
    return next(
        (line for line in lines if re.search(r"\b(error|fatal)\s*:|cannot find|undefined reference", line)),
        lines[-1],
    )


def other_compiler(output: str) -> str:
    """Advise on another compiler, given what this one printed."""
    if newest := re.search(TOO_NEW_GCC, output):
        name = f"g++-{newest[1]}"
        return f"install one that nvcc takes (apt install {name}) and set NVCC_CCBIN={name}"
    return "set CXX to another compiler"


def announce(message: str) -> None:
    """Print a line to stderr: stdout is for the program's results."""
    clear()  # a bar may be half drawn
    print(message, file=sys.stderr, flush=True)
