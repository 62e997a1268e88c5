"""train.py on "cuda" makes the CPU's steps: a stub of a card whose tensors have numbers (fake_gpu/).

Its operators are torch's for a CPU. Our kernels are the PTX of cuda/*.cu, executed by ptx/, behind
their own Python.
"""

import functools
import json

import pytest
import torch

import rwkv_miss
from rwkv_miss import read_checkpoint
from tests import program
from tests.conftest import make_arch, random_tensors, slow
from tests.program import flags_of, lines, same_adapters, same_lines, succeed, write_data
from tests.test_grpo_run import REWARDS
from tests.test_live_adapters import train

from .fake_gpu import stub
from .fake_gpu.on_cuda import write_answers
from .fake_gpu.serve import Gpu

GRPO = """
    --data_file {files}/questions.jsonl --eval_file {files}/held-questions.jsonl --eval_docs 3
    --eval_samples 0 --packing 1 --epoch_steps 4 --loss grpo --rewards low=1 --reward_file {files}/judge.py
    --group_size 3 --max_tokens 5 --adam_eps 1e-3 --beta 0.1 --inner_steps 2 --micro_bsz 6
"""
# flags of a run, in addition to those that all have
RUNS = {
    "miss": "",
    "lora, held-out": "--peft lora --eval_file {files}/held-rows.jsonl --eval_steps 1 --eval_samples 3",
    "dora, packed": "--peft dora --packing 1 --ctx_len 60 --grad_cp 2",
    "none": "--peft none",
    "parts": "--train_parts time,ln,emb,head --adam_eps 1e-2",
    "state": "--peft state --packing 1 --ctx_len 60",
    "nf4": "--quant nf4",
    "int8, chunks": "--quant int8 --chunk_ctx 24 --state_cp 1",
    "packed": "--packing 1 --ctx_len 60 --grad_cp 2",
    "nf4, dpo": """
        --quant nf4 --loss dpo --data_file {files}/pairs.jsonl
        --eval_file {files}/held-pairs.jsonl --eval_docs 5 --eval_samples 0
    """,
    "grpo": GRPO,
    "ddp": "--devices 2 --strategy ddp",
    "ZeRO 2": "--devices 2 --strategy deepspeed_stage_2",
}
CASES = [*(f"{name} v7" for name in RUNS if name not in ("nf4", "packed")), "miss v6", "packed v6"]
HALF = ["miss v6 bf16", "nf4 v6 bf16", "miss v7 bf16", "miss v7 fp16"]
FAST = ("miss v7", "packed v6", "nf4 v6 bf16")


def each(names):
    return pytest.mark.parametrize("case", [name if name in FAST else slow(name) for name in names])


@pytest.fixture(scope="module")
def gpu(tmp_path_factory):
    """The card."""
    try:
        started = Gpu(tmp_path_factory.mktemp("gpu") / "log")
    except stub.Unavailable as reason:
        pytest.skip(f"RUNS ON A GPU ARE NOT TESTED: {reason}")
    yield started
    started.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """files(version, head size) -> the folder of a random base over bytes, four adapters of it, and data."""

    @functools.cache
    def made(version, head_size=32):
        folder = tmp_path_factory.mktemp(f"v{version}-{head_size}")
        arch = make_arch(version, vocab_size=256, n_embd=2 * head_size, head_size=head_size)
        torch.save(random_tensors(arch), folder / "base.pth")
        write_data(folder)
        (folder / "judge.py").write_text(REWARDS)
        for seed, (method, rank) in enumerate((("miss", 8), ("miss", 4), ("lora", 8), ("pissa", 4))):
            train(folder / "base.pth", folder / f"adapter-{seed}.pth", method, seed, rank=rank)
        return folder

    return made


def test_the_device_is_as_a_card_is(gpu):
    succeed(gpu("work", "check_device"))


def flags_for(folder, proj_dir, case, *flags):
    common = "--lr_schedule constant --lr_init 3e-3 --adam_eps 1e-4 --epoch_steps 2 --micro_bsz 2"
    return flags_of(folder, proj_dir, *common.split(), *RUNS[case].format(files=folder).split(), *flags)


def trained(case):
    return "model.pth" if case == "none" else "adapter.pth"


def same_runs(ours, theirs, case):
    """Losses, metrics and what is trained, in fp32; words of answers and samples are equal."""
    for file in ("metrics.jsonl", "validation.jsonl"):
        if (theirs / file).exists():
            found, expected = lines(ours, file), lines(theirs, file)
            for line, other in zip(found, expected, strict=True):
                for words in ("answers", "samples"):
                    assert line.pop(words, None) == other.pop(words, None)
                if abs(other.get("margin", 1)) < 1e-5:  # signs of rounding: this policy is its reference
                    del line["reward_accuracy"], other["reward_accuracy"]
            same_lines(found, expected)
    same_adapters(ours, theirs, name=trained(case))


@each(CASES)
def test_a_run_in_fp32_is_the_cpus(gpu, files, tmp_path, case):
    case, folder = case[:-3], files(int(case[-1]))
    ours, theirs = tmp_path / "gpu", tmp_path / "cpu"
    succeed(gpu("train", flags_for(folder, ours, case, "--accelerator", "gpu", "--precision", "fp32")))
    succeed(program.run(flags_for(folder, theirs, case)))
    same_runs(ours, theirs, case)


