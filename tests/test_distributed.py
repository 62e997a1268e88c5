"""Many processes and machines: every stage trains the same adapter, stage 3 holds shares only, launchers, and
ranks that die.
"""

import random
import shlex
import subprocess
import sys

import pytest
import torch

import src.distributed.deepspeed_strategy
from rwkv_miss import read_checkpoint, read_metadata
from rwkv_miss.files import mapped
from src.common.zero_sizes import SIZES, ZeroSizes
from src.model import RWKV

from . import program
from .conftest import ROOT, close, save_base, slow, write_rows
from .program import flags_of, losses, succeed

STAGES = [
    "deepspeed_stage_3",
    *map(slow, ("deepspeed_stage_2", "deepspeed_stage_3_offload")),
    *(pytest.param(f"deepspeed_stage_{n}_offload", marks=pytest.mark.rare) for n in "12"),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A random bf16 base of odd width, which two processes share unevenly, and 8 rows of unequal weight."""
    folder = tmp_path_factory.mktemp("scale")
    save_base(folder / "base.pth", dtype=torch.bfloat16, n_embd=135, head_size=15)
    rng = random.Random(0)
    rows = []
    for weight in (1, 0.3, 4, 1, 1, 0.05, 1, 7):
        said = "".join(rng.choices("abcd ", k=rng.randint(3, 20)))
        rows.append({"messages": [{"role": "assistant", "content": said, "weight": weight}]})
    write_rows(folder / "rows.jsonl", rows)
    return folder


OWN = "--weight_decay 20 --adam_eps 1e-3 --peft_config r=5 --epoch_count 1".split()
# the file has the states of both layers, of which one is not trained
OWN += "--layers last:1 --train_parts state".split()


def start(files, proj_dir, *flags, sabotage=None):
    return succeed(program.run(flags_of(files, proj_dir, *OWN, *flags), sabotage))


TWO = ["--devices", "2", "--micro_bsz", "2", "--strategy"]


@pytest.fixture(scope="module")
def plain(files, tmp_path_factory):
    """The run in one process that all others must equal."""
    proj_dir = tmp_path_factory.mktemp("plain") / "run"
    start(files, proj_dir)
    return proj_dir


def look_inside(rank):
    """Assertions within a stage-3 run: what a process holds before the first step and while the head runs."""
    mapped.SMALL = 0  # a small base is mapped, too
    setup, head_of = src.distributed.deepspeed_strategy.AnywhereDeepSpeed._setup_model, RWKV.features

    def checked_setup(self, model):
        sizes = {name: p.numel() for name, p in model.named_parameters()}
        assert "base.pth" in open("/proc/self/maps").read(), (
            "the base is read when it is shared out, and not before"
        )
        setup(self, model)
        for name, p in model.named_parameters():
            assert p.numel() == 0 and p.ds_tensor.numel() == -(-sizes[name] // 2), f"{name} is held whole"
            assert p.ds_tensor.dtype == torch.float32
        assert "base.pth" not in open("/proc/self/maps").read(), "the file is still mapped"
        return model

    def checked_features(self, *args, **kwargs):
        out = head_of(self, *args, **kwargs)
        # the model that a run measures its speed with is not DeepSpeed's
        whole = [name for name, p in self.named_parameters() if p.numel() and hasattr(p, "ds_tensor")]
        # the head may have been fetched ahead, nothing that was used before may still be there
        assert set(whole) <= {"head.weight"}, f"{whole} are whole after the last layer"
        return out

    # as small against this model as the real ones are against a real model
    SIZES["cpu"] = ZeroSizes(bucket=1000, ahead=1000, live=1000, kept_whole=0)
    src.distributed.deepspeed_strategy.AnywhereDeepSpeed._setup_model = checked_setup
    RWKV.features = checked_features


@pytest.fixture(scope="module")
def stage_1(files, tmp_path_factory, plain):
    """Train on two processes, where the sums come in another order; the large epsilon keeps Adam from blowing
    up a gradient near zero.
    """
    proj_dir = tmp_path_factory.mktemp("stage-1") / "run"
    said = start(files, proj_dir, *TWO, "deepspeed_stage_1")
    assert "clip gradients" not in said, "Lightning warns that its hook does not clip; DeepSpeed clips"
    assert losses(proj_dir) == pytest.approx(losses(plain), rel=1e-5)
    ours, theirs = (read_checkpoint(path / "adapter.pth") for path in (plain, proj_dir))
    for name, tensor in ours.items():
        close(name, theirs[name], tensor, 1e-5)
    return proj_dir


@pytest.mark.parametrize("strategy", STAGES)
def test_every_stage_trains_the_same_adapter_into_the_same_file(files, tmp_path, stage_1, strategy):
    """Bit for bit where the gradients are summed alike; ZeRO-3 averages them before the sum over ranks."""
    sabotage = look_inside if "3" in strategy else None
    start(files, tmp_path / "run", *TWO, strategy, sabotage=sabotage)
    assert losses(tmp_path / "run") == pytest.approx(losses(stage_1), rel=1e-6)
    ours, theirs = (read_checkpoint(proj_dir / "adapter.pth") for proj_dir in (stage_1, tmp_path / "run"))
    assert list(ours) == list(theirs)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-6)
    metadata = [read_metadata(proj_dir / "adapter.pth") for proj_dir in (stage_1, tmp_path / "run")]
    assert metadata[0] == metadata[1]


@pytest.fixture(scope="module")
def two_machines():
    """Runs a command line on both machines of scripts/two_machines.sh."""
    script = ["bash", "scripts/two_machines.sh"]
    tried = subprocess.run([*script, "true"], cwd=ROOT, capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(
            f"NO RIGHT TO MAKE NETWORK NAMESPACES, so that nothing is tested on two machines: {tried.stderr}"
        )

    def run(command):
        return subprocess.run(
            [*script, "bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=300
        )

    return run


LAUNCHERS = {
    "torchrun": (
        "-m torch.distributed.run --nnodes 2 --nproc_per_node 1 --node_rank $NODE_RANK --master_addr"
        " $MASTER_ADDR"
    ),
    "deepspeed": (
        "-m deepspeed.launcher.runner --hostfile {hosts} --no_ssh --node_rank $NODE_RANK --master_addr"
        " $MASTER_ADDR"
    ),
}


@pytest.mark.parametrize(
    ("launcher", "strategy"),
    [
        slow("torchrun", "deepspeed_stage_3"),
        pytest.param("deepspeed", "deepspeed_stage_2", marks=pytest.mark.rare),
    ],
)
def test_two_machines_train_what_one_process_does_and_the_first_one_writes_it(
    files, tmp_path, plain, two_machines, launcher, strategy
):
    """Neither is told how many there are, and neither which network to use."""
    (tmp_path / "hosts").write_text("10.77.0.1 slots=1\n10.77.0.2 slots=1\n")
    command = LAUNCHERS[launcher].format(hosts=tmp_path / "hosts")
    flags = shlex.join(flags_of(files, tmp_path / "run", *OWN, "--micro_bsz", "2", "--strategy", strategy))
    done = two_machines(
        f"DS_ACCELERATOR=cpu {sys.executable} {command} train.py {flags} --proj_dir {tmp_path}/run-$NODE_RANK"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(tmp_path / "run-0") == pytest.approx(losses(plain), rel=1e-5)
    close(
        "the adapter",
        *(
            torch.cat([t.flatten() for t in read_checkpoint(path / "adapter.pth").values()])
            for path in (tmp_path / "run-0", plain)
        ),
        1e-5,
    )
    assert not (tmp_path / "run-1").exists(), "the second machine wrote, too"
    assert not [
        line
        for line in subprocess.check_output(["ip", "netns"], text=True).splitlines()
        if line.startswith("rwkv-")
    ]
