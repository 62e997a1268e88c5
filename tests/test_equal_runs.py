"""One run, whoever makes it: what one process trains, two processes resume after its second step, in
micro-batches, to the same end. Each method, each kind of training and each strategy is a row.

Stage 3 has a row for each way in which a method stores what it trains, not for each method.
"""

import functools
import json
import math
import re
import shutil

import numpy as np
import pytest

from rwkv_miss import METHODS, read_checkpoint
from src.common.formatting import size_text

from . import program
from .conftest import save_base, slow, write_rows
from .program import flags_of, lines, same_adapters, same_lines, succeed, write_data

# factors of 10,000 numbers and more, which are what stage 3 shares out; ranks that fit a width of 320
OPTIONS = {
    "miss": {"magnitude": True, "shards": "balanced"},
    "mos": {"budget": 24, "private": 4},
    "prolora": {"rank": 160, "unshared": 40},
    "bat": {"rank": 64},
    "adalora": {"rank": 30, "init_rank": 40, "tinit": 1, "tfinal": 1, "delta_t": 1},
}
DATA = "--data_file {files}/%s.jsonl --eval_file {files}/held-%s.jsonl --eval_docs 5 --eval_samples 0"
PAIRS, ANSWERS, QUESTIONS = (DATA.replace("%s", kind) for kind in ("pairs", "answers", "questions"))
QUESTIONS += " --group_size 3 --max_tokens 5 --inner_steps 2 --adam_eps 1e-3 --lr_init 3e-3"
TEACHER = "--reference {files}/teacher.pth"
JUDGE = """
def low(prompt, answers, right):
    return [sum(map(ord, answer)) % 7 for answer in answers]
"""
# name: its flags in addition to those that all have. A gradient that is clipped does not show its size
KINDS = {
    name: f"--peft {name} --lr_init {'1e-1' if name == 'vera' else '3e-3'}"
    for name, method in METHODS.items()
    if method.adapts_linears
}
KINDS |= {
    "state": "--peft state --lr_init 1e-2 --packing 1 --ctx_len 150 --grad_cp 1",
    "full": "--peft none --lr_init 1e-4 --grad_clip 0",
    "parts": "--train_parts time,ln,emb,head --lr_init 3e-3 --adam_eps 1e-2",
    "rows": "--train_parts emb,head --train_tokens 97-122 --lr_init 3e-3",
    "packed": "--packing 1 --ctx_len 150 --lr_init 3e-3",
    "nf4": "--quant nf4 --lr_init 3e-3",
    "chunks": "--chunk_ctx 37 --lr_init 3e-3",
    "sparse_chunks": "--chunk_ctx 75 --state_cp 1 --grad_cp 1 --lr_init 3e-3",
    "dpo": f"--loss dpo --lr_init 3e-3 --grad_clip 0 {PAIRS}",
    "ipo": f"--loss ipo --lr_init 3e-3 --grad_clip 0 {PAIRS}",
    "orpo": f"--loss orpo --lr_init 3e-3 --grad_clip 0 {PAIRS}",
    "simpo": f"--loss simpo --lr_init 3e-3 --grad_clip 0 {PAIRS}",
    "kto": f"--loss kto --lr_init 3e-3 --grad_clip 0 {ANSWERS}",
    "grpo": f"--loss grpo --rewards low=1 --reward_file {{files}}/judge.py --beta 0.1 {QUESTIONS}",
    "distill": f"--loss distill --lr_init 3e-3 {TEACHER}",
    "distill_on_policy": f"--loss distill_on_policy {TEACHER} {QUESTIONS}",
}
STRATEGIES = {
    # factors, blocks, magnitudes, pools that layers share, first values, vectors, averages; whole tensors
    "deepspeed_stage_3": "lora bat miss mos pissa vera adalora state full parts rows sparse_chunks distill",
    "deepspeed_stage_2": "mos packed nf4 chunks distill_on_policy",
    "ddp": "miss dora prolora chunks dpo ipo orpo simpo kto grpo",
}
CASES = [(name, strategy) for strategy, names in STRATEGIES.items() for name in names.split()]
FAST = ("miss", "deepspeed_stage_3"), ("kto", "ddp"), ("grpo", "ddp")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A random v7 base over bytes, a teacher, and 16 rows of each kind, of unequal lengths."""
    folder = tmp_path_factory.mktemp("equal")
    for name, width in (("base", 320), ("teacher", 64)):
        save_base(folder / f"{name}.pth", seed=width, n_layer=1, n_embd=width, head_size=32)
    (folder / "judge.py").write_text(JUDGE)
    write_data(folder)
    return folder


def train(files, proj_dir, name, *flags):
    options = {} if name in ("state", "full") else {"rank": 40, **OPTIONS.get(name, {})}
    # Adam makes a whole step of a gradient that is nothing but rounding, unless its epsilon is above that
    common = """
        --lr_schedule linear --adam_eps 1e-4 --eval_split 0 --epoch_steps 4 --save_steps 2
        --save_total_limit 2 --data_cache none --peft_config
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


