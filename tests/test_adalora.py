"""AdaLoRA's schedule, importance and penalty against plain formulas, and its life in a run."""

import copy

import pytest
import torch
from torch import nn

import rwkv_miss
from rwkv_miss.adapter import adapted_linears
from rwkv_miss.adapter_file import adapter_tensors
from rwkv_miss.methods.adalora import Options, budget

from .conftest import close
from .test_adapters import rwkv


def two_linears(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 16, bias=False), nn.Tanh(), nn.Linear(16, 12, bias=False))
    base = copy.deepcopy(model)
    rwkv_miss.inject(
        model,
        "adalora",
        targets=["0", "2"],
        **{"rank": 4, "init_rank": 6, "tinit": 2, "tfinal": 3, "delta_t": 2, **options},
    )
    return model, base


def train(model, steps, total, first=1):
    """Steps of Adam on fixed data; the gradients, tensors and kept triplets of each step."""
    torch.manual_seed(1)
    x, target = torch.randn(50, 20), torch.randn(50, 12)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    for step in range(first, first + steps):
        optimizer.zero_grad()
        ((model(x) - target).square().mean() + rwkv_miss.penalty(model)).backward()
        rwkv_miss.before_step(model, step, total)
        yield step, x
        optimizer.step()
        rwkv_miss.after_step(model, step, total)


def effective(model):
    return torch.cat([layer.lora_E - layer.offset for layer in adapted_linears(model).values()]).detach()


def test_the_budget_falls_by_the_cube_between_its_two_ends():
    options = Options(rank=4, tinit=10, tfinal=30)
    values = [budget(step, 110, 60, 40, options) for step in range(1, 111)]
    assert values[:10] == [60] * 10 and values[79:] == [40] * 31 and values == sorted(values, reverse=True)
    assert values[44] == 40 + round(20 * 0.5**3), "half-way"
    assert budget(5, 10, 60, 40, Options()) == 40 + round(20 * (1 - 4 / 6) ** 3), (
        "by default 10 and 30 % of the steps"
    )
    assert budget(3, 3, 60, 40, Options(tinit=5, tfinal=5)) == 40, (
        "too few steps for all: it ends with its rank all the same"
    )


def test_importance_is_the_papers_formula_and_prunes_over_all_layers():
    model, _ = two_linears()
    averages = {}
    for step, _ in train(model, 12, 12):
        for index, layer in adapted_linears(model).items():
            if step > 9:  # the ranks are final
                continue
            for name in ("lora_A", "lora_B", "lora_E"):
                p = getattr(layer, name)
                value = p.detach() - (layer.offset if name == "lora_E" else 0)
                now = (value * p.grad).abs().double()
                mean, spread = averages.get((index, name), (0 * now, 0 * now))
                mean = 0.85 * mean + 0.15 * now
                averages[index, name] = mean, 0.85 * spread + 0.15 * (now - mean).abs()
        if step == 9:
            scores = []
            for index in ("0", "2"):
                s = {
                    name: averages[index, name][0] * averages[index, name][1]
                    for name in ("lora_A", "lora_B", "lora_E")
                }
                scores.append(s["lora_E"] + s["lora_A"].mean(1) + s["lora_B"].mean(0))
                close(f"importance {index}", model[int(index)].importance(), scores[-1], 1e-4)
            last = torch.cat(scores).topk(8).indices
    left = effective(model).nonzero().flatten()
    assert sorted(left.tolist()) == sorted(last.tolist()) and len(left) == 8, (
        "4 each in the mean, the most important ones wherever they are"
    )


def test_what_is_pruned_may_come_back_until_the_last_pruning():
    model, _ = two_linears(delta_t=3)
    zeros = [(step, (effective(model) == 0).sum().item()) for step, _ in train(model, 20, 20)]
    counts = dict(zeros)  # at the beginning of each step
    assert counts[1] == 12 and counts[3] == 0
    assert counts[10] == 12 - budget(9, 20, 12, 8, model[0].options) > 0 == counts[11], (
        "trained on between prunings"
    )
    assert [counts[step] for step in (18, 19, 20)] == [4, 4, 4] and (effective(model) == 0).sum() == 4, (
        "after the last one they stay zero"
    )


