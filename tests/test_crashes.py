"""Nothing is lost: killed at any moment, out of disk, on another number of processes, after a NaN, a run goes
on to the same losses.
"""

import concurrent.futures
import errno
import functools
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import time
import types

import pytest
import torch

from rwkv_miss import UserError, read_checkpoint, read_metadata
from rwkv_miss.around_steps import AroundSteps
from rwkv_miss.files import mapped
from src.common.files import write_text
from src.training import callbacks, rollback
from src.training.rollback import LastGood
from src.training.run_folder import adapter_of_step, alone_in, list_checkpoints, remove_old
from src.training.training_state import read_state, write_state

from . import program
from .conftest import save_base, slow, write_rows
from .program import at_file, flags_of, in_turn, interrupt, judge_late, kill, losses, spoil, succeed

STEPS = 6


@pytest.mark.parametrize("place", ["forward", slow("backward"), "optimizer"])
def test_a_first_step_without_memory_is_done_again_with_half_the_micro_batch(run, tmp_path, place):
    """The steps are those of the run that has this micro-batch from its start."""
    output = succeed(run("halved", sabotage=program.out_of_memory(place, 1)))
    assert "micro_bsz 2 and accumulate_grad_batches 2 in place of 4 and 1" in output
    assert "micro_bsz 1 and accumulate_grad_batches 4 in place of 2 and 2" in output
    assert "Traceback" not in output
    succeed(run("given", "--micro_bsz", "1", "--accumulate_grad_batches", "4"))
    assert losses(tmp_path / "halved") == pytest.approx(losses(tmp_path / "given"), rel=1e-6)
    program.same_adapters(tmp_path / "halved", tmp_path / "given", 1e-6)
    settings = (tmp_path / "halved" / "config.yaml").read_text()
    assert "micro_bsz: 1" in settings and "accumulate_grad_batches: 4" in settings
    assert "the GPU's memory did not suffice" in settings


@pytest.mark.product
@pytest.mark.parametrize("strategy", ["ddp", slow("deepspeed_stage_2")])
@pytest.mark.parametrize("place", ["forward", "backward"])
def test_one_of_two_processes_without_memory_ends_both_and_says_what_to_give(run, place, strategy):
    start = time.monotonic()
    code, output = run(
        "two", "--devices", "2", "--strategy", strategy, sabotage=program.out_of_memory(place, 1)
    )
    assert code == 2 and time.monotonic() - start < 60, output
    assert "give --micro_bsz 2 --accumulate_grad_batches 2 for the same steps" in output


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A random base of odd width, which two processes do not share evenly, and 24 rows: 6 steps of 4."""
    folder = tmp_path_factory.mktemp("durable")
    save_base(folder / "base.pth", n_embd=45, head_size=15)
    rng = random.Random(0)
    rows = [{"text": "".join(rng.choices("abcd ", k=rng.randint(3, 20)))} for _ in range(24)]
    write_rows(folder / "rows.jsonl", rows)
    return folder


@pytest.fixture
def run(files, tmp_path):
    """run(name, *flags, sabotage=None) -> (exit code of rank 0, everything printed); the run is in tmp_path /
    name.
    """

    def start(name, *flags, sabotage=None):
        base = [] if "none" in flags else ["--peft_config", "r=5"]
        return program.run(flags_of(files, tmp_path / name, *base, *flags), sabotage)

    return start


def same_run(one, other, exact=True):
    """Equal losses and trained tensors; with other processes or another strategy the same sums come in
    another order.
    """
    ours, theirs = (read_checkpoint(proj_dir / "adapter.pth") for proj_dir in (one, other))
    if exact:
        assert losses(one) == losses(other) and all(torch.equal(ours[name], theirs[name]) for name in ours)
    else:
        assert losses(one) == pytest.approx(losses(other), rel=1e-5)
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


# more faults of a run than in program.py. Each is called in its processes, before it starts


def hang_up():
    os.kill(os.getpid(), signal.SIGHUP)


def interrupt_twice():
    callbacks.ONE_REQUEST = 0.0
    interrupt()
    interrupt()


def disk_full():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def kill_in_write():
    """The process dies in the middle of the file that it begins now."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, resource.RLIM_INFINITY))


