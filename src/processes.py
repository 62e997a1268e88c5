"""The processes of a run: what started them, how many there are, and that none outlives its launcher.

| started by               | what it tells
|--------------------------|---------------------------------------------------------------------------
| `torchrun`               | RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT
| `deepspeed`              | the same, but LOCAL_SIZE for LOCAL_WORLD_SIZE; --local_rank=N before the flags
| `srun`                   | SLURM_PROCID, SLURM_LOCALID, SLURM_STEP_NUM_TASKS, SLURM_STEP_NUM_NODES
| `python`, one machine    | nothing: Lightning starts the other --devices - 1 processes, with LOCAL_RANK
| `python`, on each of several | MASTER_ADDR, MASTER_PORT, NODE_RANK, set by the user; then as on one machine
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import socket
import struct
import sys
import threading
import time
from typing import TYPE_CHECKING

from rwkv_miss.errors import UserError

with contextlib.suppress(ImportError):
    import fcntl  # not on Windows

if TYPE_CHECKING:
    from .config import Config

PER_PROCESS = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
PER_MACHINE = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK")


@dataclasses.dataclass(frozen=True)
class Launch:
    """A launcher that starts all processes of a run, and their numbers; `on_machine` is 0 where it does not
    tell.
    """

    by: str  # torchrun, deepspeed, srun, or "the launcher" for any other that sets RANK
    world: int
    on_machine: int


def launched() -> Launch | None:
    """What started this process beside all others, or None where `python` did, or Lightning as one of
    --devices.
    """
    env = os.environ
    if "RANK" in env:
        missing = [name for name in PER_PROCESS if name not in env]
        if missing:
            raise UserError(
                f"RANK is set in the environment, but not {' and '.join(missing)}: a launcher sets"
                f" {', '.join(PER_PROCESS)}, MASTER_ADDR and MASTER_PORT for every process; set them all, or"
                " unset RANK"
            )
        by = (
            "torchrun"
            if "TORCHELASTIC_RUN_ID" in env
            else "deepspeed"
            if "CROSS_SIZE" in env
            else "the launcher"
        )
        return Launch(by, _number("WORLD_SIZE"), _number("LOCAL_WORLD_SIZE") or _number("LOCAL_SIZE"))
    # within `sbatch` and `salloc` SLURM_NTASKS is set without srun, too, and a step of one task may be a
    # shell
    if (tasks := _number("SLURM_STEP_NUM_TASKS")) > 1:
        if "SLURM_NTASKS_PER_NODE" not in env:
            raise UserError(
                f"srun started {tasks} tasks; say how many on each machine: srun --ntasks-per-node N"
            )
        return Launch("srun", tasks, tasks // (_number("SLURM_STEP_NUM_NODES") or 1))
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if _number(name) > 1:
            raise UserError(
                f"mpirun started {env[name]} processes, but it does not tell them where to meet; use"
                " torchrun, deepspeed or srun"
            )
    return None


def _number(name: str) -> int:
    """A number in the environment; 0 where there is none."""
    try:
        return int(os.environ.get(name, 0))
    except ValueError:
        raise UserError(f"{name} is {os.environ[name]!r} in the environment; expected a number") from None


def drop_local_rank(argv: list[str]) -> list[str]:
    """The flags without the `--local_rank=N` that `deepspeed` puts before them: LOCAL_RANK says the same, so
    there is no such setting.

    Without LOCAL_RANK it stays, and is refused like any flag that does not exist.
    """
    return [
        word
        for word in argv
        if "LOCAL_RANK" not in os.environ or not re.fullmatch(r"--local[_-]rank=\d+", word)
    ]


def follow_launcher(config: Config, origins: dict[str, str]) -> None:
    """Take --devices and --num_nodes from the launcher where they were not given; a contradiction is a
    UserError.
    """
    launch = launched()
    if launch is None:
        return
    given = config.devices if origins["devices"] != "default" else max(launch.world // config.num_nodes, 1)
    devices = launch.on_machine or given
    told = f"{launch.by} started {launch.world} processes" + (
        f", {launch.on_machine} of them on this machine" if launch.on_machine else ""
    )
    if launch.world % devices:
        raise UserError(
            f"{told}, but every machine must have {devices}: {launch.world} is not a multiple of it"
        )
    for name, number in (("devices", devices), ("num_nodes", launch.world // devices)):
        if origins[name] == "default":
            setattr(config, name, number)
            origins[name] = launch.by
        elif getattr(config, name) != number:
            raise UserError(
                f"{told}, so that --{name} is {number}, but it is {getattr(config, name)} ({origins[name]}); "
                f"drop --{name}, or have {launch.by} start as many as it says"
            )


def check_world(config: Config) -> int:
    """Number of processes of the run. A UserError where the environment does not fit to it."""
    world = config.world
    launch, env = launched(), os.environ
    if launch is None and "WORLD_SIZE" in env and _number("WORLD_SIZE") != world:
        raise UserError(
            f"WORLD_SIZE is {env['WORLD_SIZE']} in the environment, but --devices x --num_nodes is {world};"
            " make them equal, or unset it"
        )
    if launch is None and _number("NODE_RANK") >= config.num_nodes:
        raise UserError(
            f"NODE_RANK is {env['NODE_RANK']} in the environment, but --num_nodes is {config.num_nodes}; the"
            " machines count from 0"
        )
    needed = (
        ()
        if world == 1 or launch and launch.by == "srun"
        else PER_MACHINE[:2]
        if launch
        else PER_MACHINE
        if config.num_nodes > 1
        else ()
    )
    missing = [name for name in needed if name not in env]
    if missing:
        raise UserError(
            f"{world} processes on {config.num_nodes} machines need {', '.join(needed)} in the environment of"
            f" each; {', '.join(missing)} not set. MASTER_ADDR and MASTER_PORT are the first machine's"
            " address and a free port of it, the same everywhere; NODE_RANK counts the machines from 0. Or"
            " use torchrun, deepspeed or srun, which set them"
        )
    return world


def choose_interface(master: str) -> None:
    """Have gloo meet the other machines on the network interface over which this one is known or the first
    one is reached.

    By itself gloo takes the address of the host's name, which on many systems is that of the loopback,
    127.0.1.1.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ or sys.platform != "linux":
        return
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((master, 9))  # nothing is sent: it tells the address from which something would be
            mine = probe.getsockname()[0]
            names = [name for _, name in socket.if_nameindex() if _address_of(name, probe) == mine]
    except OSError as error:
        raise UserError(
            f"MASTER_ADDR {master} can't be reached from this machine ({error}); give the first machine's"
            " address in a network that all of them share"
        ) from None
    if mine.startswith("127."):
        raise UserError(
            f"MASTER_ADDR {master} is {mine} on this machine, where no other one reaches it; give its address"
            " in the network, or name the network's interface in GLOO_SOCKET_IFNAME"
        )
    os.environ["GLOO_SOCKET_IFNAME"] = names[0]


