"""The options of MiSS, and its peers that are no LoRA: what holds for each of them alone."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

import rwkv_miss
from rwkv_miss.adapter import adapted_linears
from rwkv_miss.adapter_file import adapter_tensors

from .conftest import close
from .test_adapters import filled, rwkv


def two_linears(method, rank, dtype=torch.float32, **options):
    """A linear (6, 10) before one (8, 6), adapted, with filled tensors."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 6, bias=False), nn.Linear(6, 8, bias=False)).to(dtype)
    rwkv_miss.inject(model, method, targets=["0", "1"], rank=rank, **options)
    return filled(model.to(dtype))


def test_what_layers_share_is_one_tensor_after_a_move_and_a_copy():
    model = two_linears("vera", 3)
    for moved in (model.double(), copy.deepcopy(model), model.to("meta"), model.float()):
        assert moved[0].vera_A is moved[1].vera_A and moved[0].vera_B is moved[1].vera_B
        assert moved[0].vera_A.dtype == moved[0].vera_lambda_b.dtype
        assert moved[0].vera_A.device == moved[0].vera_lambda_b.device


def test_a_method_with_frozen_random_matrices_does_not_keep_its_input():
    model, saved = two_linears("vera", 3), []
    x = torch.randn(7, 10, requires_grad=True)
    addresses = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model[0](x)
    assert [tuple(t.shape) for t in saved if t.untyped_storage().data_ptr() not in addresses] == [(7, 3)]


@pytest.mark.parametrize(
    "options,settings",
    [
        ({"mini_r": 10}, {"init_weights": "mini", "mini_r": 10}),
        ({"mini_r": 4}, {"init_weights": "mini", "mini_r": 4}),
    ],
)
@pytest.mark.parametrize("width,out,rank", [(48, 40, 8), (50, 20, 7)])
def test_mini_equals_hf_peft_in_fp32(options, settings, width, out, rank):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(width, out))
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.MissConfig(r=rank, target_modules=["0"], **settings)
    )
    rwkv_miss.inject(base, "miss", targets=["0"], rank=rank, **options)
    filled(base)
    block = theirs.base_model.model[0].miss_block["default"]
    block.data.copy_(base[0].miss)
    same_in_peft(base, theirs, {"miss": block})


def same_in_peft(ours, theirs, pairs):
    """y, dx, gradients and merged weight of one linear in both; only the order of the sums may differ."""
    x = torch.randn(7, ours[0].in_features, requires_grad=True)
    x2 = x.detach().clone().requires_grad_()
    y, y2 = ours(x), theirs(x2)
    y.square().sum().backward()
    y2.square().sum().backward()
    close("y", y, y2, 2e-6)
    close("dx", x.grad, x2.grad, 2e-6)
    for name, tensor in pairs.items():
        close(name, getattr(ours[0], name).grad, tensor.grad, 4e-6)
    close("merged", ours[0].weight + ours[0].delta(), theirs.merge_and_unload()[0].weight, 1e-6)


@pytest.mark.parametrize("width,out,rank", [(48, 40, 8), (20, 50, 5)])
def test_bat_equals_hf_peft_in_fp32(width, out, rank):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(width, out))
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.MissConfig(r=rank, target_modules=["0"], init_weights="bat")
    )
    rwkv_miss.inject(base, "bat", targets=["0"], rank=rank)
    filled(base)
    block = theirs.base_model.model[0].miss_block["default"]
    block.data.copy_(base[0].bat)
    same_in_peft(base, theirs, {"bat": block})


def test_bat_by_row_is_the_formula_of_rwkv_peft():
    """W[a, b] D[b] + D[b], block by block."""
    model = two_linears("bat", 2, order="row")
    weight, D, delta = model[0].weight, model[0].bat, model[0].delta()
    for a in range(3):
        for b in range(5):
            rows, columns = slice(2 * a, 2 * a + 2), slice(2 * b, 2 * b + 2)
            close("block", delta[rows, columns], weight[rows, columns] @ D[b] + D[b], 1e-6)


