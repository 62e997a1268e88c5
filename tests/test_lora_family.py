"""LoRA and its relatives beyond the promises of every method (test_adapters.py): dropout, rates, scales."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

import rwkv_miss
from rwkv_miss.adapter import adapted_linears
from rwkv_miss.methods.operators import dropped
from src.inference.load import load
from src.model import RWKV
from src.planning.base_model import build_model
from src.training.optimizer import parameter_groups

from .conftest import close, make_arch, settled_config
from .test_adapters import filled, rwkv


def linear(method, width=48, out=40, dtype=torch.float64, bias=True, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, out, bias=bias)).to(dtype)
    rwkv_miss.inject(model, method, targets=["0"], **options)
    return filled(model.to(dtype))[0]


@pytest.mark.parametrize("method", ["lora", "lora_fa"])
def test_dropout_leaves_out_inputs_of_the_adapter_alone_and_in_training_only(method):
    layer = linear(method, rank=5, dropout=0.25)
    x = torch.randn(2000, 48, dtype=torch.float64)
    with torch.no_grad():
        layer.lora_A.copy_(torch.eye(5, 48))
        layer.lora_B.copy_(torch.eye(40, 5))
    base = layer.base_forward(x)
    adapter = (layer(x) - base)[:, :5] / layer.scale
    gone = adapter.abs() < 1e-9
    close("what stays", adapter, (x[:, :5] / 0.75).masked_fill(gone, 0), 1e-9)
    # five standard deviations
    assert abs(float(gone.double().mean()) - 0.25) < 5 * (0.25 * 0.75 / gone.numel()) ** 0.5
    assert float((layer(x) - base)[:, 5:].detach().abs().max()) < 1e-12, "the base sees all of its input"
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    close("in evaluation", layer(x), base + x @ layer.delta().t(), 1e-12)


def test_an_adapter_that_is_loaded_to_be_used_drops_nothing(tmp_path):
    model = rwkv(vocab_size=256)
    rwkv_miss.write_checkpoint(tmp_path / "base.pth", model.state_dict().items())
    rwkv_miss.inject(model, "lora", rank=5, dropout=0.5)
    rwkv_miss.save_adapter(filled(model), tmp_path / "a.pth")
    assert model.blocks[0].att.key.training
    loaded, _ = load(tmp_path / "base.pth", tmp_path / "a.pth", tokenizer="bytes", wkv="torch")
    assert not any(module.training for module in loaded.modules())
    ids = torch.arange(9)[None]
    close("logits", loaded(ids)[0], model.eval()(ids)[0], 1e-5)


@pytest.mark.parametrize("method", ["lora", "lora_fa", "pissa"])
def test_the_gradient_with_dropout_is_that_of_what_was_drawn(method):
    """Central differences along a random direction, in float64, with the same seed: they know nothing of how
    the gradient is made.
    """
    layer = linear(method, rank=5, dropout=0.4)
    tensors = [
        torch.randn(3, 4, 48, dtype=torch.float64, requires_grad=True),
        *(p for p in layer.parameters() if p.requires_grad),
    ]

    def loss():
        torch.manual_seed(7)
        return layer(tensors[0]).sin().sum()

    gradients = torch.autograd.grad(loss(), tensors)
    for name, tensor, gradient in zip(("dx", "dA or dB", "dB"), tensors, gradients, strict=False):
        direction = torch.randn_like(tensor)
        with torch.no_grad():
            tensor += 1e-6 * direction
            ahead = loss()
            tensor -= 2e-6 * direction
            slope = (ahead - loss()) / 2e-6
            tensor += 1e-6 * direction
        close(name, (gradient * direction).sum(), slope, 1e-7)


def test_other_places_are_dropped_with_every_seed_and_in_every_call():
    x = torch.ones(50, 40)
    a, b, c = (dropped(x, 0.5, torch.tensor(seed)) for seed in (1, 1, 2))
    assert torch.equal(a, b) and 0.3 < (a == c).float().mean() < 0.7 and a.unique().tolist() == [0, 2]
    layer = linear("lora", rank=5, dropout=0.5)
    x = torch.randn(9, 48, dtype=torch.float64)
    torch.manual_seed(3)
    first, second = layer(x), layer(x)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first) and not torch.equal(first, second)


@pytest.mark.parametrize("recompute", [1, 2])
def test_a_recomputed_layer_drops_the_same(recompute):
    def gradients(grad_cp):
        model = rwkv()
        rwkv_miss.inject(model, "lora", rank=6, dropout=0.3)
        filled(model).grad_cp = grad_cp
        torch.manual_seed(11)
        model(torch.arange(13)[None])[0].sin().sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    plain, recomputed = gradients(0), gradients(recompute)
    assert plain.keys() == recomputed.keys() and len(plain) == 24  # A and B of the 12 linears
    for name, gradient in recomputed.items():
        close(name, gradient, plain[name], 1e-6)


def test_lora_plus_multiplies_the_rate_of_b():
    model = rwkv()
    rwkv_miss.inject(model, "lora", rank=6, lora_plus=16)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, 1e-3, 0.0, lr_map={"ffn": 0.5})
    rates = {names[id(p)]: group["lr"] for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(rates) == 24  # A and B of the 12 linears
    for name, rate in rates.items():
        assert rate == pytest.approx(
            1e-3 * (16 if name.endswith("lora_B") else 1) * (0.5 if ".ffn." in name else 1)
        ), name


def test_a_rate_of_one_layer_is_none_of_what_all_share():
    model = rwkv()
    rwkv_miss.inject(model, "mos", rank=8, budget=4, private=1)
    for lr_map, mine in (({"blocks.0": 0.0}, 1.0), ({"shared": 0.5}, 0.5), ({"mos_B": 2.0}, 2.0)):
        rates = {
            id(p): group["lr"]
            for group in parameter_groups(model, 1.0, 0.0, lr_map=lr_map)
            for p in group["params"]
        }
        assert (
            rates[id(model.blocks[0].att.receptance.mos_B)]
            == rates[id(model.blocks[1].ffn.key.mos_B)]
            == mine
        )
        assert rates[id(model.blocks[0].att.key.mos_B_private)] == (0 if "blocks.0" in lr_map else 1)
    assert len(rates) == sum(p.requires_grad for p in model.parameters())


def test_rslora_scales_by_the_root_of_each_linears_own_rank():
    model = rwkv()
    rwkv_miss.inject(model, "lora", rank=16, rslora=True, rank_map={"ffn": 4})
    scales = {len(layer.lora_A): layer.scale for layer in adapted_linears(model).values()}
    assert scales == {16: 16 / 16**0.5, 4: 16 / 4**0.5}
    with torch.device("meta"):
        wide = RWKV(make_arch(7, n_embd=128))
    factors = []
    for options in ({}, {"rslora": True}, {"alpha": 5}, {"alpha": 5, "rslora": True}):
        rwkv_miss.inject(wide, "lora", rank=64, **options)
        factors.append(wide.blocks[0].att.key.scale)
        with torch.device("meta"):
            wide = RWKV(make_arch(7, n_embd=128))
    assert factors == [2, 2, 5 / 64, 5 / 8], "the factor is 2 at rank 64 in both, unless alpha is given"


@pytest.mark.parametrize(
    "options,words",
    [
        ({"dropout": 1.0}, "dropout 1.0 is no probability"),
        ({"dropout": -0.1}, "dropout"),
        ({"lora_plus": 0}, "lora_plus 0.0 is no ratio"),
        ({"rslora": 2}, "rslora must be true or false"),
    ],
)
def test_options_that_make_no_sense(options, words):
    with pytest.raises(rwkv_miss.UserError, match=words):
        rwkv_miss.inject(rwkv(), "lora", **options)


def test_the_frozen_a_is_in_the_file_and_not_trained(tmp_path):
    model = rwkv()
    report = rwkv_miss.inject(model, "lora_fa", rank=5)
    rwkv_miss.save_adapter(model, tmp_path / "a.pth")
    tensors = rwkv_miss.read_checkpoint(tmp_path / "a.pth")
    assert sum(t.numel() for name, t in tensors.items() if name.endswith("lora_B")) == report.trainable
    a = tensors["blocks.0.att.key.lora_A"]
    assert a.dtype == torch.float32 and torch.equal(a, model.blocks[0].att.key.lora_A)
    assert float(a.abs().max()) > 0
    with pytest.raises(rwkv_miss.UserError, match="lora_plus"):
        rwkv_miss.inject(rwkv(), "lora_fa", rank=5, lora_plus=2.0)


@pytest.mark.parametrize("niter", [0, 2, 9])
def test_pissa_takes_the_principal_part_out_of_the_weight(niter):
    """A spectrum that falls, as those of trained weights do: the randomised SVD gets nearer with every
    iteration, and the exact one is exact.
    """
    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(width, 50, dtype=torch.float64))[0] for width in (70, 50))
    values = 0.9 ** torch.arange(50, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(50, 70, bias=False))
    model[0].weight.data.copy_(u * values @ v.t())
    before = model[0].weight.detach().clone()
    rwkv_miss.inject(model, "pissa", targets=["0"], rank=6, niter=niter, alpha=3.0)
    layer = model[0]
    kept = torch.linalg.matrix_norm(layer.weight.double())
    best = values[6:].norm()
    assert best * (1 - 1e-6) < kept < best * {0: 1 + 1e-6, 2: 1.01, 9: 1 + 1e-5}[niter], (
        "what is left has the other singular values"
    )
    close("W", layer.weight + 0.5 * layer.lora_B @ layer.lora_A, before, 1e-6)
    close(
        "A and B share the roots of the singular values",
        layer.lora_A @ layer.lora_A.t(),
        layer.lora_B.t() @ layer.lora_B,
        1e-2 if niter else 1e-5,
    )
    assert not layer.delta().any(), "exactly nothing has changed yet"


def test_pissa_leaves_the_memory_of_a_mapped_base_alone(tmp_path):
    rwkv_miss.write_checkpoint(tmp_path / "base.pth", rwkv().state_dict().items())
    content = (tmp_path / "base.pth").read_bytes()
    base, model = RWKV.load(tmp_path / "base.pth"), RWKV.load(tmp_path / "base.pth")
    weight = model.blocks[0].att.key.weight.detach()
    rwkv_miss.inject(model, "pissa", rank=5)
    assert torch.equal(weight, base.blocks[0].att.key.weight)
    assert not torch.equal(weight, model.blocks[0].att.key.weight)
    assert (tmp_path / "base.pth").read_bytes() == content


def test_pissa_resumes_with_the_principal_part_that_it_had(tmp_path):
    """Another SVD, of another seed, torch or CPU, is another frozen weight, which the trained A and B do
    not fit.
    """
    rwkv_miss.write_checkpoint(tmp_path / "base.pth", rwkv().state_dict().items())
    config = settled_config(
        load_model=str(tmp_path / "base.pth"), peft="pissa", peft_config={"rank": 5, "niter": 1}
    )
    torch.manual_seed(1)
    first = build_model(config, make_arch(7), "torch", torch.float32)
    rwkv_miss.write_checkpoint(tmp_path / "step.pth", first.state_dict().items())
    torch.manual_seed(2)
    other, second = (
        build_model(config, make_arch(7), "torch", torch.float32, path)
        for path in (None, tmp_path / "step.pth")
    )
    tensors, again = first.state_dict(), second.state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
    assert not torch.equal(other.blocks[0].att.key.weight, first.blocks[0].att.key.weight), (
        "such a test can fail"
    )
    config = dataclasses.replace(config, peft_config={"rank": 6})
    with pytest.raises(rwkv_miss.UserError, match=r"no blocks.0.att.receptance.initial_A of \(6, 48\)"):
        build_model(config, make_arch(7), "torch", torch.float32, tmp_path / "step.pth")


@pytest.mark.parametrize("dtype,bound", [(torch.bfloat16, 2**-9), (torch.float16, 2**-12)])
def test_pissa_rounds_the_residual_of_a_half_precision_base_as_that_was_rounded(dtype, bound):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 40, bias=False)).to(dtype)
    before = model[0].weight.detach().float()
    rwkv_miss.inject(model, "pissa", targets=["0"], rank=5)
    layer = model[0]
    assert layer.weight.dtype == dtype and layer.lora_A.dtype == torch.float32
    moved = layer.weight.float() + layer.lora_B @ layer.lora_A - before
    assert 0 < moved.norm() < bound * before.norm()
    merged = before.clone()
    layer.add_delta_to(merged)
    assert torch.equal(merged, before), "a merge starts from the file's weight"


def test_pissa_under_a_quantised_base_has_smaller_errors_than_the_quantised_base():
    """QPiSSA: inject first, then quantise the residual. Of a weight with a principal part nf4 then has less
    to round.
    """
    torch.manual_seed(0)
    weight = 0.02 * torch.randn(96, 128) + torch.randn(96, 4) @ torch.randn(4, 128) * 0.1
    errors = {}
    for method in ("lora", "pissa"):
        model = nn.Sequential(nn.Linear(128, 96, bias=False))
        model[0].weight.data.copy_(weight)
        rwkv_miss.inject(model, method, targets=["0"], rank=8)
        rwkv_miss.quantised.quantise_(model, "nf4")
        x = torch.randn(50, 128)
        errors[method] = float((model(x) - x @ weight.t()).norm() / (x @ weight.t()).norm())
        close("base", model[0].base_forward(x), model(x), 1e-5)
        close("definition", model[0].base_weight() + model[0].delta(), model(torch.eye(128)).t(), 1e-5)
    assert errors["pissa"] < 0.5 * errors["lora"]
    with pytest.raises(rwkv_miss.UserError, match="quantise after that"):
        model[0].load(model[0].own_tensors())


def test_pissa_equals_hf_peft_in_fp32():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(50, 30))
    theirs = peft.get_peft_model(
        copy.deepcopy(base),
        peft.LoraConfig(r=7, lora_alpha=14, init_lora_weights="pissa", target_modules=["0"]),
    )
    rwkv_miss.inject(base, "pissa", targets=["0"], rank=7, alpha=14.0, niter=0)
    other = theirs.base_model.model[0]
    a, b = other.lora_A["default"].weight, other.lora_B["default"].weight
    signs = (a @ base[0].lora_A.t()).diagonal().sign()  # singular vectors have no sign of their own
    close("A", base[0].lora_A, signs[:, None] * a, 1e-5)
    close("B", base[0].lora_B, signs * b, 1e-5)
    close("frozen weight", base[0].weight, other.base_layer.weight, 1e-6)
    x = torch.randn(9, 50)
    close("y", base(x), theirs(x), 2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dora_keeps_one_more_tensor_of_the_outputs_size_than_lora(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(480, 400)).to(dtype)
    rwkv_miss.inject(model, "dora", targets=["0"], rank=8)
    parameters = {t.data_ptr() for t in [*model.parameters(), *model.buffers()]}
    saved = []
    x = torch.randn(3, 5, 480, dtype=dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = model(x)
    kept = sorted(t.numel() for t in saved if t.data_ptr() not in parameters)
    factors = [8 * 400] if dtype == torch.float32 else [8 * 400, 8 * 480]  # scale B, and A in x's dtype
    of_lora = [15 * 8, *factors, 15 * 480]
    assert kept == sorted([*of_lora, 400, 400, 15 * 400]), "LoRA's, two factors of columns, y"
    assert y.dtype == dtype


def test_the_magnitude_is_not_rounded_before_it_is_used_in_bf16():
    """1.003 is 1 in bf16. The outputs are on the grid of bf16 before and after, so that they grow by 0.0037
    in the mean (by nothing otherwise).
    """
    torch.manual_seed(0)
    for method, options in (("dora", {}), ("miss", {"magnitude": True})):
        model = nn.Sequential(nn.Linear(256, 128, bias=False)).bfloat16()
        rwkv_miss.inject(model, method, targets=["0"], rank=8, **options)
        x = torch.randn(2000, 256).bfloat16()
        before = model(x).float()
        with torch.no_grad():
            model[0].magnitude *= 1.003
        grown = float((model(x).float() * before).sum() / before.square().sum()) - 1
        assert 0.0025 < grown < 0.0045, (method, grown)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_dora_under_a_quantised_base_learns_the_norms_of_the_base(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 96, bias=False))
    rwkv_miss.inject(model, "dora", targets=["0"], rank=8)
    merged = model[0].weight.detach().clone()
    rwkv_miss.quantised.quantise_(model, kind)
    x = torch.randn(9, 128)
    assert torch.equal(model(x), model[0].base_forward(x)), "nothing has changed at the start"
    with torch.no_grad():
        model[0].lora_B.normal_(std=0.05)
        model[0].magnitude.mul_(1.5)
    model[0].add_delta_to(merged)
    error = {"int8": 0.02, "nf4": 0.15}[kind]  # that of the codes
    assert (model(x) - x @ merged.t()).norm() < error * model(x).norm()


def test_dora_equals_hf_peft_in_fp32():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(50, 30))
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=7, lora_alpha=21, use_dora=True, target_modules=["0"])
    )
    rwkv_miss.inject(base, "dora", targets=["0"], rank=7, alpha=21.0)
    filled(base)
    other = theirs.base_model.model[0]
    pairs = {
        "lora_A": other.lora_A["default"].weight,
        "lora_B": other.lora_B["default"].weight,
        "magnitude": other.lora_magnitude_vector["default"].weight,
    }
    for name, tensor in pairs.items():
        tensor.data.copy_(getattr(base[0], name))
    x = torch.randn(9, 50, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    base(x).sin().sum().backward()
    theirs(y).sin().sum().backward()
    close("y", base(x), theirs(y), 2e-6)
    close("dx", x.grad, y.grad, 2e-6)
    for name, tensor in pairs.items():
        close(f"d{name}", getattr(base[0], name).grad, tensor.grad, 4e-6)


def test_a_weight_with_a_zero_row_has_no_direction_and_the_model_stays_as_it_was():
    model = rwkv().requires_grad_(True)
    before = {name: (p, p.requires_grad) for name, p in model.named_parameters()}
    with torch.no_grad():
        model.blocks[1].att.key.weight[3] = 0
    for method, options in (("dora", {}), ("miss", {"magnitude": True})):
        with pytest.raises(rwkv_miss.UserError, match="blocks.1.att.key: 1 rows of the weight are zero"):
            rwkv_miss.inject(model, method, rank=5, **options)
        after = {name: (p, p.requires_grad) for name, p in model.named_parameters()}
        assert after.keys() == before.keys()
        assert all(after[name][0] is p and after[name][1] == flag for name, (p, flag) in before.items())
    rwkv_miss.inject(model, "lora", rank=5)


def test_an_alpha_map_gives_linears_their_own_factors():
    model = rwkv(7)
    rwkv_miss.inject(
        model, "lora", rank=6, alpha=12.0, rank_map={"ffn": 3}, alpha_map={"ffn.key": 4.5, "blocks.1.ffn": 6}
    )
    scales = {name: layer.scale for name, layer in adapted_linears(model).items()}
    assert scales["blocks.0.att.key"] == scales["blocks.0.ffn.value"] == 2.0
    assert (
        scales["blocks.0.ffn.key"] == 1.5
        and scales["blocks.1.ffn.value"] == 2.0
        and scales["blocks.1.ffn.key"] == 2.0
    ), "the longer part counts"
    for wrong, said in (
        ({"fnn": 3}, "alpha_map 'fnn'.*blocks.0.att"),
        ({"ffn": 0}, "factors"),
        ({"ffn": "3"}, "factors"),
        (5.0, "factors"),
    ):
        with pytest.raises(rwkv_miss.UserError, match=said):
            rwkv_miss.inject(rwkv(7), "lora", rank=6, alpha_map=wrong)
