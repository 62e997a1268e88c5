"""What launchers tell, and that no rank outlives another."""

import os

import pytest
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment

from rwkv_miss.errors import UserError
from src import config as configuration
from src.files import is_first_process
from src.processes import check_world
from src.trainer import cluster_environment

FLAGS = ["--load_model", "base.pth", "--data_file", "rows.jsonl", "--strategy", "ddp"]
MEET = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
TORCHRUN = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1", "TORCHELASTIC_RUN_ID": "x", **MEET}
DEEPSPEED = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_SIZE": "2", "CROSS_RANK": "1", "CROSS_SIZE": "2", **MEET}
BY_HAND = {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "4", **MEET}
SRUN = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "2",
        "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2", "SLURM_JOB_ID": "123456", "SLURM_NODELIST": "gpu[07-08]"}


@pytest.fixture
def under(monkeypatch):
    """under(VARIABLES): the environment of a process with these and no others that launchers set."""

    def change(variables):
        for name in {*TORCHRUN, *DEEPSPEED, *SRUN, "NODE_RANK", "OMPI_COMM_WORLD_SIZE"}:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return change


@pytest.mark.parametrize(("variables", "sizes", "by"), [
    (TORCHRUN, (2, 2), "torchrun"), (DEEPSPEED, (2, 2), "deepspeed"), (SRUN, (2, 2), "srun"), (BY_HAND, (4, 1), "the launcher"),
    ({}, (1, 1), "default"),
])
def test_the_numbers_of_a_launcher_need_no_flags(under, variables, sizes, by):
    under(variables)
    argv = ["--local_rank=1", *FLAGS] if variables is DEEPSPEED else FLAGS
    config, origins = configuration.parse(argv)
    assert (config.devices, config.num_nodes) == sizes
    assert (origins["devices"], origins["num_nodes"]) == (by, by)
    assert check_world(config) == sizes[0] * sizes[1]
    assert is_first_process() == (not variables)


@pytest.mark.parametrize("variables", [TORCHRUN, DEEPSPEED, SRUN, BY_HAND])
def test_lightning_reads_the_ranks_that_the_launcher_set(under, variables):
    under(variables)
    environment = cluster_environment()
    assert type(environment) is (SLURMEnvironment if variables is SRUN else TorchElasticEnvironment)
    assert environment.creates_processes_externally
    assert (environment.global_rank(), environment.local_rank(), environment.world_size()) == (3, int(variables.get("LOCAL_RANK", 1)), 4)
    assert (environment.main_address, environment.main_port) == (("gpu07", 18456) if variables is SRUN else ("10.0.0.1", 29500))


@pytest.mark.parametrize("variables", [
    {},
    {name: SRUN[name] for name in ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_NNODES")} | {"SLURM_PROCID": "0"},  # sbatch without srun
    SRUN | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},  # srun --pty bash
])
def test_where_no_launcher_starts_them_lightning_does(under, variables):
    under(variables)
    config, _ = configuration.parse([*FLAGS, "--devices", "4"])
    assert (config.devices, check_world(config)) == (4, 4)
    environment = cluster_environment()
    assert type(environment) is LightningEnvironment and not environment.creates_processes_externally
    assert is_first_process()


@pytest.mark.parametrize(("variables", "flags", "words"), [
    (TORCHRUN, ["--devices", "4"], ["torchrun started 4 processes, 2 of them on this machine", "--devices is 2, but it is 4 (command line)"]),
    (DEEPSPEED, ["--num_nodes", "3"], ["deepspeed started 4 processes", "--num_nodes is 2, but it is 3"]),
    (SRUN, ["--devices", "4", "--num_nodes", "2"], ["srun started 4 processes", "drop --devices"]),
    (BY_HAND, ["--devices", "3"], ["4 is not a multiple"]),
    (TORCHRUN | {"WORLD_SIZE": "5"}, [], ["5 is not a multiple"]),
    (TORCHRUN | {"WORLD_SIZE": "many"}, [], ["WORLD_SIZE is 'many'"]),
    ({"RANK": "0", "WORLD_SIZE": "2"}, [], ["not LOCAL_RANK"]),
    ({name: BY_HAND[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}, [], ["MASTER_ADDR, MASTER_PORT not set"]),
    ({name: value for name, value in SRUN.items() if name != "SLURM_NTASKS_PER_NODE"}, [], ["--ntasks-per-node"]),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, [], ["mpirun started 2 processes", "torchrun"]),
    ({"WORLD_SIZE": "2"}, [], ["WORLD_SIZE is 2", "is 1"]),
    ({"NODE_RANK": "1"}, [], ["NODE_RANK is 1", "--num_nodes is 1"]),
    ({}, ["--num_nodes", "2"], ["MASTER_ADDR, MASTER_PORT, NODE_RANK not set"]),
    (MEET, ["--num_nodes", "2"], ["NODE_RANK not set"]),
    ({}, ["--local_rank=0"], ["unknown flag --local_rank"]),
])
def test_numbers_that_do_not_fit_together_are_errors_that_name_both(under, variables, flags, words):
    under(variables)
    with pytest.raises(UserError) as error:
        check_world(configuration.parse([*FLAGS, *flags])[0])
    for word in words:
        assert word in str(error.value)


def test_of_several_machines_only_the_first_prints(under):
    under(MEET | {"NODE_RANK": "1"})
    config, _ = configuration.parse([*FLAGS, "--num_nodes", "2", "--devices", "2"])
    assert check_world(config) == 4
    assert not is_first_process()
    assert "LOCAL_RANK" not in os.environ