@each(HALF)
def test_a_run_in_half_precision_is_off_by_its_rounding(gpu, files, tmp_path, case):
    """Trained tensors are as far from fp32's as the CPU's in this precision, losses to the rounding of bf16.

    In fp16 it may be twice as far: tensor cores multiply in bf16, and the CPU's recurrence is in fp32.
    """
    name, version, precision = case.rsplit(maxsplit=2)
    folder, off, losses = files(int(version[1:]), 64), {}, {}
    for run, flags in {
        "exact": [],
        "cpu": ["--precision", precision],
        "gpu": ["--precision", precision, "--accelerator", "gpu"],
    }.items():
        given = flags_for(folder, tmp_path / run, name, *flags)
        succeed(gpu("train", given) if run == "gpu" else program.run(given))
        losses[run] = program.losses(tmp_path / run)
        found, exact = (read_checkpoint(tmp_path / at / trained(name)) for at in (run, "exact"))
        off[run] = sum((found[key].double() - exact[key].double()).square().sum() for key in exact).sqrt()
    allowed = 2 if precision == "fp16" else 1.25
    assert 0 < off["gpu"] <= allowed * off["cpu"], off
    assert losses["gpu"] == pytest.approx(losses["exact"], rel=2**-8)


@pytest.mark.parametrize("place", ["forward", slow("backward"), slow("optimizer")])
def test_a_run_whose_first_step_does_not_fit_takes_half_the_micro_batch(gpu, files, tmp_path, place):
    """The run then equals one that was started with this micro-batch."""
    folder, ours, theirs = files(7), tmp_path / "gpu", tmp_path / "cpu"
    flags = flags_for(folder, ours, "miss", "--accelerator", "gpu", "--precision", "fp32")
    output = succeed(gpu("train_out_of_memory", flags, place, 1))
    assert "micro_bsz 1 and accumulate_grad_batches 2 in place of 2 and 1" in output
    halved = ["--micro_bsz", "1", "--accumulate_grad_batches", "2"]
    succeed(program.run(flags_for(folder, theirs, "miss", *halved)))
    same_runs(ours, theirs, "miss")


LONGER = "--epoch_steps 5 --save_steps 2".split()


@pytest.mark.slow
@pytest.mark.parametrize("first", ["gpu", "cpu"])
def test_a_stopped_run_goes_on(gpu, files, tmp_path, first):
    """On the card, also where a CPU began it: as the CPU's run that was not stopped."""
    folder, ours, theirs = files(7), tmp_path / "stopped", tmp_path / "whole"
    flags = {
        device: flags_for(folder, ours, "miss", *LONGER, "--accelerator", device) for device in ("cpu", "gpu")
    }
    stop = "checkpoints/step-00000002"
    if first == "gpu":
        code, output = gpu("train", [*flags["gpu"], "--precision", "fp32"], stop)
    else:
        code, output = program.run(flags["cpu"], program.at_file(stop, 1, ours, program.interrupt))
    assert code == 130, output
    output = succeed(gpu("train", [*flags["gpu"], "--precision", "fp32", "--resume", "auto"]))
    assert "step-00000003.pth; the weights, the optimizer" in output
    succeed(program.run(flags_for(folder, theirs, "miss", *LONGER)))
    same_runs(ours, theirs, "miss")


@pytest.mark.parametrize("version", [slow(6), 7])
def test_the_engine_answers_as_on_the_cpu(gpu, files, tmp_path, version):
    """With four adapters and graphs, which read the memory that they were recorded with."""
    folder = files(version)
    succeed(gpu("work", "write_answers", "gpu", folder, tmp_path / "gpu"))
    write_answers("cpu", folder, tmp_path / "cpu")
    ours, theirs = (json.loads((tmp_path / device).read_text()) for device in ("gpu", "cpu"))
    assert ours["how"] == "one CUDA graph a token" and len(ours["graphs"]) > 4
    for answer, other in zip(ours["said"].values(), theirs["said"].values(), strict=True):
        assert answer["tokens"] == other["tokens"]
        assert answer["ln p"] == pytest.approx(other["ln p"], abs=1e-4)


def test_a_chat_answers_as_on_the_cpu(gpu, files, tmp_path):
    """The trained adapter answers live on its base, and merged."""
    folder, merged = files(7), tmp_path / "merged.pth"
    learnt = "--epoch_steps 60 --lr_init 2e-2 --micro_bsz 8".split()
    succeed(program.run(flags_for(folder, tmp_path, "miss", *learnt)))
    base, adapter = folder / "base.pth", tmp_path / "adapter.pth"
    rwkv_miss.merge_file(base, adapter, merged)
    for files in ([base, "--adapter", adapter], [merged]):
        words = ["-m", "demo.chat", "--model", *map(str, files), *CHAT.split()]
        ours = succeed(gpu("call", [*words, "--accelerator", "gpu", "--precision", "fp32"]))
        assert ours == succeed(program.call([*words, "--accelerator", "cpu"]))
        assert ours.startswith("ab cab c"), ours


CHAT = "--tokenizer bytes --prompt qqq --max_tokens 12 --temperature 0"
