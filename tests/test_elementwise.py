"""The native elementwise functions against their forms in plain torch, which are run in float64 here."""

import functools
import os
import platform
import re
import threading
from ctypes import CDLL

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from src.model import RWKV
from src.ops import (
    build,
    elementwise,
    elementwise_ops,
    elementwise_reference,
    kernel_errors,
    self_test,
    toolchain,
    wkv7,
)
from src.ops.mix7 import mix7, mix7_serves
from src.planning.base_model import build_model

from .conftest import close, make_arch, random_tensors, settled_config

# B, T, C, heads: head sizes 8, 16, 64, 80, 256
SIZES = [(2, 1, 24, 3), (1, 2, 48, 3), (2, 15, 128, 2), (1, 17, 160, 2), (2, 16, 512, 2)]
# Largest errors seen below, against the largest value (torch 2.13 CPU, AVX-512, AVX2, SSE2): fp32 6e-7, in dq
# of the low-rank mixes, a sum over the channels; bf16 8e-3 with outputs rounded once, 2^-8 = 4e-3 of a value
# each, and the low-rank mixes rounded before their use
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.2e-2}
EPS = 64e-5


def cases(B, T, C, heads):
    """{name: (function of activations and native, activations, names of what the native form keeps)}; numbers
    are exact in bf16.
    """
    generator = torch.Generator().manual_seed(1000 * T + C)

    def x(*sizes):
        return torch.randn(sizes or (B, T, C), generator=generator).bfloat16().double()

    reset = torch.rand(B, T + 1, generator=generator)[:, 1:] < 0.3  # a part of something else, as of a chunk
    mixes, maps = [x(1, 1, C) for _ in range(6)], x(5, 7, C) / 3
    k_k, k_a, weight, bias, r_k = x(1, 1, C), x(1, 1, C), x(C), x(C), x(heads, C // heads)
    of, low = elementwise, [x(), x(B, C), x(5, B * T, 7)]
    mix, mix_of_one = (reset, mixes), (None, mixes[:1])
    return {
        "shift_mix": (lambda z, last, on: of.shift_mix(z, last, *mix, on), [x(), x(B, C)], []),
        "shift_mix of one": (lambda z, last, on: of.shift_mix(z, last, *mix_of_one, on), [x(), x(B, C)], []),
        "shift_mix_low_rank": (
            lambda z, last, q, on: of.shift_mix_low_rank(z, last, reset, mixes[:5], q, maps, on),
            low,
            [0, 1, 2],
        ),
        "value_residual": (of.value_residual, [x(), x(), x()], [0, 1, 2]),
        "delta_inputs": (lambda k, a, on: of.delta_inputs(k, a, k_k, k_a, heads, on), [x(), x()], [0, 1]),
        "readout6": (lambda y, g, on: of.readout6(y, g, weight, bias, heads, EPS, on), [x(), x()], [0, 1]),
        "readout7": (
            lambda y, r, k, v, g, on: of.readout7(y, r, k, v, g, r_k, weight, bias, EPS, on),
            [x() for _ in range(5)],
            range(5),
        ),
        "relu_squared": (of.relu_squared, [x()], ["output"]),
    }


NAMES = list(cases(1, 1, 8, 1))
every_function = pytest.mark.parametrize("name", NAMES)


def results(function, activations, dtype, on):
    """Outputs, then gradients of the activations."""
    leaves = [t.to(dtype, copy=True).requires_grad_() for t in activations]
    out = function(*leaves, on)
    out = list(out) if isinstance(out, (list, tuple)) else [out]
    generator = torch.Generator().manual_seed(3)
    gradients = [torch.randn(y.shape, generator=generator).bfloat16().to(dtype) for y in out]
    return [t.detach() for t in (*out, *torch.autograd.grad(out, leaves, gradients))]


def compare(what, mine, exact, tolerance):
    """The gradient of `last` is exactly 0 where a document starts in every row."""
    (
        close(what, mine, exact, tolerance)
        if exact.any()
        else torch.testing.assert_close(mine.double(), exact, atol=0, rtol=0)
    )


def check(name, sizes, dtype):
    function, activations, _ = cases(*sizes)[name]
    want, got = (
        results(function, activations, torch.float64, ""),
        results(function, activations, dtype, "cpu"),
    )
    for i, (mine, exact) in enumerate(zip(got, want, strict=True)):
        assert mine.dtype == dtype
        compare(f"{name} {sizes} {dtype}: tensor {i}", mine, exact, TOLERANCE[dtype])


@pytest.fixture
def calls(monkeypatch):
    """The names of the native functions, as they are called."""
    seen, call = [], elementwise_ops.call
    monkeypatch.setattr(
        elementwise_ops,
        "call",
        lambda name, *args, **kwargs: (seen.append(name), call(name, *args, **kwargs))[1],
    )
    return seen


@every_function
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_outputs_and_gradients(name, dtype, calls):
    for sizes in SIZES:
        check(name, sizes, dtype)
    assert len(calls) == 2 * len(SIZES)


@every_function
def test_any_number_of_threads_gives_the_same(name):
    """Large enough for three: fewer numbers would be left to one thread."""
    function, activations, _ = cases(1, 515, 768, 12)[name]
    assert 515 * 768 >= 1 << 16
    for dtype in TOLERANCE:
        one, three = [], []
        for threads, into in ((1, one), (3, three)):
            torch.set_num_threads(threads)
            into += results(function, activations, dtype, "cpu")
        torch.set_num_threads(1)
        assert all(map(torch.equal, one, three))


@pytest.mark.skipif(not hasattr(CDLL(None), "GOMP_parallel"), reason="this torch has another OpenMP")
def test_threads_are_those_of_torch():
    """Threads stay: four join a thread that had none yet, and a function of torch finds them there."""
    x, counts = torch.ones(1, 515, 768), []

    def run():
        torch.set_num_threads(5)
        count()
        elementwise.relu_squared(x, "cpu")
        count()
        x.add_(1)
        count()

    def count():
        counts.append(len(os.listdir("/proc/self/task")))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    torch.set_num_threads(1)
    assert counts == [counts[0], counts[0] + 4, counts[0] + 4]


@pytest.mark.skipif(
    platform.machine() != "x86_64", reason="the other vector widths of this source need an x86-64"
)
@pytest.mark.rare
@pytest.mark.parametrize("flags", [["-mavx2", "-mfma"], ["-msse2"]], ids=" ".join)
def test_narrower_vectors(flags, monkeypatch):
    """The builds that other CPUs get, as in test_wkv.py."""
    command = [toolchain.find_cxx(), "-std=c++17", "-O2", *flags, "-ffp-contract=off", "-fPIC", "-pthread"]
    path = build.build(
        "wkv_cpu_narrow",
        "the CPU kernels",
        10,
        sorted(build.CUDA.glob("*_cpu.cpp")),
        build.headers(),
        command,
        ["-pthread"],
    )
    narrow = CDLL(str(path))
    narrow.device = "cpu"
    monkeypatch.setattr(elementwise_ops, "library", lambda device: narrow)
    for name in NAMES:
        for sizes in SIZES[:4]:
            check(name, sizes, torch.float32)


@every_function
def test_strides_do_not_matter(name):
    """Activations and gradients that are parts of something else."""
    function, activations, _ = cases(2, 15, 48, 3)[name]
    want = results(function, activations, torch.float32, "cpu")
    apart = [
        torch.stack([t.float(), torch.full_like(t, torch.nan).float()], -1)[..., 0].requires_grad_()
        for t in activations
    ]
    out = function(*apart, "cpu")
    out = list(out) if isinstance(out, (list, tuple)) else [out]
    generator = torch.Generator().manual_seed(3)
    gradients = [torch.randn(y.shape, generator=generator).bfloat16().float() for y in out]
    gradients = [torch.stack([g, torch.full_like(g, torch.nan)], -1)[..., 0] for g in gradients]
    for mine, theirs in zip((*out, *torch.autograd.grad(out, apart, gradients)), want, strict=True):
        assert torch.equal(mine, theirs)


@every_function
def test_a_part_of_the_outputs_may_be_left_unused(name):
    function, activations, _ = cases(2, 15, 48, 3)[name]

    def gradients(dtype, on):
        leaves = [t.to(dtype).requires_grad_() for t in activations]
        out = function(*leaves, on)
        (out[-1] if isinstance(out, (list, tuple)) else out).square().sum().backward()
        return [torch.zeros_like(t) if t.grad is None else t.grad for t in leaves]

    for mine, exact in zip(gradients(torch.float32, "cpu"), gradients(torch.float64, ""), strict=True):
        compare(name, mine, exact, TOLERANCE[torch.float32])


@every_function
def test_nothing_more_is_kept_than_stated(name):
    """Storages of the stated activations, and the model's vectors; a fixed token shift keeps none."""
    function, activations, stated = cases(2, 15, 48, 3)[name]
    leaves, kept = [t.float().requires_grad_() for t in activations], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = function(*leaves, "cpu")
    allowed = {(out if i == "output" else leaves[i]).data_ptr() for i in stated}
    large = {t.data_ptr() for t in kept if t.numel() > 6 * 48 and t.shape != (5, 7, 48)}
    assert large | {t.data_ptr() for t in kept if t.data_ptr() in allowed} == allowed


@every_function
def test_the_ops_keep_the_rules_of_torch_library(name, monkeypatch):
    function, activations, _ = cases(2, 5, 24, 3)[name]
    with Recorder() as recorder:
        outputs = function(*[t.float().requires_grad_() for t in activations], "cpu")
        sum(y.sum() for y in (outputs if isinstance(outputs, tuple) else [outputs])).backward()
    assert len(recorder.calls) == 2
    for op, arguments in recorder.calls:
        torch.library.opcheck(op, arguments)


class Recorder(TorchDispatchMode):
    """The ops of ours that run, with their arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "rwkv":
            self.calls.append((op, tree_map_only(torch.Tensor, torch.Tensor.detach, args)))
        return op(*args, **(kwargs or {}))


def test_the_op_follows_no_pointer_into_another_layout():
    x = torch.randn(1, 4, 16)[..., ::2]
    with pytest.raises(
        ValueError,
        match="relu_squared_forward: an argument is on cpu with strides .* expected a contiguous one on cpu",
    ):
        torch.ops.rwkv.relu_squared([x], 1, 0.0)


def test_the_op_takes_no_other_sizes():
    """A parameter that ZeRO-3 has let go is empty."""
    x, none = torch.randn(1, 4, 16), torch.empty(0)
    with pytest.raises(
        ValueError, match="delta_inputs: arguments are .*0.* expected one shape, and vectors of its last axis"
    ):
        elementwise.delta_inputs(x, x, none, torch.ones(16), 2, "cpu")
    with pytest.raises(ValueError, match="shift_mix: last and reset are .* because z is"):
        elementwise.shift_mix(x, torch.randn(1, 16), None, [none], "cpu")


def test_tokens_without_a_batch():
    """As the last layer's channel mix has them."""
    x = torch.randn(7, 24)
    got, want = (
        results(elementwise.relu_squared, [x], torch.float32, "cpu"),
        results(elementwise.relu_squared, [x], torch.float64, ""),
    )
    for mine, exact in zip(got, want, strict=True):
        close("tokens", mine, exact, TOLERANCE[torch.float32])


def test_what_is_not_finite_goes_on():
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-30, -1e-30, 3.0]).view(1, 1, 8)
    assert torch.equal(elementwise.relu_squared(x, "cpu").isnan(), x.isnan())
    assert (
        elementwise.relu_squared(x, "cpu")[0, 0, 1:].tolist()
        == elementwise_reference.relu_squared(x)[0, 0, 1:].tolist()
    )
    gated, _ = elementwise.value_residual(torch.zeros_like(x), torch.ones_like(x), x, "cpu")  # sigmoid(x)
    gated = gated[0, 0]
    assert gated[0].isnan()
    assert gated[1:].tolist() == pytest.approx(torch.sigmoid(x)[0, 0, 1:].tolist(), rel=1e-6, abs=1e-37)


