"""Check what this machine has for training, and name the command that installs what is missing.

    python -m scripts.doctor [--json] [--fat]

Each line says ok, warn or missing. The exit code is 0 if training works here, with or without native kernels,
else 1. Nothing is installed. If there is a compiler, native kernels are built, as training would do. With
--json stdout has one JSON object and nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple

if not __package__:  # started as a file, so that Python does not find src
    raise SystemExit("error: run this from the repository's folder as python -m scripts.doctor")

from src.common.startup import importing

ROOT = pathlib.Path(__file__).parent.parent
RECORDS = ROOT / "docs" / "gpu"
# package -> its use; a training imports all other packages
OPTIONAL = {
    "deepspeed": "only --strategy deepspeed_stage_1, _2 and _3 need it",
    "tokenizers": "only --tokenizer FILE.json needs it",
}
CUDA_KERNELS = ("wkv6 cuda", "wkv6 cuda-exact", "wkv7 cuda", "wkv7 cuda-exact", "elementwise", "loss")
GIB = 2**30


class Check(NamedTuple):
    """Line of the report: ok, warn or missing; the subject; what was seen, what to do. Without a `needed`
    one training does not work."""

    state: str
    name: str
    text: str
    needed: bool = False

    @property
    def fatal(self) -> bool:
        return self.needed and self.state == "missing"


def main() -> None:
    with importing():
        try:
            from rwkv_miss.errors import one_line_errors
        except (ImportError, OSError):  # torch is missing or broken; packages() reports it
            one_line_errors = contextlib.nullcontext
    with one_line_errors():
        examine_and_tell()


def examine_and_tell() -> None:
    """Print all checks for people or, with --json, for machines."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.doctor", description=__doc__.partition("\n\n")[0], allow_abbrev=False
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--fat",
        action="store_true",
        help="first build the CUDA kernels for every architecture, for machines that share this cache",
    )
    args = parser.parse_args()
    as_json, checks = args.json, []
    if args.fat:
        build_all()
    # stdout must be JSON alone, so the libraries' own output goes to stderr
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        for check in examine():
            checks.append(check)
            if not as_json:
                print(f"{check.state:<8} {check.name:<18} {check.text}", flush=True)
    works = not any(check.fatal for check in checks)
    if as_json:
        print(
            json.dumps(
                {"works": works, "checks": [check._asdict() for check in checks], "gpu_records": records()}
            )
        )
    else:
        print(
            "training works here"
            if works
            else "training does not work here: " + ", ".join(check.name for check in checks if check.fatal)
        )
    sys.exit(not works)


def examine() -> Iterator[Check]:
    yield python()
    yield from packages()
    yield from machine()
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Check(
            "missing",
            "import torch",
            f"{' '.join(str(error).split())}; pip install --force-reinstall torch",
            needed=True,
        )
        return
    from src.common.device import driver_advice, driver_version

    has_gpu = torch.cuda.is_available() or driver_version() is not None
    if has_gpu:
        yield from gpus(torch)
        yield nvcc()
    else:
        yield Check(
            "ok",
            "GPU",
            f"none, training runs on the CPU; where there is one, its driver is needed ({driver_advice()}),"
            " then pip install --force-reinstall torch",
        )
    yield from tools()
    yield server()
    yield from kernels("cpu")
    if torch.cuda.is_available():
        yield from kernels_of_gpus(torch)
    if has_gpu:
        yield from evidence()


def python() -> Check:
    version, text = (
        sys.version_info[:2],
        f"{platform.python_version()} on {platform.system()} {platform.machine()}",
    )
    if version < (3, 10):
        return Check(
            "missing",
            "Python",
            f"{text}; 3.10 or newer is needed, on Debian and Ubuntu: apt install python3 python3-venv",
            needed=True,
        )
    if version > (3, 14):
        return Check(
            "warn",
            "Python",
            f"{text}; tried with 3.10 to 3.14: if a package fails, make .venv with one of those",
        )
    return Check("ok", "Python", text)


