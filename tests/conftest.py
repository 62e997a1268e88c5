"""Small real files for every test: random non-degenerate checkpoints, and the goldens where they are at
hand.
"""

import contextlib
import functools
import importlib.util
import json
import os
import pathlib
import shutil
import signal
import sys

import pytest
import torch

import rwkv_miss
from rwkv_miss import UserError, merge_file, read_checkpoint, read_metadata
from rwkv_miss.files import mapped
from rwkv_miss.files.checkpoint import Arch, write_checkpoint
from src.config import Config, Settled
from src.model import RWKV
from src.model.rwkv import VERSIONS

ROOT = pathlib.Path(__file__).parent.parent

# small tensors: a second thread costs more than it brings, also in the processes that tests start
torch.set_num_threads(1)
# whoever starts the tests in the background has Ctrl-C ignored, and what tests start would inherit that
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture
def all_mapped(monkeypatch):
    """Small files are mapped, too, and those of this test are forgotten with it, whoever still holds them."""
    monkeypatch.setattr(mapped, "SMALL", 0)
    monkeypatch.setattr(mapped, "_mapped", [])


@pytest.fixture
def in_its_folder(tmp_path, monkeypatch):
    """The test runs in a folder of its own, tmp_path, so that a file is its name."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def browser():
    """The system's Chromium, driven by Playwright."""
    names = ("chromium", "chromium-browser", "google-chrome")
    if not (path := next(filter(None, map(shutil.which, names)), None)):
        pytest.skip("NO chromium ON PATH (apt-get install chromium): the page is not tested")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


def slow(*values):
    """Return a case of a parametrized test, marked slow."""
    return pytest.param(*values, marks=pytest.mark.slow)


def settled_config(**settings) -> Settled:
    """Settings as a plan leaves them: recomputation, rows of a micro-batch and the schedule are chosen."""
    return Config(**{"grad_cp": 0, "micro_bsz": 1, "lr_schedule": "cos"} | settings).settled()


def make_arch(version, n_layer=2, n_embd=48, head_size=16, vocab_size=67):
    dim_ffn, ranks = VERSIONS[version].default_sizes(n_embd)
    return Arch(
        version,
        vocab_size,
        n_embd,
        n_layer,
        n_embd // head_size,
        head_size,
        n_embd,
        dim_ffn,
        ranks,
        version == 7,
    )


def random_tensors(arch, dtype=torch.float32, seed=0):
    """A checkpoint in which no map is zero, no norm trivial and no vector constant: every part of the model
    shows in the logits.
    """
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


def save_base(path, version=7, dtype=torch.float32, seed=0, vocab_size=256, **sizes):
    """Save a random model over bytes as torch does."""
    torch.save(random_tensors(make_arch(version, vocab_size=vocab_size, **sizes), dtype, seed), path)


def write_rows(path, rows):
    """Write rows as JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_rows(path):
    """Read rows of JSONL."""
    return [json.loads(line) for line in path.read_text().splitlines()]


@contextlib.contextmanager
def unchanged(folder):
    """Check that the block changes no file of a folder."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    yield
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.fixture
def checkpoint(tmp_path):
    """checkpoint(version, dtype=..., **sizes) -> path of a random file."""

    def make(version, dtype=torch.float32, seed=0, name=None, **sizes):
        path = tmp_path / (name or f"v{version}-{seed}.pth")
        write_checkpoint(path, random_tensors(make_arch(version, **sizes), dtype, seed).items())
        return path

    return make


# for widths of 40, which ranks 7 and 3 do not divide
ADAPTER_OPTIONS = {
    "miss": {"rank": 7},
    "lora": {"rank": 3, "alpha": 5.0},
    "dora": {"rank": 3},
    "bat": {"rank": 8},
    "pissa": {"rank": 3},
}