def test_a_variance_that_overflows_is_nan():
    y, ones = torch.tensor([[[1e30, -1e30, 3e30, 0, 0, 0, 0, 0]]]), torch.ones(8)
    for function, others in (
        (elementwise.readout6, (ones, ones, 1)),
        (elementwise.readout7, (ones.view(1, 8), ones, ones)),
    ):
        activations = [y] * (2 if function is elementwise.readout6 else 5)
        for on in ("cpu", ""):
            assert function(*activations, *others, EPS, on).isnan().all()


def test_a_key_of_zero_has_no_direction():
    """normalize() holds the length at 1e-12 there, and its gradient at 0: kappa and the gradients are those
    of the plain form.
    """
    k, a = torch.randn(2, 3, 16, dtype=torch.float64), torch.randn(2, 3, 16, dtype=torch.float64)
    k[0, 1, :8] = 0
    ones = torch.ones(1, 1, 16, dtype=torch.float64)

    def function(k, a, on):
        return elementwise.delta_inputs(k, a, ones, ones, 2, on)

    for mine, exact in zip(
        results(function, [k, a], torch.float32, "cpu"),
        results(function, [k, a], torch.float64, ""),
        strict=True,
    ):
        close("key of zero", mine, exact, 2e-6)


def test_the_plain_form_runs_where_the_native_one_does_not_serve(calls):
    x, last, mix = torch.randn(1, 3, 16), torch.randn(1, 16), torch.randn(1, 1, 16)
    with torch.no_grad():
        elementwise.shift_mix(x, last, None, [mix.clone().requires_grad_()], "cpu")
    assert calls == ["shift_mix_forward"]
    calls.clear()
    trained = mix.clone().requires_grad_()
    elementwise.shift_mix(x, last, None, [trained], "cpu")[0].sum().backward()
    assert trained.grad.any()
    for other in (x.double(), x.half(), x[..., :15], x.to("meta"), x[:, :0]):
        elementwise.relu_squared(other, "cpu")
    elementwise.relu_squared(x, "")
    elementwise.value_residual(x, x, x.bfloat16(), "cpu")
    elementwise.delta_inputs(x, x, mix, mix, 4, "cpu")  # head size 4
    assert not calls