def packages() -> Iterator[Check]:
    """Yield a line for each package of requirements.txt."""
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        name, minimum, system = re.match(r'([\w-]+)>=([\d.]+)(?:; sys_platform == "(\w+)")?', line).groups()
        if name == "ninja":
            continue  # a ninja on PATH is enough: see tools()
        needed = name not in OPTIONAL
        fix = f'pip install "{name}>={minimum}"' + ("" if needed else f" ({OPTIONAL[name]})")
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if system in (None, sys.platform):
                yield Check("missing", name, f"not installed; {fix}", needed)
            continue
        if numbers(version) < numbers(minimum):
            yield Check("missing", name, f"{version} is too old, {minimum} or newer is needed; {fix}", needed)
        else:
            yield Check("ok", name, f"{version} (>={minimum})")


def server() -> Check:
    """Check the packages that only demo.serve needs."""
    absent = [name for name in ("starlette", "uvicorn") if not importlib.util.find_spec(name)]
    if absent:
        return Check("missing", "server", f"only demo.serve needs it: pip install {' '.join(absent)}")
    return Check("ok", "server", "demo.serve has starlette and uvicorn")


def numbers(version: str) -> list[int]:
    return [int(part) for part in re.match(r"[\d.]*\d", version)[0].split(".")]


def machine() -> Iterator[Check]:
    memory = (
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB if hasattr(os, "sysconf") else None
    )
    if memory:
        small = memory < 4
        yield Check(
            "warn" if small else "ok",
            "RAM",
            f"{memory:.1f} GiB, {os.cpu_count()} cores" + "; use --grad_cp 1 and a small model" * small,
        )
    yield disk(
        "working folder", pathlib.Path.cwd(), 2, "checkpoints go to --proj_dir, put that on another disk"
    )


def disk(name: str, folder: pathlib.Path, enough: float, fix: str) -> Check:
    """Check the free space on the disk of a folder, which need not exist yet."""
    exists = next(place for place in (folder, *folder.parents) if place.exists())
    free = shutil.disk_usage(exists).free / GIB
    writable = os.access(exists, os.W_OK)
    text = f"{free:.1f} GiB free in {folder}" + ("" if writable else ", which may not be written")
    return Check("ok", name, text) if writable and free >= enough else Check("warn", name, f"{text}; {fix}")


def gpus(torch) -> Iterator[Check]:
    """Yield lines on torch's CUDA, the driver, and each GPU with its architecture."""
    from src.common.device import cuda_of_driver, driver_advice, driver_version, unseen_gpu

    built_for, driver = torch.version.cuda, driver_version()
    newest = cuda_of_driver()
    if driver:
        yield Check("ok", "driver", f"{driver}, for CUDA up to {dotted(newest)}")
    else:
        yield Check(
            "missing",
            "driver",
            f"no NVIDIA driver (nvidia-smi is not there); with an NVIDIA GPU, {driver_advice()}",
        )
    if built_for:
        yield Check("ok", "CUDA of torch", built_for)
    else:
        fix = "pip install --force-reinstall torch"
        yield Check(
            "missing", "CUDA of torch", f"torch {torch.__version__} is for CPUs; for a GPU, on Linux: {fix}"
        )
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        major, minor = torch.cuda.get_device_capability(i)
        text = (
            f"{torch.cuda.get_device_name(i)}, architecture {major}{minor},"
            f" {torch.cuda.get_device_properties(i).total_memory / GIB:.0f} GiB"
        )
        if (major, minor) < (7, 5):
            yield Check(
                "warn",
                f"GPU {i}",
                f"{text}; native kernels need 75 or newer, this one trains with --wkv torch",
            )
        else:
            yield Check("ok", f"GPU {i}", text)
    if not torch.cuda.is_available():
        why = unseen_gpu() or "see the lines above"
        yield Check("missing", "GPU", f"torch sees none, training runs on the CPU; {why}")


def dotted(cuda: int) -> str:
    return f"{cuda // 1000}.{cuda % 1000 // 10}" if cuda else "unknown"


def tools() -> Iterator[Check]:
    """Yield lines on the tools that build native kernels, and their cache."""
    from src.ops import toolchain

    for name, find in {"C++ compiler": toolchain.find_cxx, "ninja": toolchain.find_ninja}.items():
        try:
            path = find()
            yield Check("ok", name, f"{path}, {first_line(path, '--version')}")
        except toolchain.BuildError as error:
            yield Check("missing", name, str(error))
    yield disk("kernel cache", toolchain.cache_folder(), 0.2, "set RWKV_KERNEL_CACHE to a folder with space")


