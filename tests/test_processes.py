"""Messages of launchers, and that no rank outlives another."""

import concurrent.futures
import contextlib
import functools
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

import pytest
from lightning.fabric.plugins.environments import (
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

import src.distributed.consistency
import src.distributed.watchdog
import src.training.run_folder
from rwkv_miss import read_checkpoint, write_checkpoint
from rwkv_miss.errors import UserError
from src import config as configuration
from src.common.first_process import is_first_process
from src.config.launcher import check_world
from src.distributed.watchdog import Watchdog, watchdog
from src.training.run_folder import list_checkpoints
from src.training.trainer import cluster_environment

from . import program
from .conftest import ROOT, make_arch, random_tensors, slow, write_rows

FLAGS = ["--load_model", "base.pth", "--data_file", "rows.jsonl", "--strategy", "ddp"]
MEET = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


def variables_of(text):
    return dict(one.split("=") for one in text.split())


def without(variables, *names):
    return {name: value for name, value in variables.items() if name not in names}


TORCHRUN = MEET | variables_of(
    "RANK=3 LOCAL_RANK=1 WORLD_SIZE=4 LOCAL_WORLD_SIZE=2 GROUP_RANK=1 TORCHELASTIC_RUN_ID=x"
)
DEEPSPEED = MEET | variables_of("RANK=3 LOCAL_RANK=1 WORLD_SIZE=4 LOCAL_SIZE=2 CROSS_RANK=1 CROSS_SIZE=2")
BY_HAND = {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "4", **MEET}
SRUN = variables_of("""
    SLURM_PROCID=3 SLURM_LOCALID=1 SLURM_NODEID=1 SLURM_NTASKS=4 SLURM_NTASKS_PER_NODE=2 SLURM_NNODES=2
    SLURM_STEP_NUM_TASKS=4 SLURM_STEP_NUM_NODES=2 SLURM_JOB_ID=123456 SLURM_NODELIST=gpu[07-08]
""")


TOO_MANY = " & --devices is 2, but it is 4 (command line)"
TWO_BY_TWO = ["--num_nodes", "2", "--devices", "2"]


@pytest.fixture
def under(monkeypatch):
    """under(VARIABLES): the environment of a process with these and no others that launchers set."""

    def change(variables):
        for name in {*TORCHRUN, *DEEPSPEED, *SRUN, "NODE_RANK", "OMPI_COMM_WORLD_SIZE"}:
            monkeypatch.setenv(name, "")  # so that what Lightning sets goes away again, too
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return change


@pytest.mark.parametrize(
    ("variables", "sizes", "by"),
    [
        (TORCHRUN, (2, 2), "torchrun"),
        (DEEPSPEED, (2, 2), "deepspeed"),
        (SRUN, (2, 2), "srun"),
        (BY_HAND, (4, 1), "the launcher"),
        ({}, (1, 1), "default"),
    ],
)
def test_the_numbers_of_a_launcher_need_no_flags(under, variables, sizes, by):
    under(variables)
    argv = ["--local_rank=1", *FLAGS] if variables is DEEPSPEED else FLAGS
    config = configuration.parse(argv)
    assert (config.devices, config.num_nodes) == sizes
    assert [config.origin_of(name) for name in ("devices", "num_nodes")] == [by, by]
    assert check_world(config.devices, config.num_nodes) == sizes[0] * sizes[1]
    assert is_first_process() == (not variables)


@pytest.mark.parametrize("variables", [TORCHRUN, DEEPSPEED, SRUN, BY_HAND])
def test_lightning_reads_the_ranks_that_the_launcher_set(under, variables):
    under(variables)
    environment = cluster_environment(2)
    assert type(environment) is (SLURMEnvironment if variables is SRUN else TorchElasticEnvironment)
    assert environment.creates_processes_externally
    assert (environment.global_rank(), environment.local_rank(), environment.world_size()) == (
        3,
        int(variables.get("LOCAL_RANK", 1)),
        4,
    )
    assert (environment.main_address, environment.main_port) == (
        ("gpu07", 18456) if variables is SRUN else ("10.0.0.1", 29500)
    )


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"MASTER_ADDR": "left.by.another.job"},
        {name: SRUN[name] for name in ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_NNODES")}
        | {"SLURM_PROCID": "0"},  # sbatch without srun
        SRUN | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},  # srun --pty bash
    ],
)
def test_where_no_launcher_starts_them_lightning_does(under, variables):
    under(variables)
    config = configuration.parse([*FLAGS, "--devices", "4"])
    assert (config.devices, check_world(config.devices, config.num_nodes)) == (4, 4)
    environment = cluster_environment(config.num_nodes)
    assert type(environment) is LightningEnvironment and not environment.creates_processes_externally
    assert environment.main_address == "127.0.0.1"
    assert is_first_process()