def large_scale(rank):
    """A loss scale with which the first steps overflow, so that it changes within the run."""
    scaler = torch.amp.GradScaler
    torch.amp.GradScaler = lambda device, init_scale: scaler(device, init_scale=2.0**24)


def interrupt_last_rank(step, rank):
    """The second of two processes, and only it, is asked to end after a step, when the processes have agreed
    to continue. Ctrl-C is followed by a SIGTERM, as by the launcher of DeepSpeed.
    """
    after = AroundSteps.after

    def asked(self, done, *others):
        after(self, done, *others)
        if done == step and rank == 1:
            interrupt()
            os.kill(os.getpid(), signal.SIGTERM)

    AroundSteps.after = asked


# resume


@pytest.mark.parametrize("kind", ["dropout", slow("fp16")])
def test_a_resumed_run_has_the_random_numbers_and_the_loss_scale(run, tmp_path, kind):
    """2 steps, Ctrl-C or a closed terminal while the metrics are written, and the other 4: bit for bit the
    uninterrupted run.
    """
    flags = (
        ["--precision", "fp16"] if kind == "fp16" else ["--peft", "lora", "--peft_config", "r=5,dropout=0.3"]
    )
    sabotage = large_scale if kind == "fp16" else None
    succeed(run("whole", *flags, sabotage=sabotage))
    stop = at_file(
        "metrics.jsonl",
        3,  # the first operation creates the file
        tmp_path / "parts",
        interrupt if kind == "dropout" else hang_up,
    )
    code, output = run("parts", *flags, sabotage=in_turn(sabotage, stop) if sabotage else stop)
    stopped = len(losses(tmp_path / "parts"))
    assert code == 130 and output.count("stopping after this step and saving; ") == 1, output
    assert f"stopped, go on with --resume auto: step {stopped} of {STEPS}" in output, output
    assert read_metadata(tmp_path / "parts/adapter.pth")["step"] == stopped < STEPS
    output = succeed(run("parts", *flags, "--resume", "auto", sabotage=sabotage))
    assert f"step-{stopped:08d}.pth" in output and "the order of the data go on" in output
    same_run(tmp_path / "whole", tmp_path / "parts")
    [path] = list_checkpoints(str(tmp_path / "parts/checkpoints"))
    if kind == "fp16":
        assert read_metadata(path)["loss_scaling"]["scale"] < 2**23, "it changed within the run"
    else:
        succeed(run("without", "--peft", "lora"))
        one, other = losses(tmp_path / "whole"), losses(tmp_path / "without")
        assert all(abs(a - b) > 1e-6 for a, b in zip(one[1:], other[1:], strict=True)), (
            "there are random numbers to go on with"
        )
    assert read_metadata(path)["recent_losses"] == losses(tmp_path / "whole"), (
        "what spikes are judged by, of both sittings"
    )


@pytest.mark.slow
def test_other_processes_and_strategies_resume(run, tmp_path):
    """ZeRO-2 with offload on two processes, one plain process, two under DDP of which one is interrupted,
    ZeRO-3 with offload: one run.
    """
    flags = ["--epoch_count", "2"]
    succeed(run("whole", *flags))
    two = [*flags, "--devices", "2", "--micro_bsz", "2", "--resume", "auto"]
    stop = at_file("metrics.jsonl", 3, tmp_path / "parts", interrupt)
    code, output = run("parts", *two, "--strategy", "deepspeed_stage_2_offload", sabotage=stop)
    assert code == 130 and "no checkpoint in" in output, output
    code, output = run("parts", *flags, "--micro_bsz", "2", "--resume", "auto", sabotage=stop)
    changed = "strategy deepspeed_stage_2_offload -> auto, devices 2 -> 1"
    assert code == 130 and f"{changed}: a step keeps its 4 rows, accumulate is 2" in output, output
    code, output = run("parts", *two, "--strategy", "ddp", sabotage=functools.partial(interrupt_last_rank, 6))
    assert code == 130 and "stopped, go on with --resume auto: step 7 of 12" in output, output
    for wrong, words in (
        (["--micro_bsz", "3"], "has 4 rows, which is not a multiple of micro_bsz x devices x num_nodes = 3"),
        (
            ["--micro_bsz", "2", "--accumulate_grad_batches", "4"],
            "has 4 rows, now it has 8; drop --global_bsz",
        ),
    ):
        code, output = run("parts", *flags, *wrong, "--resume", "auto")
        assert code == 2 and words in output, output
    succeed(run("parts", *two, "--strategy", "deepspeed_stage_3_offload"))
    same_run(tmp_path / "whole", tmp_path / "parts", exact=False)


