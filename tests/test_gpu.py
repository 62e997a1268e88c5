"""Tests that need an NVIDIA GPU: the CUDA kernels where torch runs them, and training, merging and answering
on the GPU. scripts/gpu_check.sh.
"""

import json
import subprocess
import sys

import pytest
import torch

from rwkv_miss import load_adapter
from rwkv_miss.quantised import CODES, dense, expand, quantise
from src import ops
from src.inference.adapters import Applied
from src.inference.decoders import fastest
from src.model import RWKV
from src.ops import self_test

from .conftest import ROOT, close
from .test_wkv import DW_TOLERANCE, TOLERANCE, both, documents, make, results

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="NO GPU: nothing here was run"),
]


def on_gpu(x):
    return {name: t.cuda() for name, t in x.items()}


@pytest.mark.parametrize("T, N", [(1, 8), (17, 16), (37, 64), (129, 64), (20, 128)])
@both
def test_exact_kernels(version, T, N):
    x, dy, dsT = make(version, T, N=N, dtype=torch.float64)
    reset = documents(2, T)
    want = results(version, x, dy, dsT, "reference", reset)
    x = {name: t.float() for name, t in x.items()}
    for kernel in ("cuda", "cuda-exact"):  # in fp32 both are the recurrence
        got = results(version, on_gpu(x), dy.float().cuda(), dsT.float().cuda(), kernel, reset.cuda())
        for name, t in want.items():
            close(f"{kernel} {name}", got[name].cpu(), t, DW_TOLERANCE if name == "dw" else TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", ["cuda", "cuda-exact"])
@both
def test_half_precision(version, kernel, dtype):
    """Within 1e-2 (rms) of float64 on the same inputs: the goal for tensor cores. The recurrence only rounds
    its outputs.
    """
    x, dy, dsT = make(version, 100, N=64)
    x = {name: t if name == "s0" else t.to(dtype) for name, t in x.items()}
    reset = documents(2, 100)
    want = results(
        version,
        {name: t.double() for name, t in x.items()},
        dy.to(dtype).double(),
        dsT.double(),
        "reference",
        reset,
    )
    got = results(version, on_gpu(x), dy.to(dtype).cuda(), dsT.cuda(), kernel, reset.cuda())
    for name, t in want.items():
        error = ((got[name].cpu().double() - t).norm() / t.norm()).item()
        assert error < (1e-2 if kernel == "cuda" else 4e-3), f"{name}: {error:.1e}"


@both
def test_the_model_is_the_same_on_both_devices(version, checkpoint):
    path = checkpoint(version)
    ids = torch.randint(67, (2, 37), generator=torch.Generator().manual_seed(1))
    want, state = RWKV.load(path)(ids)
    kernel, _ = ops.choose("auto", "cuda", 16)
    got, got_state = RWKV.load(path, device="cuda", kernel=kernel)(ids.cuda())
    close("logits", got.cpu(), want, 1e-4)
    for layer, other in zip(state, got_state, strict=True):
        close("state", other.wkv.cpu(), layer.wkv, 1e-4)


@both
def test_tokens_of_a_cuda_graph_are_the_models(version, checkpoint):
    model = RWKV.load(
        checkpoint(version, n_layer=3, n_embd=64, head_size=64), device="cuda", kernel="cuda"
    ).eval()
    decoder, how = fastest(model)
    assert how == "one CUDA graph a token"
    ids = torch.arange(9, device="cuda")[None] % 60
    _, state = model.next_logits(ids)
    decoder.put(0, state)
    for token in (5, 17, 5):
        step = torch.tensor([[token]], device="cuda")
        want, state = model.next_logits(step, state)
        got = decoder.step([token], [Applied()])
        close("logits", got, want, 1e-4)


@pytest.mark.parametrize("kind", CODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantised_weights_are_expanded_to_the_same_numbers(kind, dtype):
    assert self_test.status("cuda").passed
    for shape in [(5, 131), (300, 1024), (3, 64)]:
        quantised = quantise(torch.randn(shape), kind)
        assert torch.equal(dense(quantised.cuda(), shape[1], dtype).cpu(), expand(quantised, shape[1], dtype))


BASE = ROOT / "demo/rwkv7-reverse.pth"
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="ONE GPU: nothing was run on two")


@pytest.fixture
def train(tmp_path):
    """train(name, flags...) -> (losses of 20 steps with MiSS, what was printed)."""
    data = tmp_path / "data.jsonl"
    words = ("kitchen", "house", "garden", "letter")
    data.write_text("\n".join(json.dumps({"text": f"sort {w}: {''.join(sorted(w))}"}) for w in words))

    def run(name, *flags):
        command = ["train.py", "--load_model", BASE, "--data_file", data, "--proj_dir", tmp_path / name]
        command += ["--peft_config", "r=8", "--lr_init", "5e-3", "--epoch_steps", "20", "--verbose", *flags]
        command = [sys.executable, *map(str, command)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines], done.stdout

    return run


@pytest.mark.parametrize(
    "strategy, quant",
    [("auto", "none"), ("deepspeed_stage_2", "none"), ("auto", "nf4"), ("deepspeed_stage_2", "int8")],
)
def test_a_run_on_the_gpu(train, strategy, quant, tmp_path):
    """Training with the defaults of a GPU, then the adapter on the CPU: the loss falls, and the file does not
    know where it was made.
    """
    losses, output = train("run", "--accelerator", "gpu", "--strategy", strategy, "--quant", quant)
    assert "device     gpu" in output and "kernel     wkv cuda" in output, output
    assert losses[-1] < 0.7 * losses[0], losses
    model = RWKV.load(BASE)
    load_adapter(model, tmp_path / "run/adapter.pth")
    assert model(torch.tensor([[1, 2, 3]]))[0].isfinite().all()


def test_a_run_on_the_gpu_has_the_losses_of_one_on_the_cpu(train):
    """In fp32. On a CPU the native kernels and plain torch are 1e-5 apart in these 20 steps. The GPU adds
    everything up in another order, for which 30 times that is allowed.
    """
    want, _ = train("cpu", "--accelerator", "cpu", "--precision", "fp32")
    got, _ = train("gpu", "--accelerator", "gpu", "--precision", "fp32")
    for step, (a, b) in enumerate(zip(got, want, strict=True)):
        assert abs(a - b) <= 3e-4 * b, f"step {step}: {a} on the GPU, {b} on the CPU"


def test_a_chat_on_the_gpu_answers_as_one_on_the_cpu():
    """With tokens of a CUDA graph."""
    command = ["-m", "demo.chat", "--model", str(BASE), "--temperature", "0", "--prompt", "reverse kitchen"]
    answers = [
        subprocess.run([sys.executable, *command, "--accelerator", device], cwd=ROOT, capture_output=True)
        for device in ("cpu", "gpu")
    ]
    assert not answers[1].returncode, answers[1].stderr.decode()
    assert answers[0].stdout == answers[1].stdout == b"nehctik\n"


@two_gpus
@both
def test_kernels_run_on_the_gpu_of_their_tensors(version):
    x, dy, dsT = make(version, 37, N=64)
    there = {name: t.cuda(1) for name, t in x.items()}
    want = results(version, on_gpu(x), dy.cuda(), dsT.cuda(), "cuda", None)
    got = results(version, there, dy.cuda(1), dsT.cuda(1), "cuda", None)
    assert torch.cuda.current_device() == 0
    for name, t in want.items():
        assert got[name].device.index == 1 and torch.equal(got[name].cpu(), t.cpu()), name


@two_gpus
@pytest.mark.parametrize("strategy", ["auto", "deepspeed_stage_2", "deepspeed_stage_3"])
def test_two_gpus_train_as_one(train, strategy):
    """Two GPUs share the rows of a step: only the order of the sums differs, as above."""
    precision = ["--accelerator", "gpu", "--precision", "fp32"]
    want, _ = train("one", *precision, "--micro_bsz", "4")
    got, _ = train("two", *precision, "--micro_bsz", "2", "--devices", "2", "--strategy", strategy)
    for step, (a, b) in enumerate(zip(got, want, strict=True)):
        assert abs(a - b) <= 3e-4 * b, f"step {step}: {a} on two GPUs, {b} on one"
