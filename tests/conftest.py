"""Small real files for every test: random non-degenerate checkpoints, and the goldens where they are at hand."""

import ctypes
import functools
import importlib.util
import os
import pathlib
import shutil
import signal
import sys

import pytest
import torch

from rwkv_miss.checkpoint import Arch, write_checkpoint
from src.model import RWKV, VERSIONS
from src.ops import build

ROOT = pathlib.Path(__file__).parent.parent
DATA = ROOT.parent / "shared" / "data"

# small tensors: a second thread costs more than it brings, also in the processes that tests start
torch.set_num_threads(1)
# whoever starts the tests in the background has Ctrl-C ignored, and what tests start would inherit that
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_report_header(config):
    return f"golden files: {DATA}" if DATA.is_dir() else "GOLDEN FILES ABSENT (../shared/data): the tests that need them are skipped"


def pytest_terminal_summary(terminalreporter):
    """The tables that tests recorded: what a worker prints is not shown."""
    for report in terminalreporter.getreports("passed"):
        for table in (value for name, value in report.user_properties if name == "table"):
            terminalreporter.write_line(f"\n{report.nodeid}\n{table}")


@pytest.fixture(scope="session")
def data_dir():
    """../shared/data, or a loud skip."""
    if not DATA.is_dir():
        pytest.skip("GOLDEN FILES ABSENT: no ../shared/data beside the checkout")
    return DATA


@pytest.fixture(scope="session")
def libraries():
    """version -> cuda/*.cu, all in one library, compiled by g++ to run on the CPU (see cuda/emulate.h)."""
    if not shutil.which("g++"):
        pytest.skip("NO g++ ON PATH: the CUDA kernels are not tested")
    command = [shutil.which("g++"), "-x", "c++", "-std=c++17", "-O2", "-march=native", "-fopenmp", "-fPIC"]
    sources = sorted(build.CUDA.glob("*.cu"))
    path = build.build("wkv_emulated", "the CUDA kernels for the CPU", 20, sources, build.headers(), command, ["-fopenmp"], build.cpu_features())
    library = ctypes.CDLL(str(path))
    for op in ("wkv6", "wkv7", "wkv6_chunked", "wkv7_chunked"):
        for size in ("saved", "scratch"):
            if (op, size) != ("wkv6", "saved"):
                getattr(library, f"{op}_{size}").restype = ctypes.c_int64
    return {6: library, 7: library}


def make_arch(version, n_layer=2, n_embd=48, head_size=16, vocab_size=67):
    dim_ffn, ranks = VERSIONS[version].default_sizes(n_embd)
    return Arch(version, vocab_size, n_embd, n_layer, n_embd // head_size, head_size, n_embd, dim_ffn, ranks, version == 7)


def random_tensors(arch, dtype=torch.float32, seed=0):
    """A checkpoint in which no map is zero, no norm trivial and no vector constant: every part of the model shows in the logits."""
    torch.manual_seed(seed)
    tensors = {}
    for name, p in RWKV(arch).state_dict().items():
        noise = torch.randn(p.shape)
        if name == "emb.weight":
            p = noise
        elif p.squeeze().dim() >= 2 and name.endswith(".weight"):
            p = noise / p.shape[-1] ** 0.5
        elif p.squeeze().dim() >= 2:
            p = p + 0.1 * noise
        else:
            p = p + 0.05 * noise
        tensors[name] = p.to(dtype)
    return tensors


@pytest.fixture
def checkpoint(tmp_path):
    """checkpoint(version, dtype=..., **sizes) -> path of a random file."""

    def make(version, dtype=torch.float32, seed=0, name=None, **sizes):
        path = tmp_path / (name or f"v{version}-{seed}.pth")
        write_checkpoint(path, random_tensors(make_arch(version, **sizes), dtype, seed).items())
        return path

    return make


def close(name, got, want, ratio):
    """The largest error against the largest value; NaN fails, because nan < x is False."""
    got, want = got.detach().double(), want.detach().double()
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    error = (got - want).abs().max() / want.abs().max().clamp(min=1e-30)
    assert error < ratio, f"{name}: relative error {error:.2e}, allowed {ratio:.0e}"


@functools.cache
def rwkv_package(version):
    """The class of the PyPI package `rwkv` for a version. The package chooses it by the environment when it is imported, so it is
    loaded once for each version, under two names."""
    found = importlib.util.find_spec("rwkv")
    if found is None:
        pytest.skip("the test extra is absent: pip install rwkv")
    os.environ |= {"RWKV_V7_ON": str(int(version == 7)), "RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"}
    spec = importlib.util.spec_from_file_location(f"rwkv_model_v{version}", pathlib.Path(found.origin).parent / "model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.RWKV


def pypi_rwkv(path):
    """The file under the PyPI package `rwkv`, fp32 on the CPU: run(ids, state=None) -> (logits (T, V), state list)."""
    version = Arch.detect(torch.load(path, weights_only=True)).version
    model = rwkv_package(version)(str(path).removesuffix(".pth"), "cpu fp32", **({} if version == 7 else {"verbose": False}))

    @torch.no_grad()
    def run(ids, state=None):
        if state is None and version == 7:
            state = model.generate_zero_state()
        ids = list(ids)
        logits, state = model.forward(ids if len(ids) > 1 else ids[0] if version == 7 else ids, state, full_output=True)
        return logits.reshape(len(ids), -1), state

    return run
