"""The model against an independent runtime, the float64 goldens, and itself in another order."""

import pytest
import torch

import rwkv_miss
from rwkv_miss import functional
from rwkv_miss.errors import UserError
from src.common.token_loss import loss_sum
from src.model import RWKV
from src.training.optimizer import parameter_groups

from .conftest import close, make_arch, pypi_rwkv, random_tensors, slow

SIZES = [
    dict(version=6, n_layer=3, n_embd=48, head_size=16),
    dict(version=6, n_layer=2, n_embd=64, head_size=64, vocab_size=101),
    dict(version=7, n_layer=3, n_embd=48, head_size=16),
    dict(version=7, n_layer=1, n_embd=72, head_size=8, vocab_size=101),
]
GOLDEN = ["golden/rwkv6-tiny", "golden/rwkv7-tiny", "real/rwkv7-reverse", "real/rwkv6-3m-utf16"]


def states(state):
    """Our state in the layout of the rwkv package: one sequence, [att_x, wkv, ffn_x] per layer."""
    return [part[0] for layer in state for part in layer]


@pytest.mark.product
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("tokens", [19, slow(1)])
def test_logits_and_states_equal_the_rwkv_package(checkpoint, sizes, tokens):
    path = checkpoint(**sizes)
    ids = torch.randint(sizes.get("vocab_size", 67), (tokens,), generator=torch.Generator().manual_seed(1))
    want, want_state = pypi_rwkv(path)(ids.tolist())
    got, state = RWKV.load(path)(ids[None])
    # fp32 against fp32, as seen between independent runtimes (goldens' README)
    close("logits", got[0], want[-tokens:], 2e-5)
    for i, (mine, theirs) in enumerate(zip(states(state), want_state, strict=True)):
        close(f"state {i}", mine, theirs.view_as(mine), 2e-5)


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("kernel", ["cpu", "torch"])
def test_golden_logits_states_loss_and_gradients(data_dir, name, kernel):
    golden = torch.load(data_dir / f"{name}.golden.pt", weights_only=True)
    # the real v6 file is bf16; the goldens are those of its float32 copy
    model = RWKV.load(data_dir / f"{name}.pth", torch.float32, kernel=kernel)
    model.requires_grad_(True)
    ids = golden["tokens"].long()
    logits, state = model(ids)
    logits.retain_grad()
    close("logits", logits, golden["logits64"], 2e-5)
    for layer, want in zip(state, golden["final_state"], strict=True):
        for part in ("att_x", "wkv", "ffn_x"):
            close(part, getattr(layer, part), want[part], 2e-5)
    count = ids[:, 1:].numel()
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert abs(float(loss) - float(golden["loss"])) < 1e-5 * float(golden["loss"])
    assert abs(
        float(loss_sum(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())) / count - float(golden["loss"])
    ) < 1e-5 * float(golden["loss"])
    loss.backward()
    largest = max(g.abs().max() for g in golden["grads"].values())
    parameters = dict(model.named_parameters())
    for key, want in golden["grads"].items():
        got = parameters[key].grad if parameters[key].grad is not None else torch.zeros_like(parameters[key])
        error = (got.double() - want.double().view_as(got)).abs().max() / max(
            want.abs().max(), 1e-3 * largest
        )
        assert error < 4e-4, f"{key}: gradient error {error:.1e}"


@pytest.mark.product
@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("kernel", ["cpu", "torch"])
def test_golden_steps_chunks_and_whole_agree(data_dir, name, kernel):
    golden = torch.load(data_dir / f"{name}.golden.pt", weights_only=True)
    model = RWKV.load(data_dir / f"{name}.pth", torch.float32, kernel=kernel)
    ids = golden["tokens"][:1].long()
    with torch.no_grad():
        whole, _ = model(ids)
        state, steps = None, []
        for t in range(ids.shape[1]):
            logits, state = model(ids[:, t : t + 1], state)
            steps.append(logits)
        state, chunks = None, []
        for part in ids.split([1, 16, 5, ids.shape[1] - 22], dim=1):
            logits, state = model(part, state)
            chunks.append(logits)
    close("steps", torch.cat(steps, 1)[0], golden["steps"], 2e-5)
    close("steps and whole", torch.cat(steps, 1), whole, 2e-5)
    close("chunks and whole", torch.cat(chunks, 1), whole, 2e-5)


