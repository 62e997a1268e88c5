"""Decisions before the weights are read: the steps of a run, and the memory that they may use."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from rwkv_miss.errors import UserError
from src.common import device
from src.config import AUTO, Config
from src.data.batches import make_schedule
from src.data.dataset import Document, Documents
from src.data.encode import Encoder
from src.data.formats import Report
from src.data.rwkv_template import DEFAULT
from src.data.tokenizer import load_tokenizer
from src.planning import plan
from src.planning.draft import Draft
from src.planning.plan import Data, Device, check_data_files, device_here, memory_of, plan_steps, read_data

from .conftest import write_rows

ENCODER = Encoder(load_tokenizer("bytes", 256))
DEVICE = Device("cpu", "fp32", "", "cpu", "")


def documents(count, length=9):
    return Documents([Document(np.arange(length + 1), np.ones(length + 1, bool)) for _ in range(count)])


def data(count, held_out=0):
    return Data(documents(count), documents(held_out) if held_out else Documents([]), Report(), ENCODER)


def test_several_processes_do_not_ask_what_is_free(monkeypatch):
    """Each would find another number, and choose another batch."""
    monkeypatch.setattr(plan, "free_memory", lambda accelerator: f"free of {accelerator}")
    monkeypatch.setattr(plan, "all_memory", lambda accelerator: f"all of {accelerator}")
    assert (memory_of(DEVICE, 1), memory_of(DEVICE, 2)) == ("free of cpu", "all of cpu")
    described = Device("gpu", "bf16", "", "cuda", "", memory=5, here=False)
    assert memory_of(described, 1) == memory_of(described, 2) == 5


@pytest.mark.parametrize(
    "settings, memory, batch",
    [
        # (micro_bsz, accumulate, world, steps of a pass over 4801 rows)
        ({}, 890, (8, 1, 1, 601)),
        ({}, 880, (4, 2, 1, 601)),
        ({"devices": 2}, 880, (4, 1, 2, 601)),
        ({"micro_bsz": 3}, 1, (3, 1, 1, 1601)),
        ({"micro_bsz": 3, "accumulate_grad_batches": 2, "num_nodes": 2}, 1, (3, 2, 2, 401)),
        ({"global_bsz": 24, "devices": 2}, 700, (6, 2, 2, 201)),
        ({"global_bsz": 24, "micro_bsz": 4}, 1, (4, 6, 1, 201)),
    ],
)
def test_the_steps_have_the_batch_that_fits_into_nine_tenths(monkeypatch, settings, memory, batch):
    """A row needs 100."""
    monkeypatch.setattr(plan, "estimate", lambda tried, *_: tried.micro_bsz * 100)
    monkeypatch.setattr(plan, "needed", lambda size, *_: size)
    monkeypatch.setattr(plan, "memory_of", lambda device, world: memory)
    draft = Draft(Config(**settings, packing=False, ctx_len=256, grad_cp=0))
    schedule = plan_steps(draft, None, DEVICE, data(4801))
    assert (schedule.micro_bsz, schedule.accumulate, schedule.world, schedule.steps_per_pass) == batch
    assert schedule == make_schedule(documents(4801), draft.config, batch[2]), (
        "what the trainer makes of the settings"
    )


@pytest.mark.parametrize(
    "rows, held_out, settings, length",
    [
        # (epoch_count, eval_steps, early_stop, warmup_steps)
        (4800, 20, {}, (1, AUTO, AUTO, 30)),
        (8008, 20, {}, (1, AUTO, AUTO, 50)),
        (2400, 20, {"eval_steps": 20, "epoch_count": 2}, (2, 20, AUTO, 30)),
    ],
)
def test_the_length_follows_from_the_steps_of_one_pass(monkeypatch, rows, held_out, settings, length):
    """A step has 8 rows, as all of them fit."""
    monkeypatch.setattr(plan, "estimate", lambda *_: 0)
    monkeypatch.setattr(plan, "needed", lambda *_: 0)
    draft = Draft(Config(**settings, packing=False, ctx_len=256, save_steps=-2))
    schedule = plan_steps(draft, None, DEVICE, data(rows, held_out))
    config = draft.config
    assert config.save_steps == 2 * rows / 8, "two passes"
    assert (config.epoch_count, config.eval_steps, config.early_stop, config.warmup_steps) == length
    assert config.total_steps(schedule.steps_per_pass) == length[0] * rows / 8
    assert draft.config.origins["warmup_steps"] == "chosen: 5% of the run"


def test_an_epoch_is_the_data_once_or_epoch_steps():
    schedule = make_schedule(documents(10), Config(packing=False, ctx_len=256, micro_bsz=4), 1)
    assert schedule.steps_per_pass == 3
    assert [Config(epoch_count=count).total_steps(3) for count in (1, 2)] == [3, 6]
    assert Config(epoch_count=2, epoch_steps=5).total_steps(3) == 10


@pytest.mark.parametrize("missing", ["data_file", "eval_file"])
def test_data_that_are_not_there_are_named_before_anything_is_read(tmp_path, missing):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "a"}) + "\n")
    files = dict.fromkeys(("data_file", "eval_file"), str(tmp_path / "rows.jsonl"))
    check_data_files(Config(**files))
    with pytest.raises(UserError, match="absent.jsonl"):
        check_data_files(Config(**files | {missing: str(tmp_path / "absent.jsonl")}))


@pytest.mark.parametrize("prompts, held", [(30, 5), (20, 5), (19, 0), (1, 0)])
def test_equal_rows_count_once_where_few_are_held_out(tmp_path, prompts, held):
    """30 rows; of one prompt or text none can be held out alone."""
    rows = [{"text": f"ab{i % prompts}"} for i in range(30)]
    write_rows(tmp_path / "rows.jsonl", rows)
    config = Config(data_file=str(tmp_path / "rows.jsonl"), data_cache="none")
    found = read_data(Draft(config), load_tokenizer("bytes", 256, ""), DEFAULT)
    assert (len(found.held_out) >= held) if held else not found.held_out
    assert len(found.documents) + len(found.held_out) == 30


def test_a_bad_row_is_named_with_the_flag_that_leaves_it_out(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"text": 5}\n')
    config, tokenizer = (
        Config(data_file=str(tmp_path / "rows.jsonl"), data_cache="none"),
        load_tokenizer("bytes", 256, ""),
    )
    with pytest.raises(UserError, match="rows.jsonl, line 2: .*; --on_bad_row skip leaves such rows out"):
        read_data(Draft(config), tokenizer, DEFAULT)
    skipping = dataclasses.replace(config, on_bad_row="skip")
    assert len(read_data(Draft(skipping), tokenizer, DEFAULT).documents) == 1


@pytest.mark.parametrize(
    "environment, taken",
    [
        ({}, []),
        ({"LOCAL_RANK": "1"}, [1]),  # by Lightning
        ({"LOCAL_RANK": "1", "RANK": "3", "WORLD_SIZE": "4"}, [1]),
        # srun binds each task to one GPU, or shows all to all
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS_PER_NODE": "2", "SLURM_LOCALID": "1"}, [1]),
        ({"LOCAL_RANK": "5"}, [1]),
    ],
)
def test_kernels_are_tested_on_the_gpu_of_the_process(monkeypatch, environment, taken):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    set_to, seen = [], []
    monkeypatch.setattr(plan, "choose_accelerator", lambda *_: "gpu")
    monkeypatch.setattr(plan, "choose_precision", lambda *_: ("bf16", ""))
    monkeypatch.setattr(plan.ops, "choose", lambda *_: (seen.extend(set_to), ("cuda", ""))[1])
    monkeypatch.setattr(plan.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(plan.torch.cuda, "set_device", set_to.append)
    assert device_here(Config(), 64).kernel == "cuda" and seen == taken


def test_a_package_that_the_strategy_needs_is_asked_for_first(monkeypatch):
    """Before a base is read or a file is written."""
    monkeypatch.setattr(plan.importlib.util, "find_spec", lambda name: None)
    device_here(Config(accelerator="cpu", wkv="torch"), 64)
    with pytest.raises(UserError, match="--strategy deepspeed_stage_2 needs the package deepspeed"):
        device_here(Config(accelerator="cpu", wkv="torch", strategy="deepspeed_stage_2"), 64)


@pytest.mark.parametrize(
    "features, multiplies",
    [("flags : avx512f avx512_bf16", True), ("Features : asimd bf16", True), ("flags : avx2", False)],
)
def test_a_cpu_is_told_whether_bf16_is_fast_on_it(monkeypatch, features, multiplies):
    monkeypatch.setattr(device, "cpu_features", lambda: features)
    assert device.multiplies_bf16() == multiplies
    assert device.choose_precision("auto", "cpu") == (
        "fp32",
        "auto: a CPU" + "; --precision bf16 takes less memory, and may be faster" * multiplies,
    )
    asked = device.choose_precision("bf16", "cpu")
    assert asked == (
        "bf16",
        "as asked" + "; this CPU has no products in it, and is slower than in fp32" * (not multiplies),
    )


@pytest.mark.parametrize("has_bf16", [False, True])
def test_a_gpu_without_bf16_gets_fp16(monkeypatch, has_bf16):
    """torch emulates bf16 on Turing, which counts as none."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bf16)
    assert device.choose_precision("auto", "gpu")[0] == ("bf16" if has_bf16 else "fp16")
    asked = device.choose_precision("bf16", "gpu")
    slower = "" if has_bf16 else "; this GPU has no bf16, and is slower than in fp16"
    assert asked == ("bf16", f"as asked{slower}")
