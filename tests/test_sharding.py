"""Adapters of a model that torch's fully_shard() (FSDP2) has shared out: two processes make the file that one
makes, and answer as it does.
"""

import pytest
import torch
import torch.distributed as dist
from torch import nn

import rwkv_miss

from .conftest import close

# name -> (method, whether each block is a group of its own, whether an adapted weight is trained, too). What
# layers share must be in one group, so the root alone is sharded there
CASES = {
    "miss": ("miss", True, False),
    "miss of a weight that is read": ("miss", True, False),
    "miss and a weight": ("miss", True, True),
    "dora": ("dora", True, False),
    "pissa": ("pissa", True, False),
    "vera": ("vera", False, False),
    "mos": ("mos", False, True),
}


class Reads(nn.Module):
    """A linear without the class."""

    def __init__(self, width):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(width, width) / width**0.5)

    def forward(self, x):
        return x @ self.matrix.t()


def base():
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(n, out), nn.Tanh()) for n, out in ((13, 7), (7, 9))]
    return nn.Sequential(*blocks, Reads(9), nn.Linear(9, 5))


def adapted(case):
    """A model with an adapter in two linears; a third linear is trained as well."""
    method, _, weight = CASES[case]
    model = base()
    # MiSS's D has one row then, so that the second process has nothing of it
    targets = ["0.0", "1.0", *(["2.matrix"] if "read" in case else [])]
    rwkv_miss.inject(model, method, targets=targets, rank=4 if method == "mos" else 1)
    model[3].requires_grad_(True)
    model[1][0].weight.requires_grad_(weight)
    return model


def train(model):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        x = torch.randn(6, 13, generator=torch.Generator().manual_seed(step))
        model(x).sub(1).square().mean().backward()
        optimizer.step()
    return model


def answers(model):
    with torch.no_grad():
        return model(torch.linspace(-1, 1, 26).view(2, 13))


def sharded(model, by_block=True):
    from torch.distributed.fsdp import fully_shard

    for block in model if by_block else ():
        fully_shard(block)
    return fully_shard(model)


def process(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for case, (_, by_block, weight) in CASES.items():
        model = train(sharded(adapted(case), by_block))
        rwkv_miss.save_adapter(model, folder / f"{case}.pth")
        answered = [answers(model)]  # after which the root is still gathered
        loaded = base()
        rwkv_miss.load_adapter(loaded, folder / f"{case}.zero.pth")
        loaded = sharded(loaded, by_block)
        for other in (loaded,) if weight else (loaded, model):
            rwkv_miss.load_adapter(other, folder / f"{case}.zero.pth")
            answers(other)
            rwkv_miss.load_adapter(other, folder / f"{case}.one.pth")
            other.reshard()  # as the next step's backward does
            answered.append(answers(other))
        torch.save(answered, folder / f"{case}.answers.{rank}")
    with pytest.raises(rwkv_miss.UserError, match=r"sharded already.* call inject\(\) first"):
        rwkv_miss.inject(sharded(base()), targets=["0.0"], rank=1)
    with pytest.raises(rwkv_miss.UserError, match=r"0.0.weight is a DTensor.*full_tensor\(\)"):
        rwkv_miss.write_checkpoint(folder / f"all{rank}.pth", model.state_dict().items())
    rwkv_miss.inject(model := base(), "adalora", targets=["0.0"], rank=1)
    with pytest.raises(rwkv_miss.UserError, match="adalora looks at whole parameters.*fully_shard"):
        rwkv_miss.before_step(sharded(model), 1, 10)
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_save_and_load_what_one_does(tmp_path):
    want = {}
    for case in CASES:
        model = adapted(case)
        rwkv_miss.save_adapter(model, tmp_path / f"{case}.zero.pth")
        rwkv_miss.save_adapter(train(model), tmp_path / f"{case}.one.pth")
        want[case] = answers(model)
    torch.multiprocessing.start_processes(process, (tmp_path,), nprocs=2, start_method="spawn")
    for case in CASES:
        one, two = (tmp_path / f"{case}{name}.pth" for name in (".one", ""))
        got, single = rwkv_miss.read_checkpoint(two), rwkv_miss.read_checkpoint(one)
        assert got.keys() == single.keys() and rwkv_miss.read_metadata(two) == rwkv_miss.read_metadata(one)
        for name in got:
            if got[name].is_floating_point():
                close(f"{case}: {name}", got[name], single[name], 1e-5)
        for rank in range(2):
            for answered in torch.load(tmp_path / f"{case}.answers.{rank}"):
                close(f"{case}: answers of process {rank}", answered, want[case], 1e-5)
        rwkv_miss.load_adapter(alone := base(), two)
        close(f"{case}: answers of the file", answers(alone), want[case], 1e-5)