def test_a_longer_run_resumes_from_the_end_of_a_shorter_one(run, tmp_path):
    constant = ["--lr_schedule", "constant"]
    succeed(run("whole", *constant, "--epoch_count", "2"))
    succeed(run("parts", *constant))
    assert "6 steps -> 12: the learning rate was 0.01 in step 6 and is 0.01 in step 7, " in succeed(
        run("parts", *constant, "--epoch_count", "2", "--resume", "auto")
    )
    same_run(tmp_path / "whole", tmp_path / "parts")
    assert "step-00000012.pth has all 12 steps already" in succeed(
        run("parts", *constant, "--resume", "auto")
    )


@pytest.mark.parametrize(
    "change, words", [slow("rows", "data file"), slow("held", "held-out data"), ("base", "base file")]
)
def test_a_run_does_not_resume_with_other_files(run, files, tmp_path, change, words):
    """Files of the same names whose contents are others."""
    paths = {name: tmp_path / name for name in ("rows", "held", "base")}
    for name, source in (("rows", "rows.jsonl"), ("held", "rows.jsonl"), ("base", "base.pth")):
        shutil.copy(files / source, paths[name])
    paths["held"].write_text('{"text": "held out"}\n')
    flags = [
        "--data_file",
        str(paths["rows"]),
        "--eval_file",
        str(paths["held"]),
        "--load_model",
        str(paths["base"]),
        "--eval_samples",
        "0",
    ]
    succeed(run("run", *flags, "--epoch_steps", "1"))
    if change == "base":
        tensors = read_checkpoint(files / "base.pth")
        tensors["emb.weight"][7, 7] += 1  # one entry
        torch.save(tensors, paths["base"])
    else:
        paths[change].write_text(paths[change].read_text() + '{"text": "one more"}\n')
    code, output = run("run", *flags, "--epoch_steps", "2", "--resume", "auto")
    assert code == 2, output
    assert (
        f"error: --resume auto: the {words} is not the one that the run began with; put it back" in output
    ), output
    assert len(losses(tmp_path / "run")) == 1


# killed, interrupted, out of disk


def check_files(proj_dir):
    """Check that every file with its final name is whole."""
    for path in list_checkpoints(str(proj_dir / "checkpoints")):
        assert read_metadata(path)["step"]
        assert all(tensor.isfinite().all() for tensor in read_checkpoint(path).values())
    if (proj_dir / "adapter.pth").exists():
        assert read_metadata(proj_dir / "adapter.pth")["step"] >= 1
        assert read_checkpoint(proj_dir / "adapter.pth")
    return list_checkpoints(str(proj_dir / "checkpoints"))


# (file, the how-manieth of its operations in a process that resumes): write, rename, clean up
MOMENTS = [
    ("config.yaml", 1),
    ("config.yaml", 2),
    ("metrics.jsonl", 2),
    ("metrics.jsonl", 3),
    ("adapter.pth", 1),
    ("adapter.pth", 2),
    ("adapter.pth", 3),
    ("/step-", 1),
    ("/step-", 2),
    ("/step-", 3),
    ("step-00000001.pth", 1),
    ("loss.png", 2),
    ("run_card.md", 2),
    ("run.json", 2),
]


