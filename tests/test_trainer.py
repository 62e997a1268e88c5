"""What a run asks of Lightning's Trainer, by the strategy object that comes of it."""

import pytest
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from src.config import Config
from src.training.trainer import make_trainer


@pytest.fixture
def strategy_of():
    """strategy_of(**settings) -> (the Trainer, its strategy) on CPUs."""

    def make(**settings):
        settings = {"strategy": "auto", "accelerator": "cpu", "precision": "fp32", **settings}
        trainer = make_trainer(Config(micro_bsz=2, accumulate_grad_batches=1, **settings), 3, [])
        return trainer, trainer.strategy

    return make


@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_several_processes_do_not_send_each_other_buffers(strategy_of, strategy):
    """AdaLoRA's are larger than what it trains, and each rank derives the same."""
    trainer, found = strategy_of(devices=2, strategy=strategy)
    assert type(found) is DDPStrategy and found._ddp_kwargs == {"broadcast_buffers": False}
    # nor a flag before each micro-batch, whose answer a GPU would have to be waited for
    assert trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor() is None


def test_one_process_has_no_strategy_of_many(strategy_of):
    assert type(strategy_of()[1]) is SingleDeviceStrategy
