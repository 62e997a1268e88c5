"""One run, whoever makes it: what one process trains, two processes go on with after its second step, to the
same end. Each method, each kind of training and each strategy is a row.

Runs on rewards are in test_grpo_run.py, AdaLoRA's pruning in test_adalora_runs.py.
"""

import functools
import json
import shutil

import pytest
import torch

from rwkv_miss import METHODS

from . import program
from .conftest import make_arch, random_tensors, slow
from .program import flags_of, lines, same_adapters, same_lines, succeed, write_data

# factors of 10,000 numbers and more, which are what stage 3 shares out; ranks that fit a width of 320
OPTIONS = {
    "miss": {"magnitude": True, "shards": "balanced"},
    "mos": {"budget": 24, "private": 4},
    "prolora": {"rank": 160, "unshared": 40},
    "bat": {"rank": 64},
}
DATA = "--data_file {files}/%s.jsonl --eval_file {files}/held-%s.jsonl --eval_docs 5 --eval_samples 0"
PAIRS, ANSWERS = DATA.replace("%s", "pairs"), DATA.replace("%s", "answers")
# name: what it needs beside the flags that all have
KINDS = {
    name: f"--peft {name} --lr_init {'1e-1' if name == 'vera' else '3e-3'}"
    for name, method in METHODS.items()
    if method.adapts_linears and name != "adalora"
}
KINDS |= {
    "state": "--peft state --lr_init 1e-2 --packing 1 --ctx_len 150 --grad_cp 1",
    "full": "--peft none --lr_init 1e-4",
    "parts": "--train_parts time,ln,emb,head --lr_init 3e-3 --adam_eps 1e-2",
    "rows": "--train_parts emb,head --train_tokens 97-122 --lr_init 3e-3",
    "packed": "--packing 1 --ctx_len 150 --lr_init 3e-3",
    "nf4": "--quant nf4 --lr_init 3e-3",
    "chunks": "--chunk_ctx 37 --lr_init 3e-3",
    "sparse_chunks": "--chunk_ctx 75 --state_cp 1 --grad_cp 1 --lr_init 3e-3",
    "dpo": f"--loss dpo --lr_init 3e-3 {PAIRS}",
    "kto": f"--loss kto --lr_init 3e-3 {ANSWERS}",
}
FAST = ("miss deepspeed_stage_3", "kto ddp")
# lora_fa's and mora's factors are shared out as lora's are
ELSEWHERE = ("packed", "nf4", "lora_fa", "mora", "chunks")
CASES = [f"{name} deepspeed_stage_3" for name in KINDS if name not in ELSEWHERE]
CASES += ["miss ddp", "chunks ddp", "kto ddp"]
CASES += [f"{name} deepspeed_stage_2" for name in ("mos", "pissa", "packed", "nf4", "chunks")]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A random v7 base over bytes; 16 conversations, 16 pairs and 16 labelled answers of unequal lengths."""
    folder = tmp_path_factory.mktemp("equal")
    arch = make_arch(7, n_layer=1, vocab_size=256, n_embd=320, head_size=32)
    torch.save(random_tensors(arch), folder / "base.pth")
    write_data(folder)
    return folder


def train(files, proj_dir, name, *flags):
    options = {} if name in ("state", "full") else {"rank": 40, **OPTIONS.get(name, {})}
    # Adam makes a whole step of a gradient that is nothing but rounding, unless its epsilon is above that
    common = """
        --lr_schedule constant --adam_eps 1e-4 --eval_split 0 --epoch_steps 4 --save_steps 2
        --save_total_limit 2 --peft_config
    """
    kind = [*common.split(), json.dumps(options), *KINDS[name].format(files=files).split()]
    return succeed(program.run(flags_of(files, proj_dir, *kind, *flags)))


@pytest.fixture(scope="module")
def one(files, tmp_path_factory):
    """one(name) -> the folder of a run of four steps on eight rows in one process; each is made once."""
    folder = tmp_path_factory.mktemp("one")

    @functools.cache
    def run(name):
        train(files, folder / name, name, "--micro_bsz", "8")
        return folder / name

    return run


@pytest.mark.parametrize("case", [case if case in FAST else slow(case) for case in CASES])
def test_a_run_goes_on_in_two_processes(files, tmp_path, one, case):
    name, _, strategy = case.rpartition(" ")
    alone, two = one(name), tmp_path / "two"
    shutil.copytree(alone, two)
    (two / "checkpoints/step-00000004.pth").unlink()
    processes = f"--strategy {strategy} --devices 2 --micro_bsz 2 --accumulate_grad_batches 2"
    output = train(files, two, name, *processes.split(), "--resume", "auto")
    assert "step-00000002.pth; the weights, the optimizer" in output
    curve = [line["loss"] for line in lines(alone)]
    assert len(curve) == 4 and curve[-1] < curve[0], "it learns"
    for file in ("metrics.jsonl", "validation.jsonl"):
        if (alone / file).exists():
            same_lines(lines(two, file), lines(alone, file))  # the same sums in another order
    trained = "model.pth" if name == "full" else "adapter.pth"
    same_adapters(two, alone, 1e-3, trained)
