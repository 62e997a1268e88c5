"""`python train.py` and other programs in processes forked from one that has imported everything: a start
takes a tenth of a second instead of seconds.

What may be done to a run is here, too, and its losses are read.
"""

import functools
import math
import multiprocessing
import os
import pathlib
import runpy
import signal
import socket
import sys
import tempfile

import pytest
import torch

from rwkv_miss import read_checkpoint
from src.common.files import write_bytes
from src.model import RWKV
from src.planning.step_memory import StepBytes
from src.sources.estimates import Speed

from .conftest import ROOT, close, read_rows, write_rows

CONTEXT = multiprocessing.get_context("forkserver")
# Imported by the fork server, not by a worker of pytest, which would take 10 s for them. DeepSpeed's
# optimizers bring torch._inductor, a second of each process.
PRELOADED = [
    __name__,
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "matplotlib.backends.backend_agg",
    "matplotlib.pyplot",
    "torch.utils.tensorboard",
    "src.distributed.deepspeed_strategy",
    "src.run",
    "src.training.forgetting",
    "src.training.trainer",
    "src.training.validation",
]
CONTEXT.set_forkserver_preload(PRELOADED)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def logged(log, work, *args):
    """work(*args), with what it prints in a file; the target of a process."""
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = open(1, "w", encoding="utf-8")  # the inherited one would seek in what may now be a pipe
    work(*args)


def _few_bytes(*_, **__):
    return StepBytes(1e6, 1e6, 1e6, 0)


def _some_speed(*_):
    return Speed(1e4, 1e-4, "not measured")


def _draw_nothing(*args):
    [path] = [arg for arg in args if isinstance(arg, str) and arg.endswith(".png")]
    write_bytes(path, b"")


def _child(flags, rank, world, port, sabotage, counted, sample_tokens, forgetting):
    """Be one process of a run, after `sabotage` has been prepared."""
    import src.planning.memory
    import src.run
    import src.sources.held_out_loss
    import train
    from src.reporting import curves
    from src.training.forgetting import Forgetting

    os.chdir(ROOT)
    torch.set_num_threads(1)
    os.environ["DS_ACCELERATOR"] = "cpu"
    if world > 1:
        os.environ |= {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "NODE_RANK": "0",
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
        }
    src.sources.held_out_loss.SAMPLE_TOKENS = sample_tokens
    if not counted:
        src.planning.memory.step_bytes = _few_bytes
        src.run.speed_here = _some_speed
        curves.draw_losses = curves.draw_panels = _draw_nothing
    if not forgetting:
        for hook in ("on_fit_start", "on_train_end"):
            delattr(Forgetting, hook)
    if sabotage:
        sabotage(rank)
    sys.argv = ["train.py", *flags]
    train.main()


def flags_of(files, proj_dir, *more):
    """Return the flags of a small run with base.pth and rows.jsonl of a folder; `more` wins over them.

    All rows are trained on, where no flag is about evaluations.
    """
    paths = ("--load_model", files / "base.pth", "--data_file", files / "rows.jsonl", "--proj_dir", proj_dir)
    small = "--tokenizer bytes --accelerator cpu --micro_bsz 4 --lr_init 1e-2".split()
    if not {"grpo", "distill_on_policy"}.intersection(more):  # whose questions share no rows
        small += ["--packing", "0"]
    whole = [] if any(str(flag).startswith("--eval_") for flag in more) else ["--eval_split", "0"]
    return [str(word) for word in (*paths, *small, *whole, *more)]


