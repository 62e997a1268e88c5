"""Every method of adapted linears under the real trainer: a run of one process goes on in two under ZeRO, to
the same end.

AdaLoRA, of which a run shares more than tensors, is in test_adalora_runs.py.
"""

import json
import shutil

import pytest
import torch

from rwkv_miss import METHODS, read_checkpoint

from . import program
from .conftest import close, make_arch, random_tensors, slow
from .program import losses

STEPS = 4
# factors of 10,000 numbers and more, which are what stage 3 shares out; ranks that fit a width of 320
OPTIONS = {
    "miss": {"magnitude": True, "shards": "balanced"},
    "mos": {"budget": 24, "private": 4},
    "prolora": {"rank": 160, "unshared": 40},
    "bat": {"rank": 64},
}
RUNS = [
    (name, "deepspeed_stage_3")
    for name, method in METHODS.items()
    if method.adapts_linears and name != "adalora"
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A random v7 base over bytes, and 16 conversations with unequal answers."""
    folder = tmp_path_factory.mktemp("methods")
    torch.save(
        random_tensors(make_arch(7, n_layer=1, vocab_size=256, n_embd=320, head_size=32)), folder / "base.pth"
    )
    talks = [("q" * (i % 5 + 1), "ab c" * (1 + 7 * (i % 3))) for i in range(16)]
    rows = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in talks
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def train(files, proj_dir, method, options, *flags):
    return program.succeed(
        program.run(
            [
                "--load_model",
                str(files / "base.pth"),
                "--data_file",
                str(files / "data.jsonl"),
                "--proj_dir",
                str(proj_dir),
                "--tokenizer",
                "bytes",
                "--peft",
                method,
                "--peft_config",
                json.dumps(options),
                "--lr_init",
                "1e-1" if method == "vera" else "3e-3",
                "--lr_schedule",
                "constant",
                # Adam makes a whole step of a gradient that is nothing but rounding, unless its epsilon is
                # above that
                "--packing",
                "0",
                "--accelerator",
                "cpu",
                "--adam_eps",
                "1e-4",
                "--eval_split",
                "0",
                "--epoch_steps",
                str(STEPS),
                *flags,
            ]
        )
    )


@pytest.mark.parametrize(
    "method,strategy",
    [
        ("miss", "deepspeed_stage_3"),
        *(slow(*run) for run in RUNS if run[0] != "miss"),
        slow("mos", "deepspeed_stage_2"),
        slow("pissa", "deepspeed_stage_2"),
    ],
)
def test_a_run_goes_on_in_two_processes(files, tmp_path, method, strategy):
    options = {"rank": 40, **OPTIONS.get(method, {})}
    one, two = tmp_path / "one", tmp_path / "two"
    train(
        files,
        one,
        method,
        options,
        "--micro_bsz",
        "8",
        "--save_steps",
        str(STEPS // 2),
        "--save_total_limit",
        "2",
    )
    shutil.copytree(one, two)
    (two / "checkpoints" / f"step-{STEPS:08}.pth").unlink()
    output = train(
        files,
        two,
        method,
        options,
        "--resume",
        "auto",
        "--strategy",
        strategy,
        *"--devices 2 --micro_bsz 2 --accumulate_grad_batches 2".split(),
    )
    assert f"step-{STEPS // 2:08}.pth; the weights, the optimizer" in output
    curve = losses(one)
    assert curve[-1] < curve[0], "it learns"
    assert losses(two) == pytest.approx(curve, rel=1e-5)  # the same sums in another order
    ours, theirs = (read_checkpoint(run / "adapter.pth") for run in (one, two))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        close(name, theirs[name], tensor, 1e-3)