@pytest.mark.product
@pytest.mark.parametrize(
    ("name", "strategy"), [case if case in FAST else slow(*case) for case in CASES], ids=str
)
def test_two_processes_resume_what_one_began(files, tmp_path, one, name, strategy):
    """In micro-batches, and what the reference says of the data is computed again, by both."""
    alone, two = one(name), tmp_path / "two"
    shutil.copytree(alone, two, ignore=shutil.ignore_patterns("reference"))
    (two / "checkpoints/step-00000004.pth").unlink()
    processes = f"--strategy {strategy} --devices 2 --micro_bsz 2 --accumulate_grad_batches 2"
    output = train(files, two, name, *processes.split(), "--resume", "auto")
    assert "step-00000002.pth; the weights, the optimizer" in output
    curve = [line["loss"] for line in lines(alone)]
    assert len(curve) == 4 and (name == "grpo" or curve[-1] < curve[0]), "it learns"
    for file in ("metrics.jsonl", "validation.jsonl"):
        if (alone / file).exists():
            same_lines(lines(two, file), lines(alone, file))  # sums in another order
    trained = "model.pth" if name == "full" else "adapter.pth"
    same_adapters(two, alone, 1e-3, trained)


def in_the_files_order(rank):
    """Give the source of a distillation an order of its own."""
    from src.data.batches import Schedule
    from src.sources.taught_documents import TaughtDocumentSource

    class FileOrder(Schedule):
        def order(self, turn):
            return np.arange(len(self.lengths))

    TaughtDocumentSource.schedule_type = FileOrder


@pytest.mark.slow
def test_steps_plan_and_teacher_follow_the_order_of_a_source(files, tmp_path):
    """In a run shorter than a pass, where the teacher reads the documents of its steps alone."""
    write_rows(tmp_path / "rows.jsonl", [{"text": "x" * 2**i} for i in range(8)])
    flags = f"--loss distill {TEACHER} --micro_bsz 3 --epoch_steps 2 --data_file {tmp_path}/rows.jsonl"
    flags = flags_of(files, tmp_path / "run", *flags.format(files=files).split())
    output = succeed(program.run(flags, sabotage=in_the_files_order))
    size, all_sizes = re.search(r"trained token take (\d+) bytes, (.*?) in all", output).groups()
    assert all_sizes == size_text(63 * int(size)), "of the six rows that are read, by the plan"
    found = lines(tmp_path / "run")
    assert [line["tokens"] for line in found] == [1 + 2 + 4, 8 + 16 + 32]
    assert all(math.isfinite(line["loss"]) for line in found)


@pytest.mark.slow
def test_adalora_prunes_to_its_rank_and_not_the_same_everywhere(one):
    """A linear keeps 30 of its 40 singular values in the mean; a pruned one is its offset."""
    tensors = read_checkpoint(one("adalora") / "adapter.pth")
    names = [name.removesuffix(".lora_E") for name in tensors if name.endswith(".lora_E")]
    left = [int((tensors[f"{name}.lora_E"] != tensors[f"{name}.offset"]).sum()) for name in names]
    assert sum(left) == 30 * len(left) and len(set(left)) > 1


def test_the_baseline_of_kto_moves(one):
    """The model gets likelier to say what others were asked for."""
    assert max(line["baseline"] for line in lines(one("kto"))) > 0
    assert lines(one("kto"), "validation.jsonl")[-1]["baseline"] > 0


def test_a_kl_to_the_base_begins_at_0_and_answers_are_drawn_as_they_are_trained(one):
    steps = lines(one("grpo"))
    assert steps[0]["kl"] == 0 < steps[-1]["kl"] and {line["units"] for line in steps} == {8}
    assert steps[0]["engine_gap_max"] < 1e-5
