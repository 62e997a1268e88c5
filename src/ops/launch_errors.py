"""Error codes with which CUDA refuses to start a kernel, in words: `require_started`."""

from __future__ import annotations

import torch

from ..common.device import driver_advice

UPDATE = "update the driver ({driver_advice})"
REBUILD = "delete the library (python -m scripts.doctor names it), and the next run builds it again"
RESTART = "this process can use the GPU no more: start it again"
# code -> (what it means, what to do), for problems of the machine
OF_THE_MACHINE = {
    2: (
        "the GPU's memory is full",
        "lower --micro_bsz or --ctx_len, or end other programs on it (nvidia-smi)",
    ),
    3: ("CUDA did not start", "a process that was forked after CUDA was used cannot use it: use spawn"),
    35: (
        "the driver is older than the CUDA that the kernels were built with",
        f"{UPDATE}, or build them with an older nvcc: python -m scripts.doctor says which fits",
    ),
    46: (
        "the GPU is in use by another process, and set to serve one only",
        "end that process, or sudo nvidia-smi -c DEFAULT",
    ),
    100: ("the driver sees no GPU", "look at CUDA_VISIBLE_DEVICES and nvidia-smi"),
    101: ("there is no GPU of this number", "look at CUDA_VISIBLE_DEVICES and --devices"),
    200: ("the library has no code that this GPU can load", REBUILD),
    209: ("the library has no code for this GPU's architecture", REBUILD),
    218: ("the driver cannot compile the library's code for this GPU", f"{UPDATE}, or {REBUILD}"),
    222: (
        "the library's code for this GPU is newer than the driver",
        f"{UPDATE}, or install an nvcc that knows this GPU",
    ),
    802: ("the GPU is not ready", "start the fabric manager: sudo systemctl start nvidia-fabricmanager"),
    803: ("the driver and its CUDA library are of different versions", f"restart the machine, or {UPDATE}"),
    804: ("CUDA's compatibility package does not serve this GPU", f"remove cuda-compat, or {UPDATE}"),
}
# and for problems of the kernels: they are wrong, or cannot do what they were asked for
OF_THE_KERNEL = {
    1: "an argument that the kernel does not take",
    98: "no such kernel in the library",
    700: "a kernel read or wrote where it must not",
    701: "more registers, threads or shared memory than the GPU has",
    702: "a kernel ran for longer than the system allows",
    715: "an instruction that the GPU does not have",
    716: "an address that is not a multiple of the access",
    719: "a kernel failed",
    900: "a call that a CUDA graph cannot record",
}


class LaunchError(RuntimeError):
    """Failure of a kernel to start, or of one before it. `of_the_machine`: the kernels are not to blame."""

    def __init__(self, op: str, code: int):
        self.of_the_machine = code in OF_THE_MACHINE
        if self.of_the_machine:
            meaning, help = OF_THE_MACHINE[code]
            help = help.replace("{driver_advice}", driver_advice())
        else:
            meaning = OF_THE_KERNEL.get(code, "a code without words here")
            help = "please report it with the output of python -m scripts.doctor, and use --wkv torch"
            if 700 <= code < 800:
                help = f"{RESTART}; {help}"
        super().__init__(
            f"{op}: a CUDA kernel did not start, error {code}: {meaning} (torch for CUDA"
            f" {torch.version.cuda}); {help}"
        )


def require_started(op: str, code: int) -> None:
    """Raise LaunchError if a function of the CUDA library returned something other than 0."""
    if code:
        raise LaunchError(op, code)