def test_killed_at_every_kind_of_moment(run, tmp_path):
    """One run, killed again and again before a file is opened, renamed or removed, and once in the middle of
    a checkpoint.
    """
    succeed(run("whole"))
    flags = ["--save_steps", "1", "--resume", "auto"]
    proj_dir = tmp_path / "parts"
    for file, number in [*MOMENTS[:11], ("in the middle", 1), *MOMENTS[11:]]:
        sabotage = at_file(file, number, proj_dir, kill)
        if file == "in the middle":
            sabotage = at_file("/step-", 1, proj_dir, kill_in_write)
        code, output = run("parts", *flags, sabotage=sabotage)
        assert code in (-signal.SIGKILL, -signal.SIGXFSZ), f"{file} {number}: {output}"
        check_files(proj_dir)
    assert "nothing to train" in succeed(run("parts", *flags))
    same_run(tmp_path / "whole", proj_dir)
    whole = {path.name for path in (tmp_path / "whole").iterdir()}
    adapters = {adapter_of_step(step) for step in range(1, STEPS + 1)}
    assert {path.name for path in proj_dir.iterdir()} == whole | adapters
    assert os.listdir(proj_dir / "checkpoints") == ["step-00000006.pth"]
    assert json.loads((proj_dir / "run.json").read_text())["steps"] == STEPS


def test_a_small_file_takes_over_what_a_killed_run_left(tmp_path):
    (tmp_path / "run.json.tmp").write_text("a half that is longer")
    write_text(str(tmp_path / "run.json"), "{}")
    assert os.listdir(tmp_path) == ["run.json"] and (tmp_path / "run.json").read_text() == "{}"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_small_file_that_cannot_be_written_is_one_clear_error(tmp_path, monkeypatch, number):
    def fail(file):
        raise OSError(number, os.strerror(number))

    path = tmp_path / "run.json"
    path.write_text("before")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match=rf"run\.json .* written.*{os.strerror(number)}"):
        write_text(str(path), "after")
    assert os.listdir(tmp_path) == ["run.json"] and path.read_text() == "before"


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_the_run_can_be_resumed(run, tmp_path):
    succeed(run("whole"))
    flags = ["--save_steps", "1", "--resume", "auto"]
    proj_dir = tmp_path / "parts"
    before = []
    for file, number in (
        ("config.yaml", 1),
        ("metrics.jsonl", 2),
        ("metrics.jsonl", 3),
        ("adapter.pth", 1),
        ("/step-", 1),
        ("/step-", 2),
        ("step-00000001.pth", 1),
        ("loss.png", 1),
        ("run.json", 2),
    ):
        code, output = run("parts", *flags, sabotage=at_file(file, number, proj_dir, disk_full))
        assert (
            code == 2
            and output.count("error: ") == 1
            and "Traceback" not in output
            and "No space left" in output
        ), f"{file}: {output}"
        assert not list(proj_dir.rglob("*.tmp"))
        after = check_files(proj_dir)
        assert after[-1:] >= before[-1:]
        before = after
        if file == "metrics.jsonl":
            with open(proj_dir / "metrics.jsonl", "a") as metrics:
                metrics.write('{"step": 1, "lo')  # the disk had room for half a line
    assert "nothing to train" in succeed(run("parts", *flags))
    same_run(tmp_path / "whole", proj_dir)


def overwrite_base(step, cut, path, rank):
    """The base is written over in place within a step; `cut`: with nothing."""
    mapped.SMALL = 0
    before = AroundSteps.before

    def overwritten(self, doing, *others):
        if doing == step and rank == 0:
            content = path.read_bytes()
            path.write_bytes(b"" if cut else content)
        before(self, doing, *others)

    AroundSteps.before = overwritten


