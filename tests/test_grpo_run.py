"""Runs on rewards: rewards that fail, and models that are drawn from as they are trained. Resumed runs are in
test_equal_runs.py.
"""

import functools
import itertools
import os
import random

import pytest

from . import program
from .conftest import save_base, write_rows
from .program import lines, same_adapters, same_lines, succeed

QUESTIONS = 12  # a draw has 4 of them
REWARDS = """
def low(prompt, answers, right):
    sums = [sum(min(ord(letter), 255) for letter in answer) for answer in answers]
    return [round(1 - total / 255 / max(len(answer), 1), 1) for total, answer in zip(sums, answers)]
"""
FAILS_LATER = """
import itertools
calls, judged = itertools.count(), low

def low(*asked):  # after an evaluation of three questions, and two draws of four
    return judged(*asked) if next(calls) < 3 + 8 else None
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A base, whose width the rank does not divide, questions, and a function that judges answers."""
    folder = tmp_path_factory.mktemp("rewards")
    save_base(folder / "base.pth", n_embd=40, head_size=8)
    rng = random.Random(0)
    for name, count in (("rows", QUESTIONS), ("held", 3)):
        prompts = [name[0] + "".join(rng.choices("abc ", k=rng.choice([1, 2, 9]))) for _ in range(count)]
        rows = [{"prompt": f"{prompt}{i}:", "completion": "ab"} for i, prompt in enumerate(prompts)]
        write_rows(folder / f"{name}.jsonl", rows)
    (folder / "judge.py").write_text(REWARDS)
    return folder


def flags_of(files, proj_dir, *flags):
    # the epsilon keeps Adam from blowing up a gradient near zero
    common = f"""
        --load_model {files}/base.pth --data_file {files}/rows.jsonl --eval_file {files}/held.jsonl
        --proj_dir {proj_dir} --tokenizer bytes --accelerator cpu --loss grpo --rewards low=1
        --reward_file {files}/judge.py --group_size 3 --max_tokens 5 --lr_init 1e-2 --adam_eps 1e-3
        --peft_config r=7 --micro_bsz 4 --epoch_count 1 --eval_docs 3 --eval_samples 0 --data_cache none
    """.split()
    given = dict(itertools.zip_longest(flags[::2], flags[1::2]))
    return [
        str(word)
        for pair in (dict(zip(common[::2], common[1::2])) | given).items()
        if pair[1] is not None
        for word in pair
    ]


def start(files, proj_dir, *flags, sabotage=None):
    return succeed(program.run(flags_of(files, proj_dir, *flags), sabotage))


ITSELF = ("--reference", "base.pth")


def test_a_run_whose_rewards_fail_resumes_when_they_are_mended(files, tmp_path):
    """From the step before, which no checkpoint was planned at. Its file is named again, whatever it is."""
    proj_dir, judge = tmp_path / "run", tmp_path / "judge.py"
    judge.write_text(REWARDS + FAILS_LATER)
    code, output = program.run(flags_of(files, proj_dir, "--reward_file", judge))
    assert code == 2 and "step 3: the rewards of all 4 groups failed" in output, output
    assert [line["step"] for line in lines(proj_dir)] == [1, 2]
    judge.write_text(REWARDS)
    flags = flags_of(files, proj_dir, "--reward_file", judge, "--resume", "auto")
    unnamed = flags_of(files, proj_dir, "--reward_file", None, "--resume", "auto")
    code, output = program.run(unnamed)
    assert code == 2 and f"add --reward_file {judge}" in output, output
    output = succeed(program.run(flags))
    for text in (output, (proj_dir / "run_card.md").read_text()):
        assert (
            "--reward_file is not as it was when the checkpoint was written; rewards after step 2 may" in text
        )
    start(files, tmp_path / "whole")
    for name in ("metrics.jsonl", "validation.jsonl"):
        same_lines(lines(proj_dir, name), lines(tmp_path / "whole", name), rel=0)
    same_adapters(proj_dir, tmp_path / "whole", ratio=0)


def of_its_own(folder, rank):
    """Another folder for each process, as on two machines."""
    os.chdir(folder / str(rank))


def test_machines_with_other_functions_under_the_same_name_train_nothing(files, tmp_path):
    for rank, source in enumerate((REWARDS, REWARDS + "# mended")):
        (tmp_path / str(rank)).mkdir()
        (tmp_path / str(rank) / "own.py").write_text(source)
    two = ("--devices", "2", "--micro_bsz", "2", "--strategy", "ddp", "--reward_file", "own.py")
    flags = flags_of(files, tmp_path / "run", *two)
    code, output = program.run(flags, functools.partial(of_its_own, tmp_path))
    assert code == 2 and "does not run what rank 0" in output, output
    assert "the file of --reward_file is" in output, output
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    "flags, gap",
    [
        (("--peft", "none", "--peft_config", "{}", "--lr_init", "1e-3", "--beta", "0.1", *ITSELF), 1e-5),
        (("--peft", "state", "--peft_config", "{}"), 1e-5),
        (("--precision", "bf16", "--quant", "nf4", "--inner_steps", "2"), 0.3),
    ],
)
def test_other_models_are_drawn_from_as_they_are_trained(files, tmp_path, flags, gap):
    flags = [files / flag if flag == "base.pth" else flag for flag in flags]
    start(files, tmp_path / "run", *flags, "--epoch_steps", "2")
    steps = lines(tmp_path / "run")
    if "--reference" in flags:
        assert steps[0]["kl"] < 1e-9 < steps[1]["kl"]
    for line in steps:
        assert 0 <= line["engine_gap"] <= line["engine_gap_max"] < gap
        assert line["trained_tokens"] > 0


def cache_kernels_in(folder, rank):
    os.environ["RWKV_KERNEL_CACHE"] = str(folder)


def test_a_run_in_torch_builds_nothing(files, tmp_path):
    """Neither for the training nor to choose the tokens of its answers."""
    cache = tmp_path / "kernels"
    sabotage = functools.partial(cache_kernels_in, cache)
    start(files, tmp_path / "run", *"--wkv torch --epoch_steps 1 --epoch_count 0".split(), sabotage=sabotage)
    assert not cache.exists()