def test_the_merge_and_the_file_have_the_pruned_ranks(tmp_path):
    model, base = two_linears()
    x = [x for _, x in train(model, 12, 12)][0]
    ranks = [int(torch.linalg.matrix_rank(layer.delta())) for layer in adapted_linears(model).values()]
    assert sum(ranks) == 8
    rwkv_miss.save_adapter(model, tmp_path / "a.pth")
    assert {name.rpartition(".")[2] for name in adapter_tensors(model)} == {
        "lora_A",
        "lora_B",
        "lora_E",
        "offset",
    }, "no averages"
    rwkv_miss.write_checkpoint(tmp_path / "base.pth", base.state_dict().items())
    rwkv_miss.merge_file(tmp_path / "base.pth", tmp_path / "a.pth", tmp_path / "merged.pth")
    base.load_state_dict(rwkv_miss.read_checkpoint(tmp_path / "merged.pth"))
    close("merged", base(x), model(x), 1e-6)


def test_the_penalty_is_that_of_hf_peft():
    peft = pytest.importorskip("peft")
    model, base = two_linears(orth=0.5, alpha=6.0)
    config = peft.AdaLoraConfig(
        init_r=6, target_r=4, lora_alpha=6, total_step=12, orth_reg_weight=0.5, target_modules=["0", "2"]
    )
    theirs = peft.get_peft_model(base, config)
    x = torch.randn(9, 20)
    for index in (0, 2):
        other = theirs.base_model.model[index]
        for name in ("lora_A", "lora_B", "lora_E"):
            p = getattr(model[index], name)
            with torch.no_grad():
                p.normal_()
            getattr(other, name)["default"].data.copy_(p.detach().view_as(getattr(other, name)["default"]))
    close("y", model(x), theirs(x), 1e-5)  # their factor is alpha / (init_r + 1e-5)
    want, count = 0.0, 0
    for name, p in theirs.named_parameters():  # the loop of AdaLoraModel.forward
        if ("lora_A" in name or "lora_B" in name) and p.shape != torch.Size([0]):
            gram = p @ p.T if "lora_A" in name else p.T @ p
            want, count = want + torch.norm(gram - torch.eye(len(gram)), p="fro"), count + 1
    close("penalty", rwkv_miss.penalty(model), 0.5 * want / count, 1e-6)
    model, _ = two_linears(orth=0.0)
    assert rwkv_miss.penalty(model) is None


def test_a_gradient_that_is_not_finite_leaves_no_trace():
    model, _ = two_linears()
    steps = train(model, 3, 12)
    next(steps), next(steps)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for p in model.parameters():
        p.grad = None if p.grad is None else torch.full_like(p.grad, torch.inf)
    rwkv_miss.before_step(model, 2, 12)
    assert len(before) == 2 * 7
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


@pytest.mark.parametrize(
    "options,words",
    [
        ({"rank": 8, "init_rank": 6}, "init_rank 6 is below the final rank, 8"),
        ({"delta_t": 0}, "delta_t 0"),
        ({"tinit": -2}, "tinit -2"),
        ({"beta1": 1.0}, "beta1 1.0"),
        ({"orth": -1.0}, "orth -1.0"),
        ({"rank": 49}, "rank 49 does not fit adalora"),
    ],
)
def test_options_that_make_no_sense(options, words):
    with pytest.raises(rwkv_miss.UserError, match=words):
        rwkv_miss.inject(rwkv(), "adalora", **options)


def test_a_rank_map_scales_the_first_rank_and_keeps_the_factor():
    model = rwkv()
    rwkv_miss.inject(model, "adalora", rank=8, rank_map={"ffn": 4})
    layers = adapted_linears(model)
    assert {(len(layer.lora_E), layer.scale) for name, layer in layers.items()} == {(12, 2.0), (6, 2.0)}
    assert len(layers["blocks.0.ffn.key"].lora_E) == 6