@pytest.mark.parametrize("version", [6, 7])
def test_float64_kernels_agree_and_checkpointing_changes_nothing(version):
    arch = make_arch(version, n_layer=3)
    tensors = random_tensors(arch)
    ids = torch.randint(67, (2, 37), generator=torch.Generator().manual_seed(2))
    results = []
    for kernel, grad_cp in (("reference", 0), ("torch", 0), ("torch", 1), ("torch", 2)):
        model = RWKV(arch, kernel).double()
        model.load_state_dict(tensors)
        model.grad_cp = grad_cp
        loss = loss_sum(model(ids)[0].flatten(0, 1), ids.flatten())
        loss.backward()
        results.append(
            {"loss": loss, **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}
        )
    for other in results[1:]:
        assert other.keys() == results[0].keys()
        for key, want in results[0].items():
            assert (other[key] - want).abs().max() <= 1e-9 * max(1.0, float(want.abs().max())), key


# in fp32 the largest error seen is 1.2e-5, in the gradient of a0
@pytest.mark.parametrize(
    "kernel, dtype, allowed", [("torch", torch.float64, 1e-12), ("cpu", torch.float32, 5e-5)]
)
@pytest.mark.parametrize("version", [6, 7])
def test_documents_in_one_row_are_documents_in_rows_of_their_own(version, kernel, dtype, allowed):
    """Logits, gradients, final state; the first document goes on from a state, the others from nothing."""
    arch = make_arch(version, n_layer=3)
    model = RWKV(arch, kernel).to(dtype)
    model.load_state_dict(random_tensors(arch))
    random = torch.Generator().manual_seed(3)
    lengths = [5, 1, 1, 17, 3, 10]
    ids = torch.randint(67, (2, sum(lengths)), generator=random)
    weights = torch.randn(2, sum(lengths), 67, generator=random).to(dtype)
    with torch.no_grad():
        _, before = model(torch.randint(67, (2, 4), generator=random))
    reset = torch.zeros(ids.shape, dtype=torch.bool)
    reset[:, torch.tensor(lengths).cumsum(0)[:-1]] = True

    def run(parts):
        model.zero_grad()
        logits, final = [], before
        for part, start in parts:
            out, final = model(part, before if start is None or not logits else None, start)
            logits.append(out)
        logits = torch.cat(logits, 1)
        (logits * weights).sum().backward()
        return {
            "logits": logits,
            "wkv": final[-1].wkv,
            **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None},
        }

    want = run([(part, torch.zeros(part.shape, dtype=torch.bool)) for part in ids.split(lengths, 1)])
    got = run([(ids, reset)])
    assert got.keys() == want.keys()
    for name, t in want.items():
        close(name, got[name], t, allowed)


@pytest.mark.parametrize("version", [6, 7])
def test_what_is_recomputed(version):
    """--grad_cp 0: nothing, 1: whole layers, 2: their time mixes; what layers keep falls from 0 to 2 to 1."""
    model = RWKV(make_arch(version, n_layer=2), "cpu")
    model.load_state_dict(random_tensors(model.arch))
    rwkv_miss.inject(model, "miss", rank=4)
    calls, runs, kept = [], {}, {}
    for name in ("att.key", "ffn.key"):
        model.blocks[1].get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: calls.append(name)
        )
    for model.grad_cp in (0, 1, 2):
        calls.clear()
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t
        ):
            x, _ = model.features(torch.arange(24)[None])
        kept[model.grad_cp] = sum(sizes)
        x.square().sum().backward()
        runs[model.grad_cp] = (calls.count("att.key"), calls.count("ffn.key"))
    assert runs == {0: (1, 1), 1: (2, 2), 2: (2, 1)}
    assert kept[1] < kept[2] < kept[0]


