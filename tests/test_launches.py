"""Cost of a run on a GPU without native kernels, and its messages."""

import dataclasses
import re
import types

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from src import ops
from src.config import Config
from src.ops import native
from src.ops.build import CUDA
from src.planning.launches import slow_line, wkv_launches
from src.planning.plan import Device

from .conftest import make_arch
from .test_wkv import both, make

# that start no kernel
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "detach", "_reshape_alias"}


class Launches(TorchDispatchMode):
    """Counts the operations that a GPU runs as a kernel: all but views."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        returns = [result.alias_info for result in function._schema.returns]
        view = any(alias is not None and not alias.is_write for alias in returns)
        self.count += not view and function.__name__.partition(".")[0] not in FREE
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("tokens", [50, 128, 512])
@both
def test_launches_of_wkv_in_plain_torch(version, tokens):
    x, _, _ = make(version, tokens, N=8)
    del x["s0"]
    leaves = {name: t.bfloat16().requires_grad_() for name, t in x.items()}
    with Launches() as seen:
        y, _ = {6: ops.wkv6, 7: ops.wkv7}[version](**leaves, kernel="torch")
        y.float().sum().backward()
    assert seen.count == pytest.approx(wkv_launches(version, tokens), rel=0.1)


def planned(config, arch, reason="as asked", kernel="torch"):
    """Make what slow_line() reads of a Plan."""
    device = Device(config.accelerator, "bf16", "", kernel, reason)
    rows = types.SimpleNamespace(lengths=[1024])
    return types.SimpleNamespace(settings=config, arch=arch, device=device, schedule=rows)


def test_a_run_without_native_kernels_says_what_it_costs():
    arch = make_arch(7, n_layer=24, n_embd=2048, head_size=64)
    config = Config(accelerator="gpu", micro_bsz=8, grad_cp=0, peft="miss")
    line = slow_line(planned(config, arch, "auto: the chunked form, because no nvcc: pip install it"))
    launches, times = re.search(
        r"starts ([\d,]+) kernels a micro-batch, .* at least ([\d.]+) times", line
    ).groups()
    assert int(launches.replace(",", "")) == 24 * wkv_launches(7, 1024)
    # 8192 tokens of 1.2e9 weights at 4 FLOP take 0.4 s at 100 TFLOP/s
    assert float(times) == pytest.approx(1 + int(launches.replace(",", "")) * 5e-6 / 0.396, rel=0.05)
    assert line.endswith("because no nvcc: pip install it") and line.startswith("slow       ")
    chunked = dataclasses.replace(config, chunk_ctx=256)
    assert f"{24 * 4 * wkv_launches(7, 256):,} kernels" in slow_line(planned(chunked, arch))
    assert slow_line(planned(config, arch, kernel="cuda")) == ""
    assert slow_line(planned(Config(accelerator="cpu"), arch)) == ""


def test_a_kernel_is_told_the_device_of_its_tensors(monkeypatch):
    """A device is a number and a current stream: a process may hold several GPUs."""
    streams = {index: types.SimpleNamespace(cuda_stream=100 + index) for index in (0, 1)}
    monkeypatch.setattr(native.torch.cuda, "current_stream", lambda device: streams[device.index])
    for index in streams:
        like = types.SimpleNamespace(is_cuda=True, device=native.torch.device("cuda", index))
        assert [one.value for one in native.context(like)] == [index, 100 + index]


def test_every_function_that_launches_sets_its_device():
    """A process may hold several GPUs, and an autograd thread has a current device of its own."""
    functions = [
        found.groups()
        for path in sorted(CUDA.glob("*.cu"))
        for found in re.finditer(r'extern "C" int (\w+)\(([^)]*)\) \{\n((?:.*\n){2})', path.read_text())
    ]
    assert {"wkv6_forward", "wkv7_chunked_backward", "dequantise_nf4"} <= {name for name, _, _ in functions}
    for name, arguments, start in functions:
        assert " ".join(arguments.split()).endswith("int dtype, int device, void* stream"), name
        assert start == "    OnDevice on(device);\n    if (on.error) return on.error;\n", name
