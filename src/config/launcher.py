"""Launcher of a run's processes, and their number.

| started by               | environment
|--------------------------|---------------------------------------------------------------------------
| `torchrun`               | RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT
| `deepspeed`              | the same, but LOCAL_SIZE for LOCAL_WORLD_SIZE; --local_rank=N before the flags
| `srun`                   | SLURM_PROCID, SLURM_LOCALID, SLURM_STEP_NUM_TASKS, SLURM_STEP_NUM_NODES
| `python`, one machine    | nothing: Lightning starts the other --devices - 1 processes, with LOCAL_RANK
| `python`, on each of several | MASTER_ADDR, MASTER_PORT, NODE_RANK, set by the user; then as on one machine
"""

from __future__ import annotations

import dataclasses
import os
import re
from typing import TYPE_CHECKING

from rwkv_miss.errors import UserError

if TYPE_CHECKING:
    from .schema import Config


PER_PROCESS = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
PER_MACHINE = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK")


@dataclasses.dataclass(frozen=True)
class Launch:
    """Launcher that starts all processes of a run, and their number."""

    by: str  # torchrun, deepspeed, srun, or "the launcher" for any other that sets RANK
    world: int  # processes of the run
    on_machine: int  # processes on this machine; 0 if the launcher does not tell


def launched() -> Launch | None:
    """Find the launcher that started this process together with all others.

    Returns None if `python` started this process, or Lightning as one of --devices.
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
        by = "the launcher"
        if "TORCHELASTIC_RUN_ID" in env:
            by = "torchrun"
        elif "CROSS_SIZE" in env:
            by = "deepspeed"
        on_machine = whole_number("LOCAL_WORLD_SIZE") or whole_number("LOCAL_SIZE")
        return Launch(by, whole_number("WORLD_SIZE"), on_machine)
    # SLURM_NTASKS is set without srun, too, within `sbatch` and `salloc`. A step of one task may be a shell.
    if (tasks := whole_number("SLURM_STEP_NUM_TASKS")) > 1:
        if "SLURM_NTASKS_PER_NODE" not in env:
            raise UserError(
                f"srun started {tasks} tasks; say how many on each machine: srun --ntasks-per-node N"
            )
        return Launch("srun", tasks, tasks // (whole_number("SLURM_STEP_NUM_NODES") or 1))
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if whole_number(name) > 1:
            raise UserError(
                f"mpirun started {env[name]} processes, but it does not tell them where to meet; use"
                " torchrun, deepspeed or srun"
            )
    return None


def starts_others(config: Config) -> bool:
    """Tell whether this process starts others, because no launcher has."""
    return config.devices > 1 and launched() is None


def whole_number(name: str) -> int:
    """Read a number in the environment; 0 if there is none."""
    try:
        return int(os.environ.get(name, 0))
    except ValueError:
        raise UserError(f"{name} is {os.environ[name]!r} in the environment; expected a number") from None


def local_rank() -> int:
    """Return the number of this process among those on this machine, from 0 on."""
    by_srun = (launch := launched()) is not None and launch.by == "srun"
    return whole_number("SLURM_LOCALID" if by_srun else "LOCAL_RANK")


def drop_local_rank(argv: list[str]) -> list[str]:
    """Drop the `--local_rank=N` that `deepspeed` puts before the flags.

    LOCAL_RANK says the same, so there is no such setting. Without LOCAL_RANK the flag stays, and is refused
    like any flag that does not exist.
    """
    return [
        word
        for word in argv
        if "LOCAL_RANK" not in os.environ or not re.fullmatch(r"--local[_-]rank=\d+", word)
    ]


def follow_launcher(config: Config) -> Config:
    """Return the settings with the launcher's --devices and --num_nodes where they were not given.

    Raises UserError where one was given and contradicts the launcher.
    """
    launch = launched()
    if launch is None:
        return config
    given = config.devices if "devices" in config.origins else max(launch.world // config.num_nodes, 1)
    devices = launch.on_machine or given
    told = f"{launch.by} started {launch.world} processes" + (
        f", {launch.on_machine} of them on this machine" if launch.on_machine else ""
    )
    if launch.world % devices:
        raise UserError(
            f"{told}, but every machine must have {devices}: {launch.world} is not a multiple of it"
        )
    for name, number in (("devices", devices), ("num_nodes", launch.world // devices)):
        if name not in config.origins:
            told_by = {**config.origins, name: launch.by}
            config = dataclasses.replace(config, **{name: number}, origins=told_by)
        elif getattr(config, name) != number:
            raise UserError(
                f"{told}, so that --{name} is {number}, but it is {getattr(config, name)}"
                f" ({config.origins[name]}); drop --{name}, or have {launch.by} start as many as it says"
            )
    return config


def check_world(devices: int, num_nodes: int) -> int:
    """Count the processes of the run. Raises UserError if the environment contradicts it."""
    world = devices * num_nodes
    launch, env = launched(), os.environ
    if launch is None and "WORLD_SIZE" in env and whole_number("WORLD_SIZE") != world:
        raise UserError(
            f"WORLD_SIZE is {env['WORLD_SIZE']} in the environment, but --devices x --num_nodes is {world};"
            " make them equal, or unset it"
        )
    if launch is None and whole_number("NODE_RANK") >= num_nodes:
        raise UserError(
            f"NODE_RANK is {env['NODE_RANK']} in the environment, but --num_nodes is {num_nodes}; the"
            " machines count from 0"
        )
    needed = _needed_variables(world, num_nodes, launch)
    missing = [name for name in needed if name not in env]
    if missing:
        raise UserError(
            f"{world} processes on {num_nodes} machines need {', '.join(needed)} in the environment of"
            f" each; {', '.join(missing)} not set. MASTER_ADDR and MASTER_PORT are the first machine's"
            " address and a free port of it, the same everywhere; NODE_RANK counts the machines from 0. Or"
            " use torchrun, deepspeed or srun, which set them"
        )
    return world


def _needed_variables(world: int, num_nodes: int, launch: Launch | None) -> tuple[str, ...]:
    """Name the variables that the environment must have so that the processes find each other."""
    if world == 1:
        return ()
    if launch is None:
        return PER_MACHINE if num_nodes > 1 else ()
    if launch.by == "srun":
        return ()
    return PER_MACHINE[:2]