@pytest.mark.parametrize(
    ("variables", "flags", "words"),
    [
        (TORCHRUN, "--devices 4", "torchrun started 4 processes, 2 of them on this machine" + TOO_MANY),
        (DEEPSPEED, "--num_nodes 3", "deepspeed started 4 processes & --num_nodes is 2, but it is 3"),
        (SRUN, "--devices 4 --num_nodes 2", "srun started 4 processes & drop --devices"),
        (BY_HAND, "--devices 3", "4 is not a multiple"),
        (TORCHRUN | {"WORLD_SIZE": "5"}, "", "5 is not a multiple"),
        (TORCHRUN | {"WORLD_SIZE": "many"}, "", "WORLD_SIZE is 'many'"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "", "not LOCAL_RANK"),
        (without(BY_HAND, *MEET), "", "MASTER_ADDR, MASTER_PORT not set"),
        (without(SRUN, "SLURM_NTASKS_PER_NODE"), "", "--ntasks-per-node"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "", "mpirun started 2 processes & torchrun"),
        ({"WORLD_SIZE": "2"}, "", "WORLD_SIZE is 2 & is 1"),
        ({"NODE_RANK": "1"}, "", "NODE_RANK is 1 & --num_nodes is 1"),
        ({}, "--num_nodes 2", "MASTER_ADDR, MASTER_PORT, NODE_RANK not set"),
        (MEET, "--num_nodes 2", "NODE_RANK not set"),
        ({}, "--local_rank=0", "unknown flag --local_rank"),
    ],
)
def test_numbers_that_do_not_fit_together_are_errors_that_name_both(under, variables, flags, words):
    under(variables)
    with pytest.raises(UserError) as error:
        config = configuration.parse([*FLAGS, *flags.split()])
        check_world(config.devices, config.num_nodes)
    for word in words.split(" & "):
        assert word in str(error.value)


def test_of_several_machines_only_the_first_prints(under):
    under(MEET | {"NODE_RANK": "1"})
    config = configuration.parse([*FLAGS, "--num_nodes", "2", "--devices", "2"])
    assert check_world(config.devices, config.num_nodes) == 4
    assert not is_first_process()
    assert "LOCAL_RANK" not in os.environ


@pytest.mark.parametrize(
    ("variables", "flags", "place"),
    [
        (TORCHRUN, [], ("rank", 3, 4, "10.0.0.1", 29500)),
        (SRUN, [], ("rank", 3, 4, "gpu07", 18456)),
        (MEET | {"NODE_RANK": "1"}, TWO_BY_TWO, ("machine", 1, 2, "10.0.0.1", 29500)),
        # the second process of that machine, which Lightning has started, and of a run on one machine
        (MEET | variables_of("NODE_RANK=1 LOCAL_RANK=1 WORLD_SIZE=4"), TWO_BY_TWO, None),
        (MEET | {"NODE_RANK": "0", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}, ["--devices", "2"], None),
        (TORCHRUN | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}, [], None),
    ],
)
def test_each_process_that_no_other_one_looks_after_has_a_watchdog(under, variables, flags, place):
    under(variables)
    config = configuration.parse([*FLAGS, *flags])
    held = watchdog(config.devices, config.num_nodes)
    if place is None:
        assert isinstance(held, contextlib.nullcontext)
    else:
        assert (held.name, held.number, held.members, held.address, held.port) == (
            f"{place[0]} {place[1]} ({socket.gethostname()})",
            *place[1:],
        )


def hold_on(number, members, port, end):
    """A process with a watchdog, which ends as `end` tells for its number, or stays."""
    src.distributed.watchdog.GRACE, src.distributed.watchdog.LATECOMERS = 0.5, 2.0
    with Watchdog(number, members, "127.0.0.1", port):
        time.sleep(1)
        how = end.get(number, "stay")
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "fails":
            raise UserError("the data are gone")
        if how == "stay":
            time.sleep(60)


def members_of(end, members=3):
    """(exit codes of 3 members, what each printed) for what each of them does."""
    port = program.free_port()
    with tempfile.TemporaryDirectory() as folder:
        logs = [pathlib.Path(folder, str(number)) for number in range(members)]
        processes = [
            program.CONTEXT.Process(target=program.logged, args=(log, hold_on, number, members, port, end))
            for number, log in enumerate(logs)
        ]
        for process in reversed(processes):  # the one that all others wait for comes last
            process.start()
        for process in processes:
            process.join(300)
        return [process.exitcode for process in processes], [log.read_text() for log in logs]


