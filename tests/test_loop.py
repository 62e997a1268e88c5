"""demo/loop.py and demo/rl_loop.py train as train.py does."""

import json
import pathlib

import pytest
import torch

import rwkv_miss
from demo import loop, rl_loop, task
from rwkv_miss.flags import parse_flags

from .conftest import make_arch, random_tensors
from .program import call

BASE = pathlib.Path(loop.__file__).parent / "rwkv7-reverse.pth"
SHARED = "--epoch_steps 8 --eval_steps 4 --lr_init 2e-3 --micro_bsz 4 --ctx_len 48"


@pytest.mark.parametrize("version", [6, 7])
def test_the_losses_are_those_of_train(version, tmp_path, capsys):
    """More than one pass, so that the rows have two orders, and the last step of a pass is a short one."""
    tensors = random_tensors(make_arch(version, vocab_size=256))
    rwkv_miss.write_checkpoint(tmp_path / "base.pth", tensors.items(), {"tokenizer": "bytes"})
    for name, rows in (("rows", 30), ("held", 9)):
        prompts = [f"{name} {'abcdefg'[i % 7 :]}{i}" for i in range(rows)]
        lines = [json.dumps({"prompt": prompt, "completion": prompt[::-1]}) for prompt in prompts]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    files = f"--load_model {tmp_path}/base.pth --data_file {tmp_path}/rows.jsonl"
    shared = f"{files} --eval_file {tmp_path}/held.jsonl {SHARED}".split()
    ours = loop.train(
        parse_flags(loop.Flags, [*shared, *f"--rank 6 --proj_dir {tmp_path}/loop --prompt a".split()])
    )
    own = "--peft_config r=6 --accelerator cpu --precision fp32 --eval_docs 9 --eval_samples 0 --early_stop 0"
    code, said = call(["train.py", *shared, *own.split(), "--proj_dir", str(tmp_path / "train")])
    assert code == 0, said
    lines = [json.loads(line) for line in open(tmp_path / "train/metrics.jsonl")]
    assert ours == pytest.approx([line["loss"] for line in lines], abs=1e-6)
    lines = [json.loads(line) for line in open(tmp_path / "train/validation.jsonl")]
    printed = [line for line in capsys.readouterr().out.splitlines() if "validation" in line]
    assert printed == [f"step {line['step']}: validation loss {line['loss']:.4f}" for line in lines]
    ours, theirs = (rwkv_miss.read_checkpoint(tmp_path / name / "adapter.pth") for name in ("loop", "train"))
    assert ours.keys() == theirs.keys() and rwkv_miss.read_checkpoint(tmp_path / "loop/merged.pth")
    for name, tensor in theirs.items():
        assert torch.allclose(ours[name], tensor, atol=1e-4), name


def test_rewards_and_losses_are_those_of_train(tmp_path, capsys):
    """Some groups have equal rewards, and the last step of a pass is a short one."""
    for name, rows, seed in (("rows", 7, 1), ("held", 5, 2)):
        lines = [json.dumps(row) for row in task.rows("reverse", rows, seed, lengths=[9])]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    shared = f"--load_model {BASE} --data_file {tmp_path}/rows.jsonl --eval_file {tmp_path}/held.jsonl"
    shared += " --epoch_steps 6 --eval_steps 3 --lr_init 1e-3 --micro_bsz 3 --ctx_len 64 --max_tokens 14"
    shared = [*shared.split(), "--group_size", "4"]
    ours = rl_loop.train(
        parse_flags(rl_loop.Flags, [*shared, *f"--rank 6 --proj_dir {tmp_path}/loop".split()])
    )
    own = "--loss grpo --peft_config r=6 --accelerator cpu --precision fp32 --accumulate_grad_batches 1"
    own += " --train_parts= --eval_docs 5 --early_stop 0"
    code, said = call(["train.py", *shared, *own.split(), "--proj_dir", str(tmp_path / "train")])
    assert code == 0, said
    lines = [json.loads(line) for line in open(tmp_path / "train/metrics.jsonl")]
    assert [one for one, _ in ours] == pytest.approx([line["reward"] for line in lines], abs=1e-9)
    assert [one for _, one in ours] == pytest.approx([line["loss"] for line in lines], abs=1e-6)
    assert len({round(one, 3) for one, _ in ours}) > 2 and any(line["dead_groups"] for line in lines)
    lines = [json.loads(line) for line in open(tmp_path / "train/validation.jsonl")]
    printed = [line for line in capsys.readouterr().out.splitlines() if "greedy" in line]
    wanted = [f"step {line['step']}: reward of greedy answers {line['reward']:.4f}" for line in lines]
    assert printed == wanted
    ours, theirs = (rwkv_miss.read_checkpoint(tmp_path / name / "adapter.pth") for name in ("loop", "train"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.allclose(ours[name], tensor, atol=1e-4), name


@pytest.mark.parametrize(("program", "lines"), [(loop, 150), (rl_loop, 200)])
def test_a_whole_training_stands_in_so_many_lines(program, lines):
    with open(program.__file__, encoding="utf-8") as file:
        assert len(file.readlines()) <= lines
