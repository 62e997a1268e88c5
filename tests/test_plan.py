"""The plan: memory counted from the code, what real runs take, and which change mends a run that does not
fit.
"""

import ctypes
import dataclasses
import json
import resource
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from benchmarks import memory as benchmark
from benchmarks.common import write_random_base
from rwkv_miss import UserError
from scripts import plan
from src import ops
from src.common import available_memory, startup
from src.common.available_memory import GIB, parse_size
from src.common.freed_memory import HEAP_LIMIT, freed_memory_kept
from src.common.startup import Start
from src.config import Config
from src.config.launcher import PER_PROCESS, starts_others
from src.data.batches import make_schedule
from src.data.collate import collate
from src.data.dataset import Document, Documents
from src.model import RWKV
from src.planning import memory, throughput
from src.planning.base_model import build_model, read_base
from src.planning.defaults import cheapest_fix
from src.planning.draft import Draft
from src.planning.memory import memory_parts
from src.planning.plan import estimate
from src.planning.step_memory import Live, StepBytes, step_bytes
from src.sources import source_of
from src.sources.estimates import fullest_rows, largest_batch

from .conftest import ROOT, make_arch, settled_config, slow, write_rows

SIZES = {"n_layer": 3, "n_embd": 48, "head_size": 16, "vocab_size": 67}


@pytest.fixture
def few_bytes(monkeypatch):
    """Give every step some bytes, not counted, where a test asks for the other parts."""
    monkeypatch.setattr(memory, "step_bytes", lambda *_, **__: StepBytes(1e6, 2e6, 2e6, 0))


@pytest.fixture
def counted_once(monkeypatch):
    """Count the bytes of a step once, whichever plans ask for it."""
    known = {}

    def once(*args, **options):
        key = repr((args, options))
        if key not in known:
            known[key] = step_bytes(*args, **options)
        return known[key]

    monkeypatch.setattr(memory, "step_bytes", once)


def bytes_of_a_step(model, grad_cp, batch, loss):
    """(activations, peak) of loss() and its backward pass on real tensors."""
    model.grad_cp = grad_cp
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    with Live([*model.parameters(), *model.buffers(), *grads, *batch.tensors().values()]) as live:
        kept = live.after(model, "features")
        loss().backward()
    return max(kept), live.peak


def counted_in_training(config, rows, kernel):
    """(activations, peak) of a real micro-batch in the trainer's own step, on real tensors."""
    from src.sources.base import Feed, TrainingData
    from src.training.trainer import FineTuning

    model = build_model(config, make_arch(config_version(config), **SIZES), kernel, torch.float32)
    documents = Documents(
        [
            Document(torch.arange(n + 1).numpy() % 67, torch.ones(n + 1).bool().numpy())
            for row in rows
            for n in row
        ]
    )
    module = FineTuning(model, source_of(config), TrainingData(documents, Documents([])), 1)
    module.accumulate, module.feed = 1, Feed((), None)
    module._trainer = type("Trainer", (), {"world_size": 1})()
    place, grouped = 0, []
    for row in rows:
        grouped.append(documents.items[place : place + len(row)])
        place += len(row)
    batch = collate(grouped, 1, config.chunk_ctx).having(width=sum(rows[0]))
    return bytes_of_a_step(model, config.grad_cp, batch, lambda: module.training_step(batch, 0))


def config_version(config):
    return int(config.load_model[-5])


