"""Launches of a GPU without native kernels: WKV in plain torch starts thousands of small kernels."""

from __future__ import annotations

from .plan import Plan

MICROSECONDS = 5.0  # for Python and torch to start one kernel
PRODUCTS = 1e14  # FLOP a second; an RTX 4090 does about this in half precision, an H100 several times it
# version -> tokens of a chunk; kernels that WKV of a layer starts, in all and for each chunk, as counted from
# ops.wkv6 and ops.wkv7 with kernel "torch" (a test counts again)
CHUNK = {6: 32, 7: 16}
FORWARD = {6: (89, 3), 7: (102, 5)}
BACKWARD = {6: (131, 8), 7: (100, 14)}


def wkv_launches(version: int, tokens: int, forwards: int = 1) -> int:
    """Count the kernels that WKV of a layer starts in plain torch for `tokens`, forward and backward."""
    chunks = -(-tokens // CHUNK[version])
    (first, each), (last, back) = FORWARD[version], BACKWARD[version]
    return forwards * (first + each * chunks) + last + back * chunks


def slow_line(plan: Plan) -> str:
    """Warn about a run on a GPU without native kernels; "" for any other run."""
    config, arch, device, tokens = plan.settings, plan.arch, plan.device, max(plan.schedule.lengths)
    if device.accelerator != "gpu" or device.kernel != "torch":
        return ""
    recomputed = config.grad_cp > 0
    part = min(tokens, config.chunk_ctx or tokens)
    launches = arch.n_layer * -(-tokens // part) * wkv_launches(arch.version, part, 1 + recomputed)
    # a layer has about 12 C^2 weights: forward and gradient of the input, and of the weights where all train
    products = 2 * (2 + recomputed + (config.peft == "none")) * 12 * arch.n_embd**2 * arch.n_layer
    times = 1 + launches * MICROSECONDS * 1e-6 / (products * config.micro_bsz * tokens / PRODUCTS)
    reason = device.kernel_reason
    help = reason.removeprefix("auto: ") if reason.startswith("auto: ") else "--wkv auto takes native ones"
    return (
        f"slow       no native kernels on the GPU: WKV starts {launches:,} kernels a micro-batch, at"
        f" {MICROSECONDS:g} us each a step takes at least {times:.2g} times as long (products at"
        f" {PRODUCTS / 1e12:.0f} TFLOP/s); {help}"
    )