def note(kept, t):
    kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
    return t


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("begin", ["zeros", "s0", "initial_state", "documents"])
def test_mix7_is_its_three_functions(dtype, begin, calls):
    """To the last bit, with a gradient of the readout, of the state, or of both; and it keeps what they do
    but for the three inputs of wkv7.
    """
    B, T, C, heads = 2, 17, 160, 2
    generator = torch.Generator().manual_seed(4)

    def x(*sizes):
        return torch.randn(sizes, generator=generator)

    vectors = [x(1, 1, C), x(1, 1, C), x(heads, C // heads), x(C), x(C)]
    state = {"s0": x(B, heads, 80, 80), "initial_state": x(heads, 80, 80)}.get(begin)
    reset = torch.rand(B, T + 1, generator=generator)[:, 1:] < 0.3 if begin == "documents" else None
    inputs = [x(B, T, C).to(dtype) for _ in range(6)] + ([] if state is None else [state])
    dy, dstate = x(B, T, C).to(dtype), x(B, heads, 80, 80)

    def beginning(leaves):
        return leaves[6] if begin == "s0" else None, reset, leaves[6] if begin == "initial_state" else None

    def whole(*leaves):
        s0, reset, initial_state = beginning(leaves)
        assert mix7_serves(leaves[:6], vectors, reset, initial_state, "cpu")
        return mix7(leaves[:6], (), vectors, EPS, s0, reset, initial_state, "cpu", "cpu")[:2]

    def parts(*leaves):
        r, w, k, v, a, g = leaves[:6]
        k, alpha, beta = elementwise.delta_inputs(k, a, *vectors[:2], heads, "cpu")
        y, last = wkv7(
            *(t.unflatten(-1, (heads, -1)) for t in (r, w, k, v, alpha, beta)),
            *beginning(leaves)[:2],
            "cpu",
            beginning(leaves)[2],
        )
        return elementwise.readout7(y.flatten(-2), r, k, v, g, *vectors[2:], EPS, "cpu"), last

    found = {}
    for function in (whole, parts):
        for used in ([0], [1], [0, 1]):
            leaves = [t.clone().requires_grad_() for t in inputs]
            calls.clear()
            kept = {}
            with torch.autograd.graph.saved_tensors_hooks(functools.partial(note, kept), lambda t: t):
                out = function(*leaves)
            gradients = torch.autograd.grad(
                [out[i] for i in used], leaves, [(dy, dstate)[i] for i in used], materialize_grads=True
            )
            found[(function, *used)] = [*(t.detach() for t in out), *gradients]
            found[function] = sum(kept.values()), calls.count("delta_inputs_forward")
    for used in ([0], [1], [0, 1]):
        assert all(map(torch.equal, found[(whole, *used)], found[(parts, *used)]))
    assert found[parts][0] - found[whole][0] == 3 * dy.nbytes
    assert (found[parts][1], found[whole][1]) == (1, 2)


def test_mix7_leaves_documents_that_start_from_a_state_to_the_three_functions():
    """They are cut out of their rows."""
    activations = [torch.zeros(2, 5, 24)] * 6
    vectors = [torch.ones(24), torch.ones(24), torch.ones(3, 8), torch.ones(24), torch.ones(24)]
    reset, initial_state = torch.zeros(2, 5, dtype=torch.bool), torch.zeros(3, 8, 8)
    assert mix7_serves(activations, vectors, reset, None, "cpu")
    assert mix7_serves(activations, vectors, None, initial_state, "cpu")
    assert not mix7_serves(activations, vectors, reset, initial_state, "cpu")


@pytest.mark.parametrize(
    "argument, wrong, found",
    [
        ("s0", torch.zeros(2, 3, 8, 8, dtype=torch.bfloat16), "s0 is torch.bfloat16"),
        ("s0", torch.zeros(2, 3, 8, 8, dtype=torch.float64), "float64"),
        ("s0", torch.zeros(1, 3, 8, 8), r"\(1, 3, 8, 8\)"),
        ("s0", torch.zeros(2, 2, 8, 8), r"\(2, 2, 8, 8\)"),
        ("s0", torch.zeros(2, 3, 8), "s0 is"),
        ("reset", torch.zeros(2, 5, dtype=torch.int64), "reset is torch.int64"),
        ("reset", torch.zeros(2, 4, dtype=torch.bool), r"\(2, 4\)"),
        ("initial_state", torch.zeros(3, 8, 8, dtype=torch.bfloat16), "initial_state is torch.bfloat16"),
        ("initial_state", torch.zeros(2, 8, 8), r"\(2, 8, 8\)"),
        ("w", torch.zeros(2, 4, 24), r"w is torch.float32 \(2, 4, 3, 8\)"),
        ("g", torch.zeros(2, 5, 48), "g is torch.float32"),
    ],
)
def test_mix7_refuses_by_name_what_wkv7_refuses(argument, wrong, found, calls):
    arguments = (
        {name: torch.zeros(2, 5, 24) for name in "rwkvag"}
        | dict.fromkeys(["s0", "reset", "initial_state"])
        | {argument: wrong}
    )
    vectors = [torch.ones(24), torch.ones(24), torch.ones(3, 8), torch.ones(24), torch.ones(24)]
    with pytest.raises(ValueError, match=f"wkv7: {argument} is .*expected .* because r is") as error:
        mix7(
            [arguments[name] for name in "rwkvag"],
            (),
            vectors,
            EPS,
            *(arguments[name] for name in ("s0", "reset", "initial_state")),
            "cpu",
            "cpu",
        )
    assert re.search(found, str(error.value)) and not calls


# the model


def frozen_with_adapter(version, kernel, dtype):
    config = settled_config(peft="miss", peft_config={"r": 5})
    arch = make_arch(version, n_layer=3)
    torch.manual_seed(0)
    model = build_model(config, arch, kernel, dtype)
    tensors = random_tensors(arch)
    for name, p in model.named_parameters():
        with torch.no_grad():
            p.copy_(
                tensors[name]
                if name in tensors
                else torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))) / 9
            )
    return model.to(dtype)