@pytest.mark.parametrize(
    ("end", "words"),
    [
        ({1: "killed"}, "rank 1 ({host}) ended without a word"),
        ({0: "killed"}, "rank 0 ended without a word"),
        ({2: "fails"}, "rank 2 ({host}) failed: the data are gone"),
        ({0: "fails", 1: "fails", 2: "fails"}, "failed: the data are gone"),
        ({0: "fails"}, "rank 0 ({host}) failed: the data are gone"),
    ],
)
def test_who_dies_ends_the_others_on_any_machine(end, words):
    codes, logs = members_of(end)
    expected = {"killed": -signal.SIGKILL, "fails": 1, "leaves": 0, "stay": 1}
    assert codes == [expected[end.get(number, "stay")] for number in range(3)], logs
    for number in range(3):
        assert (words.format(host=socket.gethostname()) in logs[number]) == (number not in end)


def test_members_that_leave_one_after_another_disturb_nobody():
    codes, logs = members_of(dict.fromkeys(range(3), "leaves"))
    assert codes == [0, 0, 0]
    assert not any(logs)


def test_the_others_look_into_the_folder_when_the_first_one_holds_it(tmp_path, monkeypatch):
    """In threads, each of which is told its rank."""
    port, order = program.free_port(), []
    ranks = {}
    monkeypatch.setattr(
        src.training.run_folder, "is_first_process", lambda: ranks[threading.get_ident()] == 0
    )

    def member(rank):
        ranks[threading.get_ident()] = rank
        with Watchdog(rank, 2, "127.0.0.1", port) as line:
            if rank == 0:
                time.sleep(0.3)
                order.append("about to hold it")
            with src.training.run_folder.folder_of_run(str(tmp_path / "run"), line):
                order.append(f"{rank} is in")
                time.sleep(0.3)  # the first one stays until the other has answered

    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        list(threads.map(member, (1, 0)))
    assert order[0] == "about to hold it" and sorted(order[1:]) == ["0 is in", "1 is in"]


def test_a_stranger_at_the_port_is_no_member(monkeypatch, capsys):
    monkeypatch.setattr(src.distributed.watchdog, "PATIENCE", 0.1)
    port = program.free_port()
    with Watchdog(0, 2, "127.0.0.1", port) as line:
        place = int(line.store.get("watchdog").decode().split()[0])
        with socket.create_connection(("127.0.0.1", place)) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        time.sleep(0.2)
        assert not line.lines and not line.over
    assert (
        f"rank 0 ({socket.gethostname()}) waits for 1 of 1 others, to meet at 127.0.0.1:{port}"
        in capsys.readouterr().err
    )


@pytest.fixture(scope="module")
def machines(tmp_path_factory):
    """Two folders that stand for the disks of two machines: the second one has other rows and another base
    under other names.
    """
    folder = tmp_path_factory.mktemp("machines")
    for number in (0, 1):
        (folder / str(number)).mkdir()
        for name, seed in (("same", 0), ("other", number)):
            write_checkpoint(
                folder / f"{number}/{name}.pth",
                random_tensors(make_arch(7, vocab_size=256), seed=seed).items(),
            )
            write_rows(folder / f"{number}/{name}.jsonl", ({"text": f"{seed} and {row}"} for row in range(8)))
    return folder


def on_machine(folder, code, rank):
    os.chdir(folder / str(rank))
    if code:
        src.distributed.consistency.code_digest = lambda: f"version {rank}"


@pytest.mark.parametrize(
    ("base", "data", "code", "field"),
    [
        ("same", "other", False, "the data file is"),
        slow("other", "same", False, "the base file is"),
        slow("same", "same", True, "the code of this project is"),
    ],
)
def test_ranks_that_run_something_else_say_so_before_the_first_step(
    machines, tmp_path, base, data, code, field
):
    flags = f"""
        --load_model {base}.pth --data_file {data}.jsonl --proj_dir {tmp_path} --tokenizer bytes
        --accelerator cpu --devices 2 --strategy ddp --micro_bsz 1 --peft_config r=4
    """.split()
    code, output = program.run(flags, functools.partial(on_machine, machines, code))
    assert code == 2
    errors = [line for line in output.splitlines() if line.startswith("error:")]
    assert len(errors) == 2 and errors[0] == errors[1]
    assert f"rank 1 ({socket.gethostname()}) does not run what rank 0" in errors[0] and field in errors[0]
    assert not (tmp_path / "adapter.pth").exists() and not (tmp_path / "metrics.jsonl").exists()


