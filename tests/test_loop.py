"""demo/loop.py trains as train.py does."""

import json

import pytest
import torch

import rwkv_miss
from demo import loop

from .conftest import make_arch, random_tensors
from .program import call

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
    ours = loop.train(loop.read_flags([*shared, *f"--rank 6 --proj_dir {tmp_path}/loop --prompt a".split()]))
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


def test_a_whole_training_stands_in_150_lines():
    with open(loop.__file__, encoding="utf-8") as file:
        assert len(file.readlines()) <= 150