@pytest.mark.parametrize("devices, cut", [slow("1", False), ("1", True), slow("2", False)])
def test_a_base_that_is_overwritten_ends_the_run_and_spoils_nothing(run, files, tmp_path, devices, cut):
    shutil.copy(files / "base.pth", tmp_path / "base.pth")
    shared = ["--load_model", str(tmp_path / "base.pth"), "--save_steps", "1", "--micro_bsz", "2"]
    changed = functools.partial(overwrite_base, 3, cut, tmp_path / "base.pth")
    code, output = run("run", *shared, "--devices", devices, sabotage=changed)
    assert code == 2 and "Traceback" not in output and "base.pth was overwritten" in output, output
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000002.pth"]
    assert len(losses(tmp_path / "run")) == 2


def test_signals_while_a_checkpoint_is_written(run, tmp_path):
    """One: the next step is the last. Two: the program ends at once; the checkpoint before stays."""
    proj_dir = tmp_path / "run"
    code, output = run("run", "--save_steps", "2", sabotage=at_file("/step-", 2, proj_dir, interrupt))
    assert code == 130, output
    assert [os.path.basename(path) for path in check_files(proj_dir)] == ["step-00000003.pth"], output
    code, output = run(
        *"run --save_steps 2 --resume auto".split(), sabotage=at_file("/step-", 2, proj_dir, interrupt_twice)
    )
    assert code and "Traceback" not in output, output
    assert os.listdir(proj_dir / "checkpoints") == ["step-00000003.pth"]
    succeed(run("whole"))
    succeed(run("run", "--resume", "auto"))
    same_run(tmp_path / "whole", proj_dir)


def test_a_run_killed_before_its_first_checkpoint_leaves_the_next_one_nothing(run, tmp_path):
    held = ["--eval_split", "0.3", "--eval_steps", "1", "--eval_samples", "0", "--epoch_count", "1"]
    code, _ = run("run", *held, sabotage=at_file("adapter.pth", 1, tmp_path / "run", kill))
    assert code == -signal.SIGKILL and (tmp_path / "run/best.pth").exists()
    output = succeed(run("run", "--eval_split", "0", "--resume", "auto"))
    assert "no checkpoint in" in output and "best:" not in output
    assert not (tmp_path / "run/best.pth").exists() and not (tmp_path / "run/validation.jsonl").exists()
    assert "best" not in json.loads((tmp_path / "run/run.json").read_text())


def pause(change, tell, go, rank):
    """Wait before a file is opened or renamed whose path contains `change`, once, until the file `go` is
    there.
    """
    waited = []

    def hook(event, args):
        if event in ("open", "os.rename") and change in str(args[0]) and not waited:
            waited.append(True)
            tell.touch()
            while not go.exists():
                time.sleep(0.01)

    sys.addaudithook(hook)


def contents(folder):
    """Relative path -> (bytes, time of the last change) of all files, and of the folders the times."""
    return {
        str(path.relative_to(folder)): (path.is_file() and path.read_bytes(), path.stat().st_mtime_ns)
        for path in [folder, *folder.rglob("*")]
    }


@pytest.mark.parametrize(
    "moment, resume",
    [("rows.jsonl", "none"), ("run.json", "auto"), slow("rows.jsonl", "auto"), slow("run.json", "none")],
)
def test_two_runs_do_not_share_a_folder(run, tmp_path, moment, resume):
    """One is paused when it reads its data, for which it has looked into the folder, or when it ends; another
    begins.
    """
    proj_dir, tell, go = (tmp_path / name for name in ("run", "tell", "go"))
    if resume == "auto":
        succeed(run("run", "--epoch_steps", "1"))
    flags = ["--epoch_steps", "2", "--resume", resume]
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        first = thread.submit(run, "run", *flags, sabotage=functools.partial(pause, moment, tell, go))
        try:
            while not tell.exists() and not first.done():
                time.sleep(0.01)
            before = contents(proj_dir)
            code, output = run("run", *flags, "--lr_schedule", "cos" if resume == "auto" else "constant")
            assert code == 2 and f"error: another run is writing into {proj_dir} now" in output, output
            assert contents(proj_dir) == before
        finally:
            go.touch()
    succeed(first.result())
    assert len(losses(proj_dir)) == 2 and "lr_schedule: cos" in (proj_dir / "config.yaml").read_text()
    with alone_in(str(proj_dir)):  # given back at its end
        pass


