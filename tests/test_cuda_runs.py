"""train.py on "cuda" makes the CPU's steps: a stub of a card whose tensors have numbers (tests/fake_gpu).

Its operators are torch's for a CPU. Our kernels are cuda/*.cu, compiled for a CPU, behind their own Python.
"""

import json

import pytest
import torch

from . import program
from .conftest import make_arch, random_tensors, slow
from .fake_gpu import stub
from .fake_gpu.serve import Gpu
from .program import flags_of, lines, same_adapters, same_lines, succeed

FP32 = {
    "miss v7": "",
    "miss v6": "",
}
FAST = ("miss v7", "miss v6")


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
    """version -> the folder of a random base over bytes, and 16 conversations of unequal lengths."""
    folders = {}
    for version in (6, 7):
        folders[version] = folder = tmp_path_factory.mktemp(f"v{version}")
        arch = make_arch(version, vocab_size=256, n_embd=128, head_size=64)
        torch.save(random_tensors(arch), folder / "base.pth")
        talks = [("q" * (i % 5 + 1), "ab c" * (1 + 7 * (i % 3))) for i in range(16)]
        rows = [
            {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}
            for asked, said in talks
        ]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folders


COMMON = "--lr_schedule constant --lr_init 3e-3 --adam_eps 1e-4 --epoch_steps 3 --micro_bsz 2".split()


def flags_for(files, proj_dir, case, *flags):
    folder = files[int(case[-1])]
    return flags_of(folder, proj_dir, *COMMON, *FP32[case].format(files=folder).split(), *flags)


@each(FP32)
def test_a_run_in_fp32_is_the_cpus(gpu, files, tmp_path, case):
    """The losses, and what is trained."""
    ours, theirs = tmp_path / "gpu", tmp_path / "cpu"
    succeed(gpu("train", flags_for(files, ours, case, "--accelerator", "gpu", "--precision", "fp32")))
    succeed(program.run(flags_for(files, theirs, case)))
    same_lines(lines(ours), lines(theirs))
    same_adapters(ours, theirs)