@functools.cache
def trained(version, kernel, dtype):
    """{name: logits, state or gradient of an adapter} of two rows of documents, and a state to begin at."""
    model = frozen_with_adapter(version, kernel, dtype)
    ids = torch.randint(67, (2, 37), generator=torch.Generator().manual_seed(5))
    reset = torch.zeros(2, 37, dtype=torch.bool)
    reset[0, 11] = reset[1, 1] = True
    _, state = model(ids[:, :9])
    logits, after = model(ids, state, reset)
    logits.logsumexp(-1).sum().backward()
    found = {"logits": logits} | {f"state {i}": t for i, t in enumerate(t for layer in after for t in layer)}
    return {name: t.detach() for name, t in found.items()} | {
        name: p.grad for name, p in model.named_parameters() if p.requires_grad
    }


@pytest.mark.parametrize("version", [6, 7])
def test_a_model_with_a_frozen_base_trains_the_same_through_either_form(version, calls):
    exact = trained(version, "torch", torch.float64)
    assert not calls
    got = trained(version, "cpu", torch.float32)
    # 5 or 6 functions in each of three layers, two runs; the first layer of v7 has no value residual
    calls = [name for name in calls if name.endswith("_forward")]
    again = calls.count("delta_inputs_forward") // 2  # in the backward
    assert len(calls) - again == {6: 2 * 3 * 5, 7: 2 * (3 * 6 - 1)}[version]
    assert again == {6: 0, 7: 6}[version]
    for name, want in exact.items():
        # as between independent fp32 runtimes, and gradients of the same depth
        close(f"v{version} {name}", got[name], want, 2e-5)