def _address_of(interface: str, probe: socket.socket) -> str:
    """IPv4 address of a network interface; empty where it has none."""
    get_address = 0x8915  # SIOCGIFADDR of linux/sockios.h: struct ifreq, the address at byte 20
    try:
        return socket.inet_ntoa(
            fcntl.ioctl(probe, get_address, struct.pack("256s", interface.encode()))[20:24]
        )
    except OSError:
        return ""


def watch_launcher() -> None:
    """End this process when the one that started it is gone: it would wait for ranks that never come, and
    keep its memory.

    For a child of torchrun, of deepspeed, and of Lightning; a process that was started from a shell may
    outlive that.
    """
    launch = launched()
    by_lightning = launch is None and _number("LOCAL_RANK") > 0
    if (
        sys.platform == "win32"
        or not by_lightning
        and (launch is None or launch.by not in ("torchrun", "deepspeed"))
    ):
        return
    parent = os.getppid()
    # Lightning starts its children in its own process group; another one's parent has taken over an orphan
    # already
    if by_lightning and os.getpgid(parent) != os.getpgrp():
        _end_as_orphan()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        _end_as_orphan()

    threading.Thread(target=watch, daemon=True, name="watch-launcher").start()


def _end_as_orphan() -> None:
    rank = os.environ.get("RANK") or os.environ.get("LOCAL_RANK")
    print(
        f"error: rank {rank} ends, because the process that started it is gone: it was killed, perhaps for"
        " memory",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)
