"""RWKV-LM's WKV kernels, built from a checkout of it, for benchmarks.ops to compare with ours.

RWKV-LM's .cu files are compiled unchanged, followed by a function of ours with a C interface, so that no
header of torch is needed. The kernels take bf16, head size 64, and a number of tokens that is a multiple of
16.
"""

from __future__ import annotations

import ctypes
import pathlib
from collections.abc import Callable

import torch
from torch import Tensor

from src.ops import build, toolchain
from src.ops.native import architectures

HEAD, CHUNK = 64, 16
# name -> (file, ending of its functions' names)
V7 = {
    "RWKV-LM": ("RWKV-v7/train_temp/cuda/rwkv7_clampw.cu", ""),
    "RWKV-LM, H100": ("RWKV-v7/train_temp/cuda/rwkv7_clampw_v3_for_h100.cu", "_v3"),
}
V6 = "RWKV-v5/cuda/wkv6_cuda.cu"
# RWKV-LM's v6 file uses torch's name for bf16; CUDA's own type can stand for it
ATEN = "#pragma once\n#include <cuda_bf16.h>\nnamespace at { typedef __nv_bfloat16 BFloat16; }\n"


def peers(root: pathlib.Path, tokens: int) -> dict[int, dict[str, Callable]]:
    """Map version -> name -> a function that takes our arguments, for the files in the checkout."""
    found: dict[int, dict[str, Callable]] = {6: {}, 7: {}}
    for name, (file, suffix) in V7.items():
        if (root / file).exists():
            found[7][name] = wkv7(compiled(root / file, BEHIND[7].format(suffix=suffix), []))
    if (root / V6).exists():
        found[6]["RWKV-LM"] = wkv6(compiled(root / V6, BEHIND[6], [f"-D_T_={tokens}"]))
    return found


# version -> C interface that is appended to a file; `p` are the tensors in the order of its functions
BEHIND = {
    7: """
extern "C" void forward(int B, int T, int H, void** p) {{
    auto f = (float**)p;
    auto x = (bf**)p;
    cuda_forward{suffix}(B, T, H, x[0], x[1], x[2], x[3], x[4], x[5], x[6], f[7], f[8]);
}}
extern "C" void backward(int B, int T, int H, void** p) {{
    auto f = (float**)p;
    auto x = (bf**)p;
    cuda_backward{suffix}(B, T, H, x[0], x[1], x[2], x[3], x[4], x[5], x[6], f[7], f[8], x[9], x[10], x[11],
        x[12], x[13], x[14]);
}}
""",
    6: """
extern "C" void forward(int B, int T, int H, void** p) {
    auto x = (bf16**)p;
    cuda_forward(B, T, H * _N_, H, x[0], x[1], x[2], (float*)p[3], x[4], x[5]);
}
extern "C" void backward(int B, int T, int H, void** p) {
    auto x = (bf16**)p;
    cuda_backward(B, T, H * _N_, H, x[0], x[1], x[2], (float*)p[3], x[4], x[5], x[6], x[7], x[8], x[9],
        x[10]);
}
""",
}


def compiled(
    file: pathlib.Path, behind: str, flags: list[str], cards: list[str] | None = None
) -> ctypes.CDLL:
    """Build a library of the file and the appended code, for the GPUs at hand."""
    folder = toolchain.cache_folder() / "rwkv-lm"
    (folder / "ATen").mkdir(parents=True, exist_ok=True)
    (folder / "ATen/ATen.h").write_text(ATEN)
    source = folder / f"{file.stem}.cu"
    source.write_text(f'#include "{file}"\n{behind}')
    nvcc = toolchain.find_nvcc()
    known = toolchain.ask(nvcc.path).architectures
    command = [nvcc.path, "-ccbin", toolchain.find_cxx(), "-std=c++17", "-O3", "--use_fast_math"]
    command += ["-Xcompiler", "-fPIC", f"-D_N_={HEAD}", f"-D_CHUNK_LEN_={CHUNK}", f"-I{folder}", *flags]
    command += [*toolchain.code_for(cards or architectures(), known), *nvcc.compile_flags]
    link = ["-cudart", "static", *nvcc.link_flags]
    title = f"{file.name} of RWKV-LM"
    return ctypes.CDLL(str(build.build(file.stem, title, 20, [source], [file], command, link)))


def call(function, like: Tensor, *tensors: Tensor) -> None:
    """Call a function on torch's default stream, the only one that these kernels use."""
    B, T, H, _ = like.shape
    function(B, T, H, (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors)))


def wkv7(library: ctypes.CDLL) -> Callable:
    class Wkv7(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            B, T, H, N = inputs[0].shape
            y, sa = torch.empty_like(inputs[0]), torch.empty_like(inputs[0], dtype=torch.float32)
            states = sa.new_empty(B, H, T // CHUNK, N, N)
            call(library.forward, y, *inputs, y, states, sa)
            ctx.save_for_backward(*inputs, states, sa)
            return y

        @staticmethod
        def backward(ctx, dy):
            *inputs, states, sa = ctx.saved_tensors
            gradients = [torch.empty_like(x) for x in inputs]
            call(library.backward, dy, *inputs, dy.contiguous(), states, sa, *gradients)
            return tuple(gradients)

    return Wkv7.apply


def wkv6(library: ctypes.CDLL) -> Callable:
    """Make the operator: the decay is -exp(w) in fp32, and the backward returns w's gradient."""

    class Wkv6(torch.autograd.Function):
        @staticmethod
        def forward(ctx, r, k, v, w, u):
            y, decay = torch.empty_like(r), -torch.exp(w.float())
            call(library.forward, y, r, k, v, decay, u, y)
            ctx.save_for_backward(r, k, v, decay, u)
            return y

        @staticmethod
        def backward(ctx, dy):
            r, k, v, decay, u = ctx.saved_tensors
            dr, dk, dv, dw = (torch.empty_like(r) for _ in range(4))
            du = r.new_empty(len(r), *u.shape)
            call(library.backward, dy, r, k, v, decay, u, dy.contiguous(), dr, dk, dv, dw, du)
            return dr, dk, dv, dw, du.sum(0)

    return Wkv6.apply