@pytest.mark.parametrize(
    "version, peft, grad_cp, packed, chunk, kernel, quant",
    [
        (6, "miss", 0, True, 0, "torch", "none"),
        (7, "lora", 0, False, 0, "torch", "nf4"),
        (6, "miss", 0, True, 0, "cpu", "int8"),
        (7, "miss", 0, True, 0, "cpu", "none"),
        (7, "miss", 1, True, 16, "cpu", "none"),
        (7, "none", 0, True, 0, "cpu", "none"),
        slow(7, "lora", 2, True, 0, "cpu", "none"),
        slow(7, "mos", 0, True, 0, "torch", "none"),
        slow(6, "vera", 1, True, 0, "torch", "int8"),
        (7, "bat", 0, False, 0, "cpu", "none"),
        (6, "bat, row", 0, True, 0, "cpu", "none"),
        slow(7, "prolora", 1, True, 0, "torch", "none"),
        (7, "mora", 0, True, 0, "cpu", "nf4"),
        (7, "miss, magnitude", 0, True, 0, "cpu", "none"),
        (7, "miss, layers", 0, True, 0, "cpu", "none"),
        (7, "state", 0, True, 0, "cpu", "none"),
        (6, "state", 2, True, 0, "cpu", "none"),
        (7, "state", 0, True, 16, "cpu", "none"),
        slow(7, "state", 0, False, 0, "cpu", "none"),
        slow(7, "miss, state", 1, True, 0, "torch", "nf4"),
    ],
)
def test_the_count_is_that_of_the_trainers_step(
    checkpoint, version, peft, grad_cp, packed, chunk, kernel, quant
):
    """To the last activation, and the peak but for what reset makes of a mask."""
    peft, _, option = peft.partition(", ")
    options = {"none": {}, "state": {}, "bat": {"r": 4}}.get(peft, {"r": 5}) | {
        "row": {"order": "row"},
        "magnitude": {"magnitude": True},
    }.get(option, {})
    config = settled_config(
        load_model=str(checkpoint(version, name=f"v{version}.pth", **SIZES)),
        peft=peft,
        grad_cp=grad_cp,
        packing=packed,
        micro_bsz=2,
        chunk_ctx=chunk,
        quant=quant,
        precision="fp32",
        peft_config=options,
        train_parts="state" if option == "state" else "",
        layers="last:1" if option == "layers" else "",
    )
    # the kernel in torch takes operators for each token, and every operator is counted
    tokens = 12 if kernel == "torch" else 37
    rows = [[tokens // 2, tokens - tokens // 2], [tokens]] if packed else [[tokens], [tokens]]
    activations, peak = counted_in_training(config, rows, kernel)
    step = step_bytes(make_arch(version, **SIZES), config, kernel, "fp32", tokens, 2 * tokens, documents=rows)
    assert step.activations == pytest.approx(activations, abs=8)  # two losses, of one chunk and of all
    assert peak == pytest.approx(step.peak, rel=0.01)
    assert step.large == 0 and step.small == step.peak


@pytest.mark.parametrize("layers", ["", "last:5"])
def test_a_deep_model_is_the_sum_of_its_layers(layers):
    deep = make_arch(7, **SIZES | {"n_layer": 7})
    config = settled_config(peft_config={"r": 5}, micro_bsz=2, grad_cp=1, layers=layers)
    from src.planning import step_memory

    at_once = step_memory._count(deep, config, "cpu", "fp32", 37, 74)
    assert dataclasses.astuple(step_bytes(deep, config, "cpu", "fp32", 37, 74)) == pytest.approx(
        dataclasses.astuple(at_once), rel=1e-3
    )


@pytest.mark.parametrize("sparse", [False, True])
def test_a_long_row_is_counted_by_its_first_chunks_and_the_states_of_the_others(monkeypatch, sparse):
    from src.planning import step_memory

    arch, config = (
        make_arch(7, **SIZES | {"n_layer": 1}),
        settled_config(peft_config={"r": 5}, micro_bsz=2, chunk_ctx=5, packing=False, state_cp=sparse),
    )
    extrapolated = step_bytes(arch, config, "cpu", "fp32", 48, 96)  # 10 chunks
    monkeypatch.setattr(step_memory, "COUNTED_CHUNKS", 99)
    at_once = step_bytes(arch, config, "cpu", "fp32", 48, 96)
    assert dataclasses.astuple(extrapolated) == pytest.approx(dataclasses.astuple(at_once), rel=1e-3)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library is not glibc")
def test_what_a_step_frees_is_kept_for_the_next_one_and_returned_at_the_end():
    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        [torch.ones(HEAP_LIMIT // 32) for _ in range(16)]  # 64 MB are 16,384 pages
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    with freed_memory_kept():
        kept = min([faults() for _ in range(3)])
    assert kept < 4096 < 10000 < faults()


def test_large_blocks_are_counted_apart():
    kept = []
    with Live([]) as live:
        kept.append(torch.empty(HEAP_LIMIT, dtype=torch.uint8))
        kept.append(torch.empty(HEAP_LIMIT + 1, dtype=torch.uint8))
        view = kept[1][1:]
        kept.clear()
        assert live.now == HEAP_LIMIT + 1
        del view
        kept.append(torch.empty(7, dtype=torch.uint8))
    assert (live.now, live.small, live.large, live.peak) == (
        7,
        HEAP_LIMIT,
        HEAP_LIMIT + 1,
        2 * HEAP_LIMIT + 1,
    )


def test_documents_that_begin_with_a_tuned_state_are_planned_for():
    """They are copied out of rows that have several, with padding; the fullest rows are counted."""
    arch, config = make_arch(7, **SIZES), settled_config(micro_bsz=2, peft="state", ctx_len=40)
    alone, halves, thirds = (
        step_bytes(arch, config, "cpu", "fp32", 36, 72, documents=[lengths] * 2).peak
        for lengths in ([36], [18, 18], [17, 17, 2])
    )
    assert 1.1 * alone < halves < thirds
    tokens = [Document(np.zeros(n + 1, np.int32), np.ones(n + 1, np.float32)) for n in (17, 17, 2, 30, 8, 40)]
    documents = Documents(tokens)
    schedule = make_schedule(documents, config, 1)
    rows = fullest_rows(documents, schedule, config.micro_bsz)
    assert sorted(map(sorted, rows)) == [[2, 8, 30], [17, 17]]
    wanted = step_bytes(arch, config, "cpu", "fp32", 40, 80, documents=rows)
    found = estimate(
        dataclasses.replace(config, accelerator="cpu", wkv="cpu", precision="fp32"), arch, schedule, documents
    )
    assert found["activations"] == wanted.activations and found["Adam"] == 8 * 3 * 48 * 16


def test_tensor_cores_save_what_the_kernel_asks_for():
    arch, config = (
        make_arch(7, n_layer=2, n_embd=128, head_size=64, vocab_size=67),
        settled_config(peft_config={"r": 5}, packing=False, micro_bsz=2),
    )
    exact, chunked = (
        step_bytes(arch, config, kernel, "bf16", 64, 64).activations for kernel in ("cuda-exact", "cuda")
    )
    from src.ops.native import saved_floats

    assert chunked - exact == 2 * 4 * (
        saved_floats(7, True, 2, 64, 2, 64) - saved_floats(7, False, 2, 64, 2, 64)
    )


def test_the_parts_of_the_7b_model_are_the_papers_sizes(few_bytes):
    arch = make_arch(6, n_layer=32, n_embd=4096, head_size=64, vocab_size=65536)
    config = settled_config(micro_bsz=1, grad_cp=1)
    parts = memory_parts(arch, config, "gpu", "cuda", "bf16", 64, 64)
    assert parts["trained"] == parts["gradients"] == parts["Adam"] / 2 == 4 * 88_080_384
    assert 14 < parts["base"] / GIB < 14.5  # 7.6 B parameters of 2 bytes
    assert "rollback" not in parts
    assert memory_parts(arch, config, "cpu", "cpu", "bf16", 64, 64)["rollback"] == 24 * 88_080_384


def test_zero_divides_the_parts_of_its_stage(few_bytes):
    arch = make_arch(7, **SIZES)

    def parts(**settings):
        return memory_parts(
            arch,
            settled_config(peft_config={"r": 5}, micro_bsz=8, **settings),
            "gpu",
            "torch",
            "bf16",
            16,
            16,
        )

    one, divided = parts(), {}
    for stage in (1, 2, 3):
        shared = parts(strategy=f"deepspeed_stage_{stage}", devices=4)
        divided[stage] = {name for name, size in one.items() if shared[name] == size / 4}
    assert divided == {1: {"Adam"}, 2: {"Adam", "gradients"}, 3: {"Adam", "gradients", "trained", "base"}}


def test_no_part_is_negative_where_the_count_goes_on_from_few_layers():
    """The kept activations of 61 layers with --grad_cp came out larger than the peak."""
    arch = make_arch(7, n_layer=61, n_embd=4096, head_size=64, vocab_size=65536)
    parts = memory_parts(arch, settled_config(micro_bsz=1, grad_cp=1), "gpu", "cuda", "bf16", 1024, 1024)
    assert min(parts.values()) >= 0, parts


def test_what_deepspeed_holds_in_addition_to_its_shares(few_bytes):
    """DeepSpeed holds a master copy, a bucket, and under stage 3 the parameters that are whole at one time;
    with offload all but those is in the CPU's memory.
    """
    arch = make_arch(7, **SIZES)

    def parts(strategy, **settings):
        config = settled_config(
            peft_config={"r": 5}, strategy=f"deepspeed_stage_{strategy}", micro_bsz=8, **settings
        )
        return memory_parts(arch, config, "gpu", "torch", "bf16", 16, 16)

    one, two, three = parts("2"), parts("2", devices=4), parts("3", devices=4)
    assert one["DeepSpeed"] == parts("3")["DeepSpeed"] == 2 * one["trained"]
    assert two["DeepSpeed"] == one["trained"] * 1.25
    # all of so small a model, in bf16
    assert three["DeepSpeed"] - two["DeepSpeed"] == pytest.approx(one["base"] + one["trained"] / 2)
    away = [
        {name for name, size in parts(f"{stage}_offload").items() if not size and one[name]}
        for stage in (1, 2, 3)
    ]
    assert away == [{"Adam", "gradients"}, {"Adam", "gradients"}, {"Adam", "gradients", "trained", "base"}]


@pytest.mark.parametrize(
    "accelerator, vocab_size, ahead", [("cpu", 65536, 10_000_000), ("gpu", 262144, 50_000_000)]
)
def test_stage_3_holds_its_largest_parameter_whole(few_bytes, accelerator, vocab_size, ahead):
    arch = make_arch(7, **SIZES | {"vocab_size": vocab_size, "n_embd": 768, "head_size": 64})
    two, three = (
        memory_parts(
            arch,
            settled_config(peft_config={"r": 5}, micro_bsz=1, strategy=f"deepspeed_stage_{n}", devices=4),
            accelerator,
            "torch",
            "bf16",
            16,
            16,
        )["DeepSpeed"]
        for n in "23"
    )
    assert three - two == 2 * (vocab_size * 768 + ahead)


def test_stage_3_leaves_no_holes_in_the_heap_of_a_cpu(few_bytes):
    two, three = (
        memory_parts(
            make_arch(7, **SIZES),
            settled_config(peft_config={"r": 5}, micro_bsz=1, strategy=f"deepspeed_stage_{n}", devices=2),
            "cpu",
            "torch",
            "fp32",
            16,
            16,
        )["allocator"]
        for n in "23"
    )
    assert two > 0 and three == 0


def test_the_processes_of_a_cpu_share_its_memory():
    parts = {"base": 100.0, "working": 20.0}
    assert memory.needed(parts, 3, "cpu") == 360 and memory.needed(parts, 3, "gpu") == 120


def test_free_is_what_machine_and_container_have_with_what_is_held_already(monkeypatch):
    for available, limit in ((1000, 700), (700, 1000)):
        monkeypatch.setattr(available_memory, "_available", lambda available=available: available)
        monkeypatch.setattr(available_memory, "_cgroup_limit", lambda limit=limit: limit)
        monkeypatch.setattr(available_memory, "_resident", lambda: 50)
        assert available_memory.free_memory("cpu") == 750


def test_a_speed_is_that_of_all_layers_and_of_the_trained_share_of_the_head(monkeypatch):
    seconds = {"layers": 4.0, "forward": 1.5, "logits": 3.0, "next_token": 0.5, "next_logits": 0.25}
    monkeypatch.setattr(throughput, "_fastest", lambda work, device: [work(), seconds[work.__name__]][1])
    for row, tokens in ((37, 37), (9999, 256)):
        speed = throughput.measured_speed(
            make_arch(7, **SIZES | {"n_layer": 6}),
            settled_config(peft_config={"r": 5}),
            "torch",
            "fp32",
            "cpu",
            row,
            0.5,
        )
        assert speed.tokens == pytest.approx(tokens / (4.0 * 6 / 2 + 0.5 * 3.0))
        assert speed.answer == 0.5 * 6 / 2 + 0.25
    fewer = settled_config(peft_config={"r": 5}, layers="last:2")
    arch = make_arch(7, **SIZES | {"n_layer": 6})
    speed = throughput.measured_speed(arch, fewer, "torch", "fp32", "cpu", 37, 0.5)
    assert speed.tokens == pytest.approx(37 / (4.0 * 2 / 2 + 1.5 * 4 / 2 + 0.5 * 3.0))


@pytest.mark.parametrize("each, rows", [(0.001, 8), (throughput.ENOUGH / 3, 4)])
def test_rows_of_a_narrow_model_are_timed_together(monkeypatch, each, rows):
    """As many as a micro-batch has, by doubling, or until they take long enough. `each`: seconds of a row."""
    read, features = [], RWKV.features
    monkeypatch.setattr(
        RWKV, "features", lambda model, ids: [read.append(ids.shape), features(model, ids)][1]
    )

    def seconds(work, device):
        work()
        return each * read[-1][0] if work.__name__ == "layers" else 0.0

    monkeypatch.setattr(throughput, "_fastest", seconds)
    arch, config = make_arch(7, **SIZES), settled_config(peft_config={"r": 5}, micro_bsz=12, eval_samples=0)
    speed = throughput.measured_speed(arch, config, "torch", "fp32", "cpu", 20, 0.5)
    assert read[-1] == (rows, 20) and speed.tokens == pytest.approx(20 / each * 2 / arch.n_layer)


def test_the_time_of_a_run_has_what_the_command_loads(monkeypatch):
    """Work done so far counts as it is, the trainer as a multiple of the CPU time of the first
    imports. Processes that it starts load all of it once more, after it."""
    begun = time.time()
    monkeypatch.setattr(time, "process_time", lambda: 3.0)
    start = Start.of_process()
    assert start.imports == 3.0 and 0 < start.at < begun
    with open("/proc/uptime") as uptime:
        assert time.time() - start.at < float(uptime.read().split()[0])
    monkeypatch.setattr(time, "time", lambda: 110.0)
    loading = Start(100.0, 3.0).loading
    assert loading(False) == 10 + startup.TRAINER_IMPORTS * 3 and loading(True) == 2 * loading(False)


def test_python_starts_the_other_processes_and_a_launcher_has(monkeypatch):
    assert starts_others(Config(devices=2)) and not starts_others(Config(devices=1))
    for name in PER_PROCESS:
        monkeypatch.setenv(name, "1")
    assert not starts_others(Config(devices=2))


@pytest.mark.parametrize(
    "method,options",
    [("dora", {}), ("miss", {"magnitude": True}), ("pissa", {}), ("adalora", {}), ("vera", {}), ("mos", {})],
)
def test_the_speed_of_methods_that_derive_something_from_the_weight(method, options):
    """The operators refuse NaN, which norms that are none would make."""
    config = settled_config(peft=method, peft_config={"r": 5, **options})
    assert (
        throughput.measured_speed(
            make_arch(7, **SIZES), config, ops.choose("auto", "cpu", 16)[0], "fp32", "cpu", 20, 0.5
        ).tokens
        > 0
    )


def test_what_the_first_call_imports_is_not_timed(monkeypatch):
    """torch imports for a second and more where the first activations are recomputed."""
    features, calls = RWKV.features, []

    def slow_at_first(*args):
        calls.append(args)
        if len(calls) == 1:
            time.sleep(0.3)
        return features(*args)

    monkeypatch.setattr(RWKV, "features", slow_at_first)
    monkeypatch.setattr(throughput, "SECONDS", 0.2)  # after which the first call alone would count
    arch, config = make_arch(7, **SIZES), settled_config(peft_config={"r": 5}, grad_cp=1, eval_samples=0)
    speed = throughput.measured_speed(arch, config, "torch", "fp32", "cpu", 8, 0.5)
    assert 8 / speed.tokens < 0.3


def test_a_narrow_model_gets_its_rank_with_other_options_too(checkpoint):
    for given, settled in (({"magnitude": True}, {"rank": 6, "magnitude": True}), ({"r": 5}, {"r": 5})):
        config = Config(load_model=str(checkpoint(7, vocab_size=256)), tokenizer="bytes", peft_config=given)
        draft = Draft(config)
        read_base(draft)
        assert draft.config.peft_config == settled


def test_full_training_has_no_frozen_base(few_bytes):
    parts = memory_parts(
        make_arch(7, **SIZES), settled_config(peft="none", micro_bsz=8), "cpu", "torch", "bf16", 16, 16
    )
    # layer 0's v0, v1, v2 are never trained
    assert 0 < parts["base"] < parts["trained"] / 20 and "rollback" not in parts


def test_the_largest_batch_bounds_every_micro_batch():
    lengths = [5, 40, 17, 23, 9, 31, 12]
    documents = Documents(
        [Document(torch.zeros(n + 1).int().numpy(), torch.tensor([True] * (n + 1)).numpy()) for n in lengths]
    )
    config = settled_config(micro_bsz=2, packing=False, ctx_len=1024)
    schedule = make_schedule(documents, config, 1)
    assert largest_batch(schedule, ctx_len=1024, micro_bsz=2) == (40, 71)
    assert largest_batch(schedule, ctx_len=16, micro_bsz=2) == (16, 32)
    for step in range(schedule.steps_per_pass):
        assert sum(schedule.targets[row] for row in schedule.micro_rows(step, 0, 0)) <= 71


# the cheapest fix


def needs(config):
    """A device of 100 and a run that takes: rows x length (of a chunk, if there are any), less by
    recomputing, and a base of 64, halved by bf16.
    """
    rows = config.micro_bsz * (config.chunk_ctx or config.ctx_len) * {0: 1, 2: 0.75, 1: 0.5}[config.grad_cp]
    return rows + (32 if config.precision == "bf16" else 64)


@pytest.mark.parametrize(
    "room, fix",
    [
        (64 + 8192, {}),
        (64 + 4096, {"micro_bsz": 4, "accumulate_grad_batches": 4}),
        (64 + 1024, {"micro_bsz": 1, "accumulate_grad_batches": 16}),
        (64 + 768, {"micro_bsz": 1, "accumulate_grad_batches": 16, "grad_cp": 2}),
        (64 + 512, {"micro_bsz": 1, "accumulate_grad_batches": 16, "grad_cp": 1}),
        (64 + 256, {"micro_bsz": 1, "accumulate_grad_batches": 16, "grad_cp": 1, "chunk_ctx": 512}),
        (
            32 + 256,
            {
                "micro_bsz": 1,
                "accumulate_grad_batches": 16,
                "grad_cp": 1,
                "chunk_ctx": 512,
                "precision": "bf16",
            },
        ),
        (20, None),
    ],
)
def test_the_cheapest_fix_comes_first(room, fix):
    config = settled_config(micro_bsz=8, accumulate_grad_batches=2, ctx_len=1024, grad_cp=0)
    assert cheapest_fix(config, "fp32", 1000, lambda changed: needs(changed) <= room) == fix


def test_a_fix_keeps_the_rows_of_a_step():
    fix = cheapest_fix(
        settled_config(micro_bsz=6, global_bsz=12, ctx_len=1024),
        "bf16",
        1000,
        lambda changed: changed.micro_bsz == 3,
    )
    assert fix == {"micro_bsz": 3}


def test_moments_in_8_bits_are_advised_where_all_is_trained():
    for method, fix in (("none", {"grad_cp": 1, "optimizer": "adamw8bit"}), ("miss", None)):
        config = settled_config(micro_bsz=1, ctx_len=256, peft=method)
        assert cheapest_fix(config, "bf16", 256, lambda changed: changed.optimizer == "adamw8bit") == fix


@pytest.mark.parametrize(
    "settings, found",
    [
        ({}, False),
        ({"devices": 2}, True),
        ({"num_nodes": 2}, True),
        ({"devices": 2, "strategy": "deepspeed_stage_3"}, False),
    ],
)
def test_a_base_is_shared_out_where_there_are_processes_to_share_it(settings, found):
    config = settled_config(micro_bsz=1, ctx_len=256, **settings)
    fix = cheapest_fix(
        config, "bf16", 256, lambda changed: changed.strategy == "deepspeed_stage_3" != config.strategy
    )
    assert (fix == {"grad_cp": 1, "strategy": "deepspeed_stage_3"}) if found else fix is None


# sizes and what is free


def test_sizes_as_people_write_them():
    sizes = {
        "24GB": 24 * GIB,
        "24 GiB": 24 * GIB,
        "24g": 24 * GIB,
        "0.5G": GIB // 2,
        "800MB": 800 << 20,
        "2097152": 2 << 20,
    }
    assert {text: parse_size(text) for text in sizes} == sizes
    for text in ("", "GB", "24", "-1GB", "24XB", "nan", "inf"):
        with pytest.raises(UserError, match="expected a size such as 24GB"):
            parse_size(text)


def test_a_container_has_what_its_limit_leaves(tmp_path):
    assert available_memory._cgroup_limit(str(tmp_path)) > 1 << 60
    for name, text in (("max", "1000\n"), ("current", "700\n"), ("stat", "anon 5\ninactive_file 250\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert available_memory._cgroup_limit(str(tmp_path)) == 1000 - 700 + 250
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory._cgroup_limit(str(tmp_path)) > 1 << 60


# the program


@pytest.fixture
def files(checkpoint, tmp_path):
    benchmark.write_rows(tmp_path / "rows.jsonl", 9, 40)
    return [
        "--load_model",
        str(checkpoint(7, vocab_size=256)),
        *f"""
            --data_file {tmp_path}/rows.jsonl --tokenizer bytes --peft_config r=5 --proj_dir {tmp_path}/run
        """.split(),
    ]


def test_the_plan_fits_or_names_what_to_change(counted_once, files, tmp_path, capsys):
    flags = [*files, "--json", "--ctx_len", "40", "--micro_bsz", "4", "--epoch_count", "2"]
    assert plan.plan(*plan.parse([*flags, "--tokens_per_second", "10"])) == 0
    *shown, last = capsys.readouterr().out.splitlines()
    line = json.loads(last)
    assert (line["fits"], line["fix"], line["steps"], line["tokens"], line["documents"]) == (
        True,
        {},
        6,
        720,
        9,
    )
    assert line["seconds"] == 72 and line["lines"] == [text for text in shown if "note:" not in text]
    assert (
        line["chosen"]["accelerator"]["value"] == "cpu"
        and "the device" in line["chosen"]["accelerator"]["why"]
    )
    assert any("about 72 s for 720 tokens" in text and "as given" in text for text in shown)
    assert line["memory_together"] == pytest.approx(sum(line["memory"].values()), abs=20)
    assert any("it fits" in text for text in shown) and not (tmp_path / "run").exists()
    step = line["memory"]["activations"] + line["memory"]["working"]
    # room for half of the rows
    room = (line["memory_together"] - step / 3) / memory.USABLE
    assert plan.plan(*plan.parse([*flags, "--memory", str(room)])) == 1
    output = capsys.readouterr().out
    assert "it does not fit; add --micro_bsz 2 --accumulate_grad_batches 2" in output
    assert "two layers and the head were timed here just now" in output
    again = [*flags, "--memory", str(room), "--micro_bsz", "2", "--accumulate_grad_batches", "2"]
    write_rows(tmp_path / "metrics.jsonl", ({"tokens_per_second": n} for n in (1, 100, 300, 200)))
    assert plan.plan(*plan.parse([*again, "--metrics", str(tmp_path / "metrics.jsonl")])) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["tokens_per_second"] == 200
    assert plan.plan(*plan.parse([*flags, "--memory", "1MB"])) == 1
    assert "it does not fit, nor with fewer rows at once" in capsys.readouterr().out
    for wrong in ("-1", "nan", "inf"):
        with pytest.raises(UserError, match="--tokens_per_second .*: must .*(negative|finite)"):
            plan.parse([*flags, "--tokens_per_second", wrong])
    with pytest.raises(UserError, match="expected the metrics.jsonl of a run of at least 2 steps"):
        plan.plan(*plan.parse([*flags, "--metrics", files[3]]))


def test_a_gpu_that_is_not_here_is_planned_for(files, capsys):
    assert plan.plan(*plan.parse([*files, "--accelerator", "gpu", "--memory", "24GB", "--json"])) == 0
    output = capsys.readouterr().out
    assert "gpu, bf16, wkv kernel cuda" in output and "not known, the device is not here" in output
    assert json.loads(output.splitlines()[-1])["seconds"] is None


def test_chunks_are_advised_with_the_length_of_rows_that_was_planned(files, tmp_path, capsys, monkeypatch):
    """By themselves they would have longer rows chosen."""
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "q", "completion": "long " * 1000}) + "\n")
    monkeypatch.setattr(plan, "cheapest_fix", lambda *_: {"chunk_ctx": 512})
    for flags, advice in (
        ([], "add --chunk_ctx 512 --ctx_len 4096\n"),
        (["--ctx_len", "700"], "add --chunk_ctx 512\n"),
    ):
        assert plan.plan(*plan.parse([*files, "--tokens_per_second", "10", *flags])) == 1
        assert advice in capsys.readouterr().out


def test_a_resumed_run_is_planned_as_it_is(files, tmp_path, capsys):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints/step-00000001.pth").touch()
    (run / "config.yaml").write_text("ctx_len: 33\nmicro_bsz: 3\naccumulate_grad_batches: 2\n")
    assert plan.plan(*plan.parse([*files, "--resume", "auto", "--tokens_per_second", "9"])) == 0
    output = capsys.readouterr().out
    assert "ctx_len 33" in output and "micro_bsz 3, accumulate_grad_batches 2" in output
    assert "as the run has it so far" in output


def test_planning_imports_no_trainer():
    code = (
        "import sys; import scripts.plan; sys.exit(any(name in sys.modules for name in ('lightning',"
        " 'deepspeed')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.rare
def test_a_run_takes_what_the_plan_says(tmp_path):
    """A small one of benchmarks/memory.py; 15 % is what the plan promises; four runs of a 12 x 768 model were
    within 10 %.
    """
    base, data = tmp_path / "base.pth", tmp_path / "rows.jsonl"
    write_random_base(base, 7, 4, 256)
    benchmark.write_rows(data, 16, 256)
    result = benchmark.compare(
        base, data, ["--precision", "fp32", "--micro_bsz", "2", "--ctx_len", "256"], tmp_path
    )
    assert result["predicted"] == pytest.approx(result["measured"], rel=0.15), result
