"""Device of a model, and its dtype."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import re
import subprocess

import torch

from rwkv_miss.errors import UserError

from .available_memory import status_bytes

MOST_PROCESSES = 8  # on one core; they are slow then, but they finish
# driver -> torch's newest wheel that it runs, the newest first. NVIDIA: CUDA 13.x needs a driver >= 580, and
# 12.x >= 525 (docs.nvidia.com/deploy/cuda-compatibility, minor version compatibility); in full, 12.8 >= 570
WHEELS = {580: "cu130", 570: "cu128", 525: "cu126"}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# --precision of programs that score, for flag()
PRECISION_FLAG = {
    "default": "auto",
    "choices": ("auto", *PRECISIONS),
    "help": "dtype of the weights. auto: bf16 on a GPU that has it, else fp16; on a CPU fp32. Default"
    " %(default)s",
}


def choose_accelerator(choice: str, devices: int = 1) -> str:
    """Choose cpu or gpu. Raises UserError if torch sees fewer GPUs than asked for, or none of those here.

    After gpu, products in half precision have fp32 sums.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if choice != "cpu" and not gpus and (unseen := unseen_gpu()):
        raise UserError(f"{unseen}; to go on without the GPU: --accelerator cpu, or CUDA_VISIBLE_DEVICES=-1")
    if choice == "cpu" or choice == "auto" and not gpus:
        cores = os.cpu_count() or 1
        if devices > MOST_PROCESSES * cores:
            raise UserError(
                f"--devices {devices}: this machine has no GPU and {cores} cores; at most"
                f" {MOST_PROCESSES * cores} processes, and {cores} are fast"
            )
        return "cpu"
    if devices > gpus:
        raise UserError(
            f"torch sees {gpus} CUDA GPUs on this machine, {devices} asked for; use fewer, or"
            " --accelerator cpu"
        )
    _sum_in_fp32()
    return "gpu"


def _sum_in_fp32() -> None:
    """Stop torch from adding the parts of a split sum in half precision.

    An adapter's small change is part of such a sum (rwkv_miss/gemm.py), and would be rounded away.
    """
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def grow_segments() -> None:
    """Have torch grow its blocks of a GPU's memory, where it can: rows of many lengths leave fewer holes.

    Settings that the user has given to torch stay.
    """
    settings_of_user = getattr(torch._C, "_accelerator_getAllocatorSettings", str)
    for name in ("_accelerator_setAllocatorSettings", "_cuda_cudaCachingAllocator_set_allocator_settings"):
        if hasattr(torch._C, name) and not settings_of_user():
            getattr(torch._C, name)("expandable_segments:True")
            return


def choose_precision(choice: str, accelerator: str, strategy: str = "auto") -> tuple[str, str]:
    """Choose (fp32, bf16 or fp16; why).

    fp16 needs loss scaling, which DeepSpeed offers only in a mode that casts the adapter too.
    """
    if choice == "bf16" and accelerator == "cpu" and not multiplies_bf16():
        return choice, "as asked; this CPU has no products in it, and is slower than in fp32"
    if choice == "bf16" and accelerator == "gpu" and not gpu_has_bf16():
        return choice, "as asked; this GPU has no bf16, and is slower than in fp16"
    if choice != "auto":
        return choice, "as asked"
    if accelerator == "cpu":
        if multiplies_bf16():
            return "fp32", "auto: a CPU; --precision bf16 takes less memory, and may be faster"
        return "fp32", "auto: a CPU"
    if gpu_has_bf16():
        return "bf16", "auto: the GPU has bf16"
    if strategy.startswith("deepspeed"):
        return "fp32", "auto: the GPU has no bf16, and fp16 works with --strategy auto or ddp only"
    return "fp16", "auto: the GPU has no bf16"


def multiplies_bf16() -> bool:
    """Tell whether this CPU has instructions for products in bf16. Without them torch is faster in fp32."""
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(cpu_features().split())


def gpu_has_bf16() -> bool:
    """Tell whether the current GPU has instructions in bf16; torch emulates them on older ones."""
    return torch.cuda.is_bf16_supported(including_emulation=False)


def peak_memory(device: torch.device) -> int:
    """Return the most bytes of the GPU, or of main memory, that this process has held; 0 if unknown.

    Of main memory these are its private bytes, without mapped_files(). Linux only keeps the peak of both
    together. So what is mapped now is taken off; a file that was unmapped since the peak counts as private.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    now = status_bytes("/proc/self/status", "RssAnon")
    return max(status_bytes("/proc/self/status", "VmHWM") - mapped_files(), now)


def mapped_files() -> int:
    """Count the bytes of mapped files, such as libraries and the base, that are in main memory; 0 if unknown.

    Linux shares them between processes, and drops them when memory is scarce.
    """
    return status_bytes("/proc/self/status", "RssFile")


def cuda_of_driver() -> int:
    """Return the newest CUDA that the driver runs, 13000 for 13.0; 0 without a driver."""
    version = ctypes.c_int()
    with contextlib.suppress(OSError):
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return version.value


def driver_version() -> str | None:
    """Return the driver's version, "570.133.20", where nvidia-smi lists a GPU; else None."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        said = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout
        if found := re.match(r"\d+\.\d[\d.]*", said):
            return found[0]
    return None


def unseen_gpu() -> str:
    """Say why torch sees none of the GPUs that nvidia-smi lists, and what to do; "" if that is not so.

    A GPU that CUDA_VISIBLE_DEVICES hides is not missed.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") or torch.cuda.is_available():
        return ""
    if not (driver := driver_version()):
        return ""
    seen, major = (
        f"nvidia-smi lists a GPU that torch {torch.__version__} does not see",
        int(driver.split(".")[0]),
    )
    wheel = next((name for least, name in WHEELS.items() if major >= least), "")
    if not wheel:
        return (
            f"{seen}: driver {driver} is too old, {min(WHEELS)} or newer is needed; update the driver:"
            f" {driver_advice()}"
        )
    install = f"pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/{wheel}"
    if not torch.version.cuda:
        return f"{seen}: this torch is for CPUs: {install}"
    if int(torch.version.cuda.split(".")[0]) > int(wheel[2:4]):
        return f"{seen}: driver {driver} does not run torch's CUDA {torch.version.cuda}: {install}"
    fits = f"though driver {driver} runs CUDA {torch.version.cuda}"
    return f"{seen}, {fits}: look at nvidia-smi -L and CUDA_VISIBLE_DEVICES"


def driver_advice() -> str:
    """Tell how to install or update the driver of an NVIDIA GPU on this system."""
    if "microsoft" in platform.release().lower():
        return "in WSL the driver is that of Windows: install it there, and none here"
    return "on Ubuntu: sudo ubuntu-drivers install, then restart"


def cpu_features() -> str:
    """Return the CPU's features, on which code compiled with -march=native depends."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as info:
        return next((line for line in info if line.startswith(("flags", "Features"))), "")
    return platform.processor()