def test_a_folder_that_a_refused_run_made_is_removed(run, tmp_path):
    """And a run that waits for a folder that is just being removed makes its own."""
    code, output = run("deep/run", "--data_file", str(tmp_path / "none.jsonl"))
    assert code == 2 and os.listdir(tmp_path) == [], output
    with alone_in(str(tmp_path / "deep/run")):
        assert os.listdir(tmp_path / "deep") == ["run"]
    assert os.listdir(tmp_path) == []


def test_only_leftovers_of_the_run_itself_are_removed(run, tmp_path):
    proj_dir = tmp_path / "run"
    (proj_dir / "checkpoints").mkdir(parents=True)
    own = ["adapter.pth.0123abcd.tmp", "best.pth.0123abcd.tmp", "checkpoints/step-00000001.pth.0123abcd.tmp"]
    others = [
        "merged.pth.0123abcd.tmp",
        "adapter.pth.mine.tmp",
        "step-00000001.pth.0123abcd.tmp",
        "checkpoints/mine.pth.0123abcd.tmp",
    ]
    for name in own + others:
        (proj_dir / name).touch()
    succeed(run("run", "--epoch_steps", "1"))
    assert [name for name in own + others if (proj_dir / name).exists()] == others


def test_the_newest_checkpoints_stay(run, tmp_path):
    succeed(run("run", "--save_steps", "1", "--save_total_limit", "2"))
    folder = str(tmp_path / "run/checkpoints")
    paths = list_checkpoints(folder)
    assert [os.path.basename(path) for path in paths] == ["step-00000005.pth", "step-00000006.pth"]
    remove_old(folder, 1)
    assert list_checkpoints(folder) == paths[1:]


# rollbacks


def test_the_state_of_a_rollback_is_not_worn_by_the_steps_that_follow():
    """A run may roll back to a state several times: parameters, moments, counter of updates and buffers."""
    model = torch.nn.BatchNorm1d(3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    run = types.SimpleNamespace(
        lightning_module=types.SimpleNamespace(model=model), optimizers=[optimizer], strategy=None
    )

    def step():
        optimizer.zero_grad()
        model(torch.randn(5, 3)).pow(3).sum().backward()
        optimizer.step()

    step()
    kept, wanted = ({name: tensor.detach().clone() for name, tensor in read_state(run)} for _ in range(2))
    assert {"weight", "weight:exp_avg", "weight:step", "running_mean"} < kept.keys()
    for _ in range(2):
        step()
        assert any(not torch.equal(tensor, wanted[name]) for name, tensor in read_state(run))
        write_state(run, kept)
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in read_state(run))
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in kept.items())


@pytest.mark.parametrize("late, restored", [(0, [2, 2, 7, 11]), (1, [2, 2, 2, 11])], ids=["at once", "late"])
def test_a_state_whose_loss_was_not_finite_never_becomes_the_good_one(monkeypatch, late, restored):
    """A state is copied before its loss is known; the next loss is that of another state. The
    same holds where a step is judged after the next one was made.
    """
    device = types.SimpleNamespace(root_device=torch.device("cpu"))
    run, back = types.SimpleNamespace(global_step=0, is_global_zero=False, strategy=device), []
    monkeypatch.setattr(rollback, "read_state", lambda run: [("step", torch.tensor(run.global_step))])
    monkeypatch.setattr(rollback, "write_state", lambda run, state: back.append(int(state["step"])))
    keeper = LastGood(1, 0.0)
    keeper.start(run)
    bad = (4, 6, 9, 13)
    undone = set()
    for run.global_step in range(1, bad[-1] + 1 + late):
        step = run.global_step - late
        loss = math.nan if step in bad else 1.0
        if step < 1 or step in undone or keeper.judge(run, step, loss, 1.0) is None:
            keeper.keep(run)
        else:
            undone.add(run.global_step)
    assert back == restored


TWO = ["--devices", "2", "--micro_bsz", "2", "--strategy"]
FULL = ["--peft", "none", "--lr_init", "1e-3"]