@pytest.mark.parametrize("version, grad_cp", [(6, 0), (7, 1), (7, 2)])
def test_the_last_layer_works_for_the_wanted_tokens(version, grad_cp):
    """Numbers equal those of all tokens, and the channel mix of the last layer sees no others."""
    torch.manual_seed(0)
    model = RWKV(make_arch(version), "reference")
    model.load_state_dict(random_tensors(model.arch))
    model.double().grad_cp = grad_cp
    ids, wanted, reset = torch.randint(20, (2, 13)), torch.rand(2, 13) < 0.4, torch.rand(2, 13) < 0.2
    seen = {}
    for layer in (0, -1):
        model.blocks[layer].ffn.value.register_forward_hook(
            lambda module, x, y, layer=layer: seen.__setitem__(layer, x[0].shape[:-1])
        )
    results = []
    for these in (None, wanted.flatten().nonzero()[:, 0]):
        x, state = model.features(ids, reset=reset, wanted=these)
        x = x[wanted] if these is None else x
        after = [t for layer in state for t in layer]
        end = sum(t.sin().sum() for t in (x, *after))
        trained = [p for p in model.parameters() if p.requires_grad]
        results.append(
            [t.detach() for t in (x, *after)] + list(torch.autograd.grad(end, trained, allow_unused=True))
        )
    assert seen == {0: ids.shape, -1: (int(wanted.sum()),)}
    for all_tokens, these in zip(*results, strict=True):
        assert (all_tokens is None) == (these is None)
        if all_tokens is not None:
            torch.testing.assert_close(these, all_tokens, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kernel", ["torch", "cpu"])
@pytest.mark.parametrize("version", [6, 7])
def test_nothing_is_kept_or_computed_below_the_lowest_adapted_layer(version, kernel, monkeypatch):
    """The last two of three layers are adapted: the first leaves no tensor for a backward, and neither it nor
    the inputs of the second's linears get a gradient.
    """
    model = RWKV(make_arch(version, n_layer=3), kernel)
    model.load_state_dict(random_tensors(model.arch))
    names = [
        f"blocks.{layer}.{name}"
        for layer in (1, 2)
        for name in ("att.receptance", "att.key", "att.output", "ffn.key", "ffn.value")
    ]
    rwkv_miss.inject(model, "miss", names, rank=4)
    kept, below = [], []
    model.blocks[1].register_forward_pre_hook(
        lambda module, args: below.extend([*kept, *(x for x in args[:3] if getattr(x, "requires_grad", 0))])
    )
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        x, _ = model.features(torch.arange(12)[None])
    assert not below and kept
    multiplied = []
    product = functional.product_transposed
    monkeypatch.setattr(
        functional,
        "product_transposed",
        lambda x, weight: multiplied.append(weight.data_ptr()) or product(x, weight),
    )
    x.square().sum().backward()
    linears = {
        name: layer.weight.data_ptr()
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear)
    }
    behind_the_first = {"att.output", "ffn.key", "ffn.value"} | (
        {"ffn.receptance"} if version == 6 else set()
    )
    expected = {name for name in linears if name.startswith("blocks.2.")} | {
        f"blocks.1.{name}" for name in behind_the_first
    }
    assert {name for name, place in linears.items() if place in multiplied} == expected


@pytest.mark.parametrize("version", [6, 7])
def test_two_versions_and_bf16_live_in_one_process(version):
    arch = make_arch(version)
    exact, half = RWKV(arch), RWKV(arch)
    exact.load_state_dict(random_tensors(arch))
    half.load_state_dict(exact.state_dict())
    half.bfloat16()
    ids = torch.arange(20)[None]
    logits, state = half(ids)
    assert logits.dtype == torch.bfloat16 and state[0].wkv.dtype == torch.float32
    # bf16 weights and activations move the tiny goldens by 1 % of the largest logit (conformance document,
    # section 5); 4x for headroom in depth
    close("bf16", logits, exact(ids)[0], 0.05)


def test_golden_l2wrap(data_dir):
    for name in GOLDEN[:2]:
        golden = torch.load(data_dir / f"{name}.golden.pt", weights_only=True)
        logits = golden["logits64"].double().requires_grad_()
        B, T, V = logits.shape
        ids = golden["tokens"].long()
        rows = B * T
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, V), ids[:, 1:].flatten())
        want = golden["dlogits_l2wrap"].double()
        (plain,) = torch.autograd.grad(loss, logits)
        ours = logits.detach().reshape(-1, V).requires_grad_()
        total = loss_sum(ours, torch.zeros(rows, dtype=torch.long)) / rows
        without = torch.nn.functional.cross_entropy(ours, torch.zeros(rows, dtype=torch.long))
        pull = torch.autograd.grad(total, ours)[0] - torch.autograd.grad(without, ours)[0]
        close("L2Wrap", plain + pull.view_as(logits), want, 1e-6)