@pytest.mark.parametrize(
    "method,options",
    [
        ("miss", {}),
        ("miss", {"mini_r": 16}),
        ("miss", {"expand": True}),
        ("miss", {"magnitude": True}),
        ("mora", {}),
        ("lora", {}),
        ("vera", {}),
        ("bat", {"order": "col"}),
        ("bat", {"order": "row"}),
    ],
)
@pytest.mark.parametrize("bias", [False, True])
def test_a_small_change_is_not_lost_in_bf16(method, options, bias):
    """The first steps of a training change y by less than half a step of its grid; added to a y that is
    rounded they would change nothing.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 64, bias=bias))
    model[0].weight.data.normal_(std=0.02)
    model.bfloat16()
    rwkv_miss.inject(model, method, targets=["0"], rank=16, **options)
    name = {"lora": "lora_B", "vera": "vera_lambda_b"}.get(method, method)
    nn.init.normal_(getattr(model[0], name), std=1e-3 if method == "vera" else 1e-5)
    x = torch.randn(2048, 128).bfloat16()
    with torch.no_grad():
        change = x.double() @ model[0].delta().double().t()
        base = nn.functional.linear(
            x.double(), model[0].base_weight().double(), model[0].bias.double() if bias else None
        )
        error = model(x).double() - base - change
    assert change.norm() < 2e-3 * base.norm(), "below half a step"
    # the error left is the rounding of y, which has no direction: along the change it is 1 / 362 of its size
    assert abs((error * change).sum() / change.square().sum()) < 0.1


def test_vera_equals_hf_peft_in_fp32():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(48, 40))
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.VeraConfig(r=9, target_modules=["0"]))
    rwkv_miss.inject(base, "vera", targets=["0"], rank=9)
    filled(base)
    layer = theirs.base_model.model[0]
    pairs = {"vera_lambda_d": layer.vera_lambda_d["default"], "vera_lambda_b": layer.vera_lambda_b["default"]}
    for name, tensor in {
        **pairs,
        "vera_A": layer.vera_A["default"],
        "vera_B": layer.vera_B["default"],
    }.items():
        tensor.data.copy_(getattr(base[0], name))
    same_in_peft(base, theirs, pairs)


def test_prolora_rotates_the_shared_ranks_from_copy_to_copy():
    """Copy c of A has rank (j + c s) mod r of A0 at rank j, and B as well: a LoRA whose parts are tied."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(14, 10, bias=False))
    rwkv_miss.inject(model, "prolora", targets=["0"], rank=7, unshared=2, shares=3, alpha=7.0)
    layer = filled(model)[0]
    A, B = torch.zeros(7, 14), torch.zeros(10, 7)
    for rank in range(5):
        for i in range(14):  # parts of 5 inputs and of 4 outputs, and a step of 5 // 3
            A[rank, i] = layer.prolora_A0[(rank + i // 5) % 5, i % 5]
        for o in range(10):
            B[o, rank] = layer.prolora_B0[o % 4, (rank + o // 4) % 5]
    A[5:], B[:, 5:] = layer.prolora_A, layer.prolora_B
    close("delta", layer.delta(), B @ A, 1e-6)


def test_mos_draws_its_rows_from_the_pools_of_its_widths():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(10, 6, bias=False), nn.Linear(6, 10, bias=False), nn.Linear(10, 6, bias=False)
    )
    report = rwkv_miss.inject(model, "mos", targets=["0", "1", "2"], rank=6, budget=3, private=1, shards=2)
    assert model[0].mos_A is model[2].mos_A and model[0].mos_A is not model[1].mos_A
    assert model[0].mos_B is model[2].mos_B
    # two of three ranks of every linear are in the pools, in two shards each
    kept = {name: tuple(t.shape) for name, t in adapter_tensors(model).items() if name.startswith("shared.")}
    assert kept == {
        "shared.mos_A.10": (8, 5),
        "shared.mos_A.6": (4, 3),
        "shared.mos_B.6": (8, 3),
        "shared.mos_B.10": (4, 5),
    }
    assert report.trainable == 3 * 3 * (10 + 6), "as LoRA of rank 3"
    for layer in filled(model):
        A = torch.stack([torch.cat([layer.mos_A[place] for place in row]) for row in layer.mos_A_index])
        B = torch.stack([torch.cat([layer.mos_B[place] for place in row]) for row in layer.mos_B_index], 1)
        close("delta", layer.delta(), 2 * (B @ A + layer.mos_B_private @ layer.mos_A_private), 1e-6)
        counts = torch.bincount(layer.mos_A_index.flatten(), minlength=len(layer.mos_A))
        assert counts.max() - counts.min() <= 1, "every shard as often as the others"
    assert not torch.equal(model[0].mos_A_index, model[2].mos_A_index)


@pytest.mark.parametrize("version", [6, 7])
def test_mos_trains_as_many_numbers_as_lora_of_its_budget(version):
    lora = rwkv_miss.inject(rwkv(version), "lora", rank=4)
    assert rwkv_miss.inject(rwkv(version), "mos", rank=12, budget=4).trainable == lora.trainable


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_shared_tensor_gets_the_sum_of_its_layers_gradients(checkpointed):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(6, 6, bias=False) for _ in range(3))).double()
    rwkv_miss.inject(model, "mos", targets=["0", "1", "2"], rank=4, budget=2, private=1, shards=2)
    filled(model.double())
    x = torch.randn(5, 6, dtype=torch.float64)
    run = (
        functools.partial(torch.utils.checkpoint.checkpoint, model, use_reentrant=False)
        if checkpointed
        else model
    )
    run(x).square().sum().backward()
    got = model[0].mos_A.grad.clone()
    separate = [layer.mos_A.detach().clone().requires_grad_() for layer in model]
    y = x
    for layer, pool in zip(model, separate, strict=True):
        A, B = layer.factors()
        stacked = torch.cat((F.embedding(layer.mos_A_index, pool).flatten(1), layer.mos_A_private))
        y = y @ (layer.weight + layer.scale * B @ stacked).t()
    y.square().sum().backward()
    close("gradient", got, sum(pool.grad for pool in separate), 1e-12)
    assert all(pool.grad.norm() > 0.01 * got.norm() for pool in separate)


def test_a_magnitude_starts_at_the_norms_and_a_row_of_zeros_is_refused():
    model = nn.Sequential(nn.Linear(12, 6, bias=False))
    rwkv_miss.inject(model, "miss", targets=["0"], rank=5, magnitude=True)
    close("magnitude", model[0].magnitude, model[0].weight.norm(dim=1), 1e-6)
    filled(model)
    changed = model[0].weight + model[0].delta()
    close("norms", changed.norm(dim=1), model[0].magnitude.abs(), 1e-5)
    model = nn.Sequential(nn.Linear(12, 6, bias=False))
    model[0].weight.data[2] = 0
    with pytest.raises(rwkv_miss.UserError, match="0: 1 rows of the weight are zero"):
        rwkv_miss.inject(model, "miss", targets=["0"], rank=5, magnitude=True)


def test_expand_repeats_its_rows_over_shards_of_neighbouring_outputs():
    model = two_linears("miss", 4, expand=True)  # 6 outputs: shards of 2, 2, 1, 1
    delta = model[0].delta()
    assert torch.equal(delta, model[0].miss[[0, 0, 1, 1, 2, 3]])


@pytest.mark.parametrize(
    "method,options,words",
    [
        ("miss", {"mini_r": 4}, "mini_r 4 does not divide the output width, 6"),
        ("miss", {"expand": True, "layout": "contiguous"}, "layout=contiguous"),
        ("miss", {"expand": True, "magnitude": True}, "drop one of the two"),
        ("miss", {"rank": 7, "expand": True}, "1 to the output width, 6"),
        ("miss", {"scale": "cube"}, "choose one of: sum, sqrt"),
        ("mora", {"rank": 9}, "the largest rank is 2"),
        ("vera", {"rank": 0}, "at least 1"),
        ("bat", {"rank": 4}, "blocks of 4 x 4 must divide the weight, 6 outputs and 10 inputs"),
        ("bat", {"order": "up"}, "choose one of: col, row"),
        ("prolora", {"unshared": 2}, "from 0 to below the rank, 2"),
        ("prolora", {"shares": 0}, "at least 1"),
        ("mos", {"rank": 7}, "smaller width, 6"),
        ("mos", {"budget": 3}, "private 0, budget 3, rank 2: expected"),
        ("mos", {"private": 1}, "private 1, budget 1"),
        ("mos", {"shards": 0}, "at least 1"),
    ],
)
def test_options_that_do_not_fit(method, options, words):
    model = nn.Sequential(nn.Linear(10, 6))
    before = dict(model.named_parameters())
    with pytest.raises(rwkv_miss.UserError, match=words):
        rwkv_miss.inject(model, method, targets=["0"], **{"rank": 2, **options})
    assert dict(model.named_parameters()).keys() == before.keys()


def test_vera_has_one_pair_of_matrices_of_the_largest_widths():
    model = rwkv(6)
    report = rwkv_miss.inject(model, "vera", rank=8, rank_map={"ffn": 5})
    kept = adapter_tensors(model)
    assert tuple(kept["shared.vera_A"].shape) == (8, 160) and tuple(kept["shared.vera_B"].shape) == (160, 8)
    assert report.trainable == sum(
        layer.out_features + (5 if "ffn" in name else 8) for name, layer in adapted_linears(model).items()
    )