@pytest.mark.parametrize(
    "kind, flags, undone, late",
    [
        # the state after step 2 is known to be good by the loss of step 3; a finite loss of step 4 proves
        # step 3's, too
        ("loss", ["--rollback_steps", "1"], [2, 3], False),
        slow("gradient", ["--rollback_steps", "1"], [3], False),
        # step 5 was made when step 4 is judged
        ("loss", ["--rollback_steps", "1"], [2, 3, 4], True),
        slow("gradient", ["--rollback_steps", "1", *TWO, "deepspeed_stage_3"], [3], False),
        slow("gradient", ["--rollback_steps", "1", *TWO, "ddp"], [3, 4], True),
        slow("loss", [*FULL, "--save_steps", "1"], [3], False),
    ],
    ids=["loss", "gradient", "loss, late", "gradient, ZeRO-3", "gradient, DDP, late", "full training"],
)
def test_a_nan_undoes_the_steps_that_led_to_it(run, tmp_path, kind, flags, undone, late):
    """A NaN in step 4: the run equals one in which these updates (0-based) were not made, and the later steps
    are in their places. `late`: it is judged as on a GPU.
    """
    full = FULL if "none" in flags else []
    succeed(run("left-out", *full, sabotage=spoil("update", undone)))
    spoiled = spoil(kind, [3])
    output = succeed(run("run", *flags, sabotage=in_turn(judge_late, spoiled) if late else spoiled))
    next_step = undone[-1] + 2
    assert f"at step 4; back to the state of step {undone[0]}, and on with step {next_step}" in output, output
    one, other = losses(tmp_path / "left-out"), losses(tmp_path / "run")
    # in between the loss is that of a state that is given up
    kept = [i for i in range(STEPS) if not 3 <= i <= undone[-1]]
    assert [one[i] for i in kept] == pytest.approx([other[i] for i in kept], rel=1e-5)
    assert other[3] is None or kind == "gradient"
    name = "model.pth" if full else "adapter.pth"
    ours, theirs = (read_checkpoint(tmp_path / run / name) for run in ("left-out", "run"))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "flags, notes", [(["--rollback_steps", "1"], 3), (["--rollback_steps", "0"], 0), (FULL, 0)]
)
def test_a_run_that_stays_broken_stops(run, tmp_path, flags, notes):
    code, output = run("run", *flags, sabotage=spoil("loss", range(2, 99)))
    assert code == 2 and output.count("note: the loss is nan") == notes and "Traceback" not in output, output
    assert f"the loss is nan at step {3 + notes}" in output and "the run diverged; lower --lr_init" in output
    assert not (tmp_path / "run/checkpoints").exists()


def test_a_short_run_without_any_finite_loss_is_an_error(run, tmp_path):
    """The run is over before it has rolled back too often."""
    code, output = run("run", "--epoch_steps", "2", sabotage=spoil("loss", range(2)))
    assert code == 2 and "error: no step of the run had a finite loss" in output, output
    assert "Traceback" not in output, output


def test_noise_is_no_spike():
    rng = random.Random(0)
    keeper = LastGood(20, 8.0)
    keeper.losses.extend(rng.gauss(2, 0.1) for _ in range(20))
    assert all(keeper.fault(rng.gauss(2, 0.1)) is None for _ in range(1000)) and keeper.fault(4.0)


def test_a_bound_is_made_of_the_median_and_the_deviation_from_it():
    """The bound of 20 losses, half 1.0 and half 1.2, is 1.1 + 3 x 1.4826 x 0.1; fewer losses have none."""
    keeper = LastGood(1, 3.0)
    keeper.losses.extend([1.0, 1.2] * 9 + [1.0])
    assert keeper.fault(99.0) is None and keeper.fault(math.inf) == "the loss is inf"
    keeper.losses.append(1.2)
    assert keeper.fault(1.5447) is None
    assert "above 1.5448, the bound by --spike_sigmas" in keeper.fault(1.5449)
    keeper.sigmas = 0.0
    assert keeper.fault(99.0) is None