def run(flags, sabotage=None, counted=False, sample_tokens=9, forgetting=False):
    """(exit code of rank 0, everything printed by the --devices processes); sabotage(rank) is called in each
    before the program starts. Without `counted` three things are left out, each a sixth or more of so small a
    run: the memory of a step is 1 MB, not counted; the speed is 10,000 tokens a second, not measured; and
    pictures are empty files. Without `forgetting` it is not measured at the end, a quarter of such a run.
    Sample answers have fewer tokens than users get, which take most of the time of a small run.
    """
    world = int(flags[flags.index("--devices") + 1]) if "--devices" in flags else 1
    port, asked = free_port(), (counted, sample_tokens, forgetting)
    with tempfile.TemporaryDirectory() as folder:
        logs = [pathlib.Path(folder, f"log-{rank}") for rank in range(world)]
        ranks = [
            CONTEXT.Process(
                target=logged,
                args=(logs[rank], _child, flags, rank, world, port, sabotage, *asked),
            )
            for rank in range(world)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(600)
        return ranks[0].exitcode, "".join(log.read_text() for log in logs)


def run_program(cwd, words):
    """Be a process of `python WORDS`."""
    os.chdir(cwd)
    sys.path[0] = str(cwd)
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # a chat ends at once
    sys.stdin = open(0, encoding="utf-8")
    sys.argv = list(words)
    if words[0] == "-m":
        sys.argv = [words[1], *words[2:]]  # runpy puts the file's name there
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(words[0], run_name="__main__")


def call(words, cwd=ROOT):
    """(exit code, everything printed) of `python WORDS`, which are strings."""
    with tempfile.TemporaryDirectory() as folder:
        log = pathlib.Path(folder, "log")
        process = CONTEXT.Process(target=logged, args=(log, run_program, cwd, words))
        process.start()
        process.join(600)
        return process.exitcode, log.read_text("utf-8")


def succeed(result):
    """Return what run() printed; the test fails where the program did."""
    code, output = result
    assert code == 0, output
    return output


def losses(proj_dir):
    """The loss of every step, of which none is missing and none is there twice."""
    lines = read_rows(proj_dir / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def lines(proj_dir, name="metrics.jsonl"):
    """Return every step's loss and metrics."""
    timing = ("seconds", "tokens_per_second", "draw_seconds", "draw_tokens_per_second")
    timing += ("train_tokens_per_second",)
    found = read_rows(proj_dir / name)
    return [{key: value for key, value in line.items() if key not in timing} for line in found]


def same_lines(got, want, rel=1e-5):
    """Compare the losses and metrics of two runs; equal where `rel` is 0."""
    assert len(got) == len(want) > 0
    for ours, theirs in zip(got, want):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            if isinstance(value, int | float):
                # differences of sums over tokens have the rounding errors of the sums
                value = pytest.approx(value, rel=rel, abs=1e-4 if rel else 0)
            assert ours[name] == value, name


def same_adapters(ours, theirs, ratio=1e-4, name="adapter.pth"):
    """Compare what two runs have trained; equal in every bit where the ratio is 0."""
    ours, theirs = (read_checkpoint(path / name) for path in (ours, theirs))
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        if ratio:
            close(name, ours[name], tensor, ratio)
        else:
            assert torch.equal(ours[name], tensor), name


# faults of a run: each is called as a `sabotage`, or by one


def later(function):
    """Return what makes function(*args) wait for its last argument, the rank."""
    return functools.partial(functools.partial, function)


def _at_file(change, number, proj_dir, what, rank):
    """Call `what` just before rank 0's file operation `number` (from 1) whose path in the run's folder
    contains `change`.
    """
    seen = 0

    def hook(event, args):
        nonlocal seen
        writes = (
            event in ("os.rename", "os.remove")
            or event == "open"
            and isinstance(args[2], int)
            and args[2] & (os.O_WRONLY | os.O_RDWR)
        )
        if rank == 0 and writes and str(args[0]).startswith(str(proj_dir)) and change in str(args[0]):
            seen += 1
            if seen == number:
                what()

    sys.addaudithook(hook)


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def _in_turn(first, second, rank):
    first(rank)
    second(rank)


def _spoil(kind, steps, rank):
    """Give steps (0-based) a loss or a gradient that is NaN, or leave out their update, on the last rank."""
    from src.training.trainer import FineTuning

    step_of = FineTuning.training_step
    update = torch.optim.AdamW.step

    def training_step(self, batch, index):
        loss = step_of(self, batch, index)
        if self.trainer.global_step not in steps or self.trainer.global_rank < self.trainer.world_size - 1:
            return loss
        if kind == "loss":
            self.step_loss = self.step_loss * math.nan
        return loss * math.nan

    if kind == "update":
        counter = iter(range(10**9))
        torch.optim.AdamW.step = lambda self, closure=None: (
            (closure(), None)[1] if next(counter) in steps else update(self, closure)
        )
    else:
        FineTuning.training_step = training_step


def _out_of_memory(place, rows, rank):
    """Run out of memory on rank 0 as a GPU does, with more than `rows` rows at once: in the forward, the
    backward, or the optimizer's step after it has written.
    """
    from src.training.trainer import FineTuning

    forward, step, largest = FineTuning.training_step, torch.optim.AdamW.step, [0]

    def run_out(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def training_step(module, batch, index):
        largest[0] = 0 if rank else len(batch.ids)
        if largest[0] > rows and place == "forward":
            run_out()
        loss = forward(module, batch, index)
        if largest[0] > rows and place == "backward":
            loss.register_hook(run_out)
        return loss

    def half_a_step(optimizer, *given, **named):
        result = step(optimizer, *given, **named)
        if largest[0] > rows:
            run_out()
        return result

    FineTuning.training_step = training_step
    if place == "optimizer":
        torch.optim.AdamW.step = half_a_step


at_file, in_turn, spoil, out_of_memory = map(later, (_at_file, _in_turn, _spoil, _out_of_memory))


def judge_late(rank):
    """Steps are reported and judged as on a GPU, which does its work behind the program."""
    from src.training import callbacks

    callbacks.works_behind = lambda device: True


def dropout(rank):
    """Drop out before the head, in training only."""
    features = RWKV.features

    def dropped(self, *args, **kwargs):
        x, state = features(self, *args, **kwargs)
        return torch.nn.functional.dropout(x, 0.2, self.training), state

    RWKV.features = dropped


def write_data(folder):
    """Write conversations, pairs, labelled answers and questions: 16 of each, and 5 held out."""
    for held, count in (("", 16), ("held-", 5)):
        talks = [(held + "q" * (i % 5 + 1), "ab c" * (1 + 7 * (i % 3))) for i in range(count)]
        kinds = {
            "rows": [
                {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}
                for asked, said in talks
            ],
            "pairs": [{"prompt": asked, "chosen": said, "rejected": f"{said[:5]}?"} for asked, said in talks],
            "answers": [
                {"prompt": f"{asked}{i}", "completion": said, "label": i % 3 > 0}
                for i, (asked, said) in enumerate(talks)
            ],
            "questions": [
                {"prompt": f"{asked}{i}:", "completion": "ab"} for i, (asked, _) in enumerate(talks)
            ],
        }
        for kind, rows in kinds.items():
            write_rows(folder / f"{held}{kind}.jsonl", rows)