@pytest.mark.parametrize(
    "name", ["golden/rwkv6-tiny", "golden/rwkv7-tiny", "real/rwkv7-reverse", "real/rwkv6-3m-utf16"]
)
def test_golden_logits(data_dir, name, calls):
    golden = torch.load(data_dir / f"{name}.golden.pt", weights_only=True)
    model = RWKV.load(data_dir / f"{name}.pth", torch.float32, kernel="cpu").requires_grad_(False)
    close("logits", model(golden["tokens"].long())[0], golden["logits64"], 2e-5)
    assert len(calls) >= 5 * model.arch.n_layer


def test_a_states_tokens_are_no_view_of_all_tokens():
    model = frozen_with_adapter(7, "cpu", torch.float32)
    _, after = model(torch.zeros(1, 37, dtype=torch.int64))
    sizes = [part.untyped_storage().nbytes() for layer in after for part in (layer.att_x, layer.ffn_x)]
    assert sizes == [48 * 4] * 2 * model.arch.n_layer


@pytest.mark.parametrize("wrong", ["", "relu_squared_forward", "readout7_backward", "delta_inputs_backward"])
def test_the_self_test_sees_a_wrong_function(monkeypatch, wrong):
    call = elementwise_ops.call

    def broken(name, like, before, vectors, after, *rest, **keywords):
        call(name, like, before, vectors, after, *rest, **keywords)
        if name == wrong:
            outputs = [t for x in after for t in (x if isinstance(x, list) else [x]) if t is not None]
            outputs[-1].mul_(1.001)

    monkeypatch.setattr(elementwise_ops, "call", broken)
    right = kernel_errors.elementwise_error("cpu") < self_test.LARGEST_ERROR[False]
    assert right == (not wrong)
