"""Settings of Lightning's Trainer for a run, by the strategy object that comes of them."""

import types

import pytest
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from src.common.device import grow_segments
from src.config import Config
from src.distributed.deepspeed_strategy import zero_settings
from src.training.trainer import make_trainer


@pytest.fixture
def strategy_of():
    """strategy_of(**settings) -> (the Trainer, its strategy) on CPUs."""

    def make(**settings):
        settings = {"strategy": "auto", "accelerator": "cpu", "precision": "fp32", **settings}
        trainer = make_trainer(Config(micro_bsz=2, accumulate_grad_batches=1, **settings), 3, [])
        return trainer, trainer.strategy

    return make


@pytest.mark.parametrize(
    "name", ["_accelerator_setAllocatorSettings", "_cuda_cudaCachingAllocator_set_allocator_settings"]
)
def test_blocks_of_a_gpus_memory_grow_under_new_and_old_names_of_torch(monkeypatch, name):
    asked = []
    torch_c = types.SimpleNamespace(**{name: asked.append})
    monkeypatch.setattr(torch, "_C", torch_c)
    grow_segments()
    assert asked == ["expandable_segments:True"]
    torch_c._accelerator_getAllocatorSettings = lambda: "max_split_size_mb:64"
    grow_segments()
    assert len(asked) == 1, "the user's settings stay"


@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_several_processes_do_not_send_each_other_buffers(strategy_of, strategy):
    """AdaLoRA's are larger than what it trains, and each rank derives the same."""
    trainer, found = strategy_of(devices=2, strategy=strategy)
    assert type(found) is DDPStrategy and found._ddp_kwargs == {"broadcast_buffers": False}
    # nor a flag before each micro-batch, whose answer a GPU would have to be waited for
    assert trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor() is None


def test_one_process_has_no_strategy_of_many(strategy_of):
    assert type(strategy_of()[1]) is SingleDeviceStrategy


def test_zero_is_set_for_what_connects_the_processes():
    """NCCL sends during other work and fetches ahead; gloo does not. The GPU's numbers are DeepSpeed's own,
    but for what would hold a whole base, or 2 GB of gradients, at once.
    """
    gloo, nccl = (zero_settings(3, False, accelerator) for accelerator in ("cpu", "gpu"))
    theirs = DeepSpeedZeroConfig(stage=3)
    assert nccl["overlap_comm"] is theirs.overlap_comm is True and gloo["overlap_comm"] is False
    for name in ("prefetch_bucket_size", "param_persistence_threshold"):
        assert nccl[f"stage3_{name}"] == getattr(theirs, name) > gloo[f"stage3_{name}"]
    for name in ("max_live_parameters", "max_reuse_distance"):
        assert gloo[f"stage3_{name}"] < nccl[f"stage3_{name}"] == 10**8 < getattr(theirs, name)
    assert nccl["reduce_bucket_size"] == gloo["reduce_bucket_size"] == 10**7
    assert "stage3_allgather_sequential" not in nccl and gloo.get("stage3_allgather_sequential", True)
    assert not zero_settings(2, False, "gpu")["overlap_comm"]  # nor has DeepSpeed it there
    for offload in (False, True):
        DeepSpeedZeroConfig(**zero_settings(3, offload, "gpu"))