def test_the_first_process_alone_writes_a_new_model(tmp_path):
    code, output = program.run(
        f"""
            --init_only 1 --peft none --version x070 --n_layer 1 --n_embd 64 --tokenizer bytes
            --data_file rows.jsonl --devices 2 --accelerator cpu --proj_dir {tmp_path}
        """.split()
    )
    assert code == 0 and "error" not in output and output.count("wrote ") == 1, output
    assert read_checkpoint(tmp_path / "rwkv-init.pth")


def processes_of(proj_dir):
    """pid -> rank on this machine, of the processes that train into a folder."""
    found = {}
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            words, env = ((folder / name).read_bytes().split(b"\0") for name in ("cmdline", "environ"))
        except OSError:
            continue
        if str(proj_dir).encode() in words and any(word.endswith(b"train.py") for word in words[1:3]):
            found[int(folder.name)] = int(
                dict(word.split(b"=", 1) for word in env if b"=" in word).get(b"LOCAL_RANK", 0)
            )
    return found


# a second process that takes long to end after its run, and a first one that ends as soon as that is over
SECOND = """
import atexit, sys, time
import train

atexit.register(lambda: (time.sleep(1.5), print("ended by itself", file=sys.stderr)))
train.config.parse = lambda argv: None
train.run.main = lambda typed: (print("the run is over", flush=True), ENDING)
train.main()
"""
FIRST = """
import os, subprocess, sys

env = {**os.environ, "LOCAL_RANK": "1"}
second = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE, env=env)
assert second.stdout.readline() == b"the run is over\\n"
"""


# the end of a complete run, and of a stopped one
@pytest.mark.parametrize("ending", ["None", slow("sys.exit(130)")])
def test_the_end_of_a_run_is_no_crash_for_a_process_that_ends_later(ending):
    words = [sys.executable, "-c", FIRST, SECOND.replace("ENDING", ending)]
    done = subprocess.run(words, cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "ended by itself\n")


@pytest.fixture
def run_folder(tmp_path):
    """The folder of a run, of which nothing is left when a test fails."""
    yield tmp_path / "run"
    for pid in processes_of(tmp_path / "run"):
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("launcher", "victim", "words"),
    [
        pytest.param(
            "",
            1,
            (
                "rank 1 of this machine, was killed by SIGKILL|rank: 1. Child process with PID .* terminated"
                " with code -9"
            ),
            marks=pytest.mark.rare,
        ),
        ("", 0, "rank 1 ends, because the process that started it is gone"),
        pytest.param(
            "deepspeed.launcher.runner --num_gpus 2",
            1,
            "rank 1 .* ended without a word",
            marks=pytest.mark.rare,
        ),
    ],
)
def test_a_killed_rank_leaves_no_process_and_a_whole_checkpoint(
    machines, tmp_path, run_folder, launcher, victim, words
):
    strategy = "deepspeed_stage_2" if launcher else "ddp --devices 2"
    flags = f"""
        --load_model {machines}/0/same.pth --data_file {machines}/0/same.jsonl --proj_dir {run_folder}
        --tokenizer bytes --accelerator cpu --strategy {strategy}
        --micro_bsz 1 --lr_init 1e-3 --epoch_count 100000 --peft_config r=4 --save_steps 5
    """.split()
    command = [
        sys.executable,
        *(["-m", *launcher.split()] if launcher else []),
        str(ROOT / "train.py"),
        *flags,
    ]
    with open(tmp_path / "log", "wb") as log:
        run = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=log, env={**os.environ, "DS_ACCELERATOR": "cpu"}
        )
    until = time.monotonic() + 120
    while (
        not list_checkpoints(run_folder / "checkpoints") and time.monotonic() < until and run.poll() is None
    ):
        time.sleep(0.2)
    ranks = processes_of(run_folder)
    assert sorted(ranks.values())[-2:] == [0, 1], (tmp_path / "log").read_text()
    os.kill(
        next(pid for pid, rank in ranks.items() if rank == victim and pid != (run.pid if launcher else None)),
        signal.SIGKILL,
    )
    killed = time.monotonic()
    assert run.wait(60) != 0
    while processes_of(run_folder) and time.monotonic() < killed + 60:
        time.sleep(0.2)
    assert not processes_of(run_folder)
    assert re.search(words, (tmp_path / "log").read_text())
    assert read_checkpoint(list_checkpoints(run_folder / "checkpoints")[-1])