def bat_delta(weight, bat, rank):
    """Bat's formula, square by square."""
    result = torch.empty_like(weight)
    for a in range(weight.shape[0] // rank):
        for b in range(weight.shape[1] // rank):
            place = slice(a * rank, a * rank + rank), slice(b * rank, b * rank + rank)
            result[place] = weight[place] @ bat[a] + bat[a]
    return result


class MergingFiles:
    """A base and its adapters in a folder, of random numbers; what merges them, and what they come to."""

    def __init__(self, folder):
        self.folder = folder

    def __call__(self, version=7, dtype=torch.float32, **metadata):
        self.tensors = random_tensors(make_arch(version, n_embd=40, head_size=8), dtype)
        write_checkpoint(self.folder / "base.pth", self.tensors.items(), metadata or None)
        return self.folder

    def adapter(self, name, method="miss", seed=1, std=1e-2, targets=None, parts="", **metadata):
        model = RWKV.load(self.folder / "base.pth", torch.float32)
        rwkv_miss.inject(model, method, targets, parts, **ADAPTER_OPTIONS.get(method, {}))
        torch.manual_seed(seed)
        for p in model.parameters():
            if p.requires_grad:
                p.data += std * torch.randn_like(p)
        rwkv_miss.save_adapter(model, self.folder / name, **metadata)
        return self.folder / name

    def delta(self, name, linear):
        """The papers' formulas in float64, (out, in)."""
        stored = read_checkpoint(self.folder / name)
        t = {key.removeprefix(f"{linear}."): value.double() for key, value in stored.items()}
        options, method = (read_metadata(self.folder / name)[key] for key in ("options", "method"))
        weight = self.tensors[f"{linear}.weight"].double()
        if method == "miss":
            return t["miss"].t()[:, [i % options["rank"] for i in range(weight.shape[1])]]
        if method == "bat":
            return bat_delta(weight, t["bat"], options["rank"])
        if method == "pissa":
            return t["lora_B"] @ t["lora_A"] - t["initial_B"] @ t["initial_A"]
        low_rank = options["alpha"] / options["rank"] * (t["lora_B"] @ t["lora_A"])
        if method == "lora":
            return low_rank
        V = weight + low_rank
        return t["magnitude"].unsqueeze(1) * V / V.norm(dim=1, keepdim=True) - weight

    def merge(self, adapters, weights=None, dtype="base", out="merged.pth", **options):
        return merge_file(
            self.folder / "base.pth",
            [self.folder / name for name in adapters],
            self.folder / out,
            dtype,
            weights=weights,
            **options,
        )

    def refused(self, words, *args, **options):
        with unchanged(self.folder), pytest.raises(UserError, match=words):
            self.merge(*args, **options)


@pytest.fixture
def plotted(monkeypatch):
    """{label: the line} of all that is plotted."""
    from matplotlib.axes import Axes

    lines, plot = {}, Axes.plot

    def noted(self, *args, **options):
        [lines[options["label"]]] = found = plot(self, *args, **options)
        return found

    monkeypatch.setattr(Axes, "plot", noted)
    return lines


@pytest.fixture
def merging(tmp_path):
    """merging(version, dtype) makes base.pth in merging.folder; merging.adapter(name, method, ...) an adapter
    of it, of random numbers.
    """
    return MergingFiles(tmp_path)


def close(name, got, want, ratio):
    """The largest error against the largest value; NaN fails, because nan < x is False."""
    got, want = got.detach().double(), want.detach().double()
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    error = (got - want).abs().max() / want.abs().max().clamp(min=1e-30)
    assert error < ratio, f"{name}: relative error {error:.2e}, allowed {ratio:.0e}"


@functools.cache
def rwkv_package(version):
    """The class of the PyPI package `rwkv` for a version. The package chooses it by the environment when it
    is imported, so it is loaded once for each version, under two names.
    """
    found = importlib.util.find_spec("rwkv")
    if found is None:
        pytest.skip("the test extra is absent: pip install rwkv")
    os.environ |= {"RWKV_V7_ON": str(int(version == 7)), "RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0"}
    spec = importlib.util.spec_from_file_location(
        f"rwkv_model_v{version}", pathlib.Path(found.origin).parent / "model.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.RWKV


def pypi_rwkv(path):
    """The file under the PyPI package `rwkv`, fp32 on the CPU: run(ids, state=None) -> (logits (T, V), state
    list).
    """
    version = Arch.detect(torch.load(path, weights_only=True)).version
    model = rwkv_package(version)(
        str(path).removesuffix(".pth"), "cpu fp32", **({} if version == 7 else {"verbose": False})
    )

    @torch.no_grad()
    def run(ids, state=None):
        if state is None and version == 7:
            state = model.generate_zero_state()
        ids = list(ids)
        tokens = ids[0] if version == 7 and len(ids) == 1 else ids
        logits, state = model.forward(tokens, state, full_output=True)
        return logits.reshape(len(ids), -1), state

    return run