def test_l2wrap_follows_the_gradient_scale_and_no_rows_give_zero():
    logits = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    targets = torch.arange(5)
    (once,) = torch.autograd.grad(loss_sum(logits, targets), logits)
    (thrice,) = torch.autograd.grad(3 * loss_sum(logits, targets), logits)
    torch.testing.assert_close(thrice, 3 * once)
    empty = torch.zeros(0, 7, requires_grad=True)
    loss = loss_sum(empty, targets[:0])
    loss.backward()
    assert loss.item() == 0 and empty.grad.shape == (0, 7)


def test_layer_0_value_residual_may_be_absent_and_squeezed_vectors_load(tmp_path):
    arch = make_arch(7)
    tensors = random_tensors(arch)
    torch.save(tensors, tmp_path / "full.pth")
    bare = {
        k: v.squeeze()
        for k, v in tensors.items()
        if k not in ("blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2")
    }
    torch.save(bare, tmp_path / "bare.pth")
    full, short = RWKV.load(tmp_path / "full.pth"), RWKV.load(tmp_path / "bare.pth")
    ids = torch.arange(9)[None]
    assert torch.equal(full(ids)[0], short(ids)[0])
    assert short.state_dict().keys() == bare.keys()
    assert not full.blocks[0].att.v1.requires_grad and full.blocks[1].att.v1.requires_grad


def test_wrong_tensors_are_named(tmp_path):
    arch = make_arch(7)
    tensors = random_tensors(arch)

    def message(changed):
        torch.save(changed, tmp_path / "bad.pth")
        with pytest.raises(UserError) as error:
            RWKV.load(tmp_path / "bad.pth")
        return str(error.value)

    assert "blocks.1.ffn.key.weight" in message(
        {k: v for k, v in tensors.items() if k != "blocks.1.ffn.key.weight"}
    )
    assert "extra.weight" in message({**tensors, "extra.weight": torch.zeros(2)})
    text = message({**tensors, "blocks.1.att.w1": torch.zeros(48, 31)})
    assert "blocks.1.att.w1" in text and "(48, 31)" in text and "(48, 32)" in text
    assert "blocks.1.ln1.weight" in message(
        {**tensors, "blocks.1.ln1.weight": torch.full((48,), float("nan"))}
    )
    codes = tensors["blocks.1.att.key.weight"].mul(100).to(torch.int8)  # without their scale
    text = message({**tensors, "blocks.1.att.key.weight": codes})
    assert "blocks.1.att.key.weight is torch.int8, expected floating-point numbers" in text


def test_parameter_groups_double_the_decay_rate_and_decay_matrices_only():
    for version, double in ((6, "att.time_decay"), (7, "att.w0")):
        model = RWKV(make_arch(version))
        names = {id(p): n for n, p in model.named_parameters()}
        groups = parameter_groups(model, 1e-3, 0.1)
        assert sum(len(g["params"]) for g in groups) == sum(p.requires_grad for p in model.parameters())
        for group in groups:
            for p in group["params"]:
                name = names[id(p)]
                assert group["lr"] == (2e-3 if name.endswith(double) else 1e-3), name
                assert group["weight_decay"] == (
                    0.1 if p.squeeze().dim() > 1 and name.endswith(".weight") else 0.0
                ), name


def test_a_rate_map_multiplies_the_rates_by_the_longest_part_of_a_name():
    model = RWKV(make_arch(7))
    names = {id(p): n for n, p in model.named_parameters()}
    rates = {
        names[id(p)]: g["lr"]
        for g in parameter_groups(model, 1e-3, 0.0, None, {"ffn": 0.5, "blocks.1": 3, "att.w0": 0.0})
        for p in g["params"]
    }
    assert rates["blocks.0.ffn.key.weight"] == 5e-4 and rates["blocks.0.att.key.weight"] == 1e-3
    assert rates["emb.weight"] == 1e-3
    assert rates["blocks.1.ffn.key.weight"] == 3e-3, "blocks.1 is longer than ffn"
    assert rates["blocks.1.att.w0"] == 6e-3 and rates["blocks.0.att.w0"] == 0.0


def test_new_models_start_at_the_uniform_loss():
    for version in (6, 7):
        torch.manual_seed(0)
        model = RWKV(make_arch(version, vocab_size=50))
        ids = torch.randint(50, (2, 20))
        loss = loss_sum(model(ids)[0].flatten(0, 1), ids.flatten()) / ids.numel()
        # emb 1e-4 is normalised by ln0, so logits have the head's gain, 0.5 sqrt(V / C): loss near ln 50, not
        # at it
        assert abs(float(loss) - torch.tensor(50.0).log()) < 0.4