def nvcc() -> Check:
    """Check the compiler of a GPU's kernels."""
    from src.ops import toolchain

    try:
        path = toolchain.find_nvcc().path
    except toolchain.BuildError as error:
        return Check("missing", "nvcc", f"{error} (only a GPU needs it)")
    return Check("ok", "nvcc", f"{path}, CUDA {toolchain.ask(path).cuda or 'of unknown release'}")


def build_all() -> None:
    """Build the CUDA kernels for all architectures, which needs nvcc and no GPU."""
    from src.ops import build, toolchain

    try:
        print(
            "CUDA kernels for all architectures:",
            build.cuda_library([str(arch) for arch in toolchain.ARCHITECTURES]),
            file=sys.stderr,
        )
    except toolchain.BuildError as error:
        sys.exit(f"error: {error}")


def run(*command: str) -> str:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
    return ""


def first_line(*command: str) -> str:
    return run(*command).partition("\n")[0] or "which does not run"


def kernels_of_gpus(torch) -> Iterator[Check]:
    """Yield kernels() for the first GPU of each kind: kernels may be right on one kind, wrong on another."""
    from src.ops import self_test

    kinds: set[str] = set()
    for i in range(torch.cuda.device_count()):
        with torch.cuda.device(i):
            if self_test.card() not in kinds:
                self_test.status.cache_clear()
                yield from kernels("cuda", f" on GPU {i}" if kinds else "")
            kinds.add(self_test.card())


def kernels(device: str, where: str = "") -> Iterator[Check]:
    """Yield whether a device's native kernels are built and right, and the choice of --wkv auto there."""
    from src import ops
    from src.ops import self_test

    status = self_test.status(device)
    if status.passed:
        yield Check(
            "ok",
            f"kernels, {device}{where}",
            f"{status.path}, ready in {status.seconds:.1f} s, self-test passed (error {status.error:.1e})",
        )
    elif status.built:
        yield Check(
            "warn",
            f"kernels, {device}{where}",
            f"{status.path} is not used: {status.reason}; --wkv torch works without it",
        )
    else:
        yield Check("missing", f"kernels, {device}{where}", status.reason)
    kernel, reason = ops.choose("auto", device)
    yield Check("ok", f"--wkv auto, {device}{where}", f"{kernel}: {reason}")


def records() -> list[dict]:
    """Read the records of scripts/gpu_check.sh, the newest first."""
    return sorted(
        (json.loads(path.read_text()) for path in RECORDS.glob("*.json")),
        key=lambda record: record["date"],
        reverse=True,
    )


def evidence() -> Iterator[Check]:
    """Yield a line for each CUDA kernel on where it was tested, here or on recorded machines."""
    from src.ops import build, toolchain

    compiled = (
        f"compiled for sm_{', '.join(map(str, toolchain.ARCHITECTURES))}, executed as PTX on a CPU in CI"
    )
    for kernel in CUDA_KERNELS:
        runs = [record for record in records() if kernel in record["errors"]]
        if not runs:
            yield Check(
                "warn",
                kernel,
                f"{compiled}; not run on a GPU yet: bash scripts/gpu_check.sh on a machine with one",
            )
        for record in runs:
            errors = ", ".join(f"{dtype} {error:.1e}" for dtype, error in record["errors"][kernel].items())
            text = (
                f"{compiled}; run on {record['card']}, {record['date']}, commit {record['commit']}, worst"
                f" errors {errors}"
            )
            if record["sources"] != build.cuda_sources():
                yield Check(
                    "warn",
                    kernel,
                    f"{text}; the sources have changed since: bash scripts/gpu_check.sh on a machine with"
                    " a GPU",
                )
            elif record["failures"]:
                yield Check("warn", kernel, f"{text}; failed there: {', '.join(record['failures'])}")
            else:
                yield Check("ok", kernel, text)


if __name__ == "__main__":
    main()
