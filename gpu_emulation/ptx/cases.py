"""The rows that the interpreter runs: a kernel, its arguments, and what is allowed, in one table.

Each function takes a Device and arguments, and returns {name: (found, exact, allowed)}. Errors are relative
(L2), against float64.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwkv_miss import quantised as formats
from src.model import RWKV
from src.model import loss as losses
from src.ops import quantised, wkv7
from src.ops.elementwise_ops import summable
from src.ops.elementwise_reference import delta_inputs, readout7
from src.ops.mix7 import mix7
from tests.conftest import make_arch, random_tensors
from tests.elementwise_cases import EPS, FUNCTIONS, RANK, SIZES, with_sums
from tests.elementwise_cases import results as elementwise_results
from tests.loss_cases import exact_loss, random_logits
from tests.test_wkv import DECAYS, OPS, documents, drop, make
from tests.test_wkv import results as wkv_results

from .device import Device
from .library import kernels

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
HALF, DTYPES = (BF16, FP16), (FP32, BF16, FP16)
ROUNDING = {FP32: 0.0, BF16: 2.0**-8, FP16: 2.0**-11}  # one rounding of an output
# The largest errors seen in fp32: 2.4e-7 for v6; 8.3e-7 for v7, in dk of single tokens, where v . dy cancels
RECURRENCE = {6: 2e-6, 7: 1e-6}
# dw is a difference of sums over all later tokens; in a few tokens nearly all may cancel
RECURRENCE_DW = 5e-5
# Operands of products are bf16. Seen: up to 4.0e-3 for v6, 5.6e-3 for v7, and 8.7e-3 in its db of two tokens,
# where it is one product that nearly cancels.
TENSOR_CORES = {6: 6e-3, 7: 1e-2}
MOST_STATES = 1 << 23  # numbers in all states of a row whose oracle keeps each of them
EXACT: dict[str, int] = {}  # options of the interpreter, which machine.h describes
Result = dict[str, tuple[Tensor, Tensor, float]]


class Case(NamedTuple):
    kernel: str
    title: str
    run: Callable[[Device], Result]
    quick: bool  # also in the tests that always run
    rows: int = 0  # not 0: only the last of this many rows of a batch runs
    options: dict[str, int] = EXACT

    @property
    def name(self) -> str:
        return f"{self.kernel} {self.title}"


def titled(*words, **keywords) -> str:
    """Describe a row by its arguments; those that are false are left out."""
    named = [name if value is True else f"{name}={value}" for name, value in keywords.items() if value]
    return " ".join(map(str, [*words, *named])).replace("torch.", "")


def distance(found: Tensor, exact: Tensor) -> float:
    """Return the relative L2 error; what is not finite has to be the same."""
    found, exact = found.detach().double(), exact.detach().double()
    if found.shape != exact.shape or not torch.equal(found.isnan(), exact.isnan()):
        return float("inf")
    finite = exact.isfinite()
    if not torch.equal(found[~finite].nan_to_num(), exact[~finite].nan_to_num()):
        return float("inf")
    error, size = (found[finite] - exact[finite]).norm().item(), exact[finite].norm().item()
    return error / size if size else (0.0 if not error else float("inf"))


def errors(case: Case, device: Device) -> tuple[dict[str, tuple[float, float]], list[str]]:
    """Run a row: {name: (error, allowed)}, and all that is wrong with it."""
    device.clear(case.rows, **case.options)
    found, wrong = {}, []
    try:
        for name, (got, exact, allowed) in case.run(device).items():
            found[name] = error, allowed = distance(got, exact), allowed
            if not error <= allowed:
                wrong.append(f"{name} is off by {error:.1e}, allowed {allowed:.1e}")
    except (AssertionError, RuntimeError, ValueError) as problem:
        wrong.append(f"{type(problem).__name__}: {problem}")
    wrong += device.findings()
    device.clear()
    return found, wrong


def wkv(
    device, version, chunked, shape, dtype, decay="real", ends="s0 dsT", packed=False, trained=True
) -> Result:
    """`ends`: an initial state, a gradient of the final one, both or none. `packed`: documents in a row."""
    B, T, H, N = shape
    x, dy, dsT = make(version, T, N, B, H, decay)
    x = {name: t if name in ("u", "s0") else t.to(dtype) for name, t in x.items()}
    x, dy = x if "s0" in ends else drop(x, "s0"), dy.to(dtype)
    dsT = dsT if "dsT" in ends else None
    reset = documents(B, T) if packed else None
    oracle = "reference" if B * T * H * N * N <= MOST_STATES else "torch"
    doubles = {name: t.double() for name, t in x.items()}
    want = wkv_results(version, doubles, dy.double(), dsT if dsT is None else dsT.double(), oracle, reset)
    given = {name: device.vector(t) if name == "u" else device.put(t) for name, t in x.items()}
    kernel = "cuda" if chunked else "cuda-exact"
    with device.in_place_of_cuda():
        if trained:
            got = wkv_results(version, given, device.put(dy), device.put(dsT), kernel, device.put(reset))
        else:
            got = dict(zip(("y", "sT"), OPS[version](**given, reset=device.put(reset), kernel=kernel)))
    if device.rows:
        got = {name: t if name == "du" else t[-1:] for name, t in got.items()}
    if chunked:
        return {name: (got[name], want[name], TENSOR_CORES[version]) for name in got}
    allowed = {"dw": RECURRENCE_DW}
    return {
        name: (got[name], want[name], allowed.get(name, RECURRENCE[version]) + ROUNDING[got[name].dtype])
        for name in got
    }


def wkv_cases(version: int, chunked: bool) -> Iterator[Case]:
    kernel = f"wkv{version}{'_chunked' * chunked}"
    dtypes, run = HALF if chunked else DTYPES, functools.partial(wkv, version=version, chunked=chunked)

    def case(quick, shape, dtype, rows=0, options=EXACT, **keywords):
        function = functools.partial(run, shape=shape, dtype=dtype, **keywords)
        return Case(kernel, titled(*shape, dtype, *options, **keywords), function, quick, rows, options)

    # with and without states, with one document a row and several, in turn
    turns = itertools.cycle(
        [
            {"packed": True},
            {"ends": "none"},
            {},
            {"ends": "none", "packed": True},
            {"ends": "s0"},
            {"ends": "dsT"},
        ]
    )
    for T, dtype in itertools.product((1, 2, 15, 16, 17, 37, 63, 64, 65, 130), dtypes):
        if not chunked and dtype != FP32 and T not in (1, 17, 37):
            continue  # test_ptx_wkv.py: in half precision inputs and outputs are rounded, and nothing else
        quick = T in (1, 16, 17, 65) and dtype != FP16 or T == 37
        shape = (2, T, 2, 64) if T < 16 else (1 + T % 3, T, 2 if T > 60 else 3, 64)
        yield case(quick, shape, dtype, **next(turns))
    for decay in DECAYS[version]:
        yield case(decay != "all underflow", (2, 37, 2, 64), dtypes[0], decay=decay)
        yield case(False, (1, 200 if chunked else 129, 1, 64), dtypes[-1], decay=decay, ends="none")
    for ends in ("s0", "dsT"):
        # half of the last tile of 16 tokens
        yield case(ends == "s0", (2, 24, 2, 64), dtypes[0], ends=ends, packed=True)
    yield case(True, (1, 35, 2, 64), dtypes[0], trained=False)
    # sums of mma truncated, ex2 and rcp as wrong as the manual allows, the last warp and the last block first
    for dtype, packed in itertools.product(dtypes, (True, False)):
        options = {"mma": 1, "approx": 1, "reverse": 1}
        yield case(dtype != FP16 and packed, (2, 50, 2, 64), dtype, packed=packed, options=options)
    if chunked and version == 7:
        # key, alpha and beta made by the recurrence
        for sizes, dtype, trained in itertools.product(
            [(2, 37, 128, 2), (1, 50, 64, 1)], HALF, (True, False)
        ):
            title = titled("mix7", *sizes, dtype, trained=trained)
            with_inputs = functools.partial(
                mix7_row, sizes=sizes, dtype=dtype, trained=trained, kernel="cuda"
            )
            yield Case(kernel, title, with_inputs, sizes[1] == 37 and trained == (dtype == BF16))
    if chunked:
        # two and four warps a block of scan; several segments of time
        for shape in ((1, 33, 64, 64), (2, 17, 65, 64), (1, 20, 128, 64), (1, 260, 64, 64)):
            yield case(False, shape, BF16, packed=True)
        for shape in ((1, 17, 64, 64), (2, 17, 65, 64)):
            yield case(False, shape, FP16)
    else:
        # sizes of heads; from some number of blocks on a lane holds four rows instead of one; slices of time
        sizes = [
            (2, 17, 3, 8),
            (2, 17, 3, 16),
            (1, 17, 3, 32),
            (1, 18, 2, 128),
            (1, 9, 2, 256),
            (2, 11, 1, 24),
        ]
        sizes += [(1, 9, 1, 96), (1, 9, 1, 200), (1, 33, 1, 40)]
        for shape, dtype in itertools.product(sizes, dtypes[:2]):
            yield case(dtype == FP32, shape, dtype, **next(turns))
        for shape, dtype in itertools.product([(1, 9, 97, 64), (1, 530, 1, 8)], dtypes[:2]):
            yield case(shape[1] > 512 and dtype == FP32, shape, dtype, packed=True)
        for shape in ((3, 9, 43, 40), (1, 530, 1, 32), (1, 1030, 1, 8)):
            yield case(False, shape, FP32, packed=shape[0] > 1)
    yield case(False, (1, 18, 32, 64), BF16 if chunked else FP32, 65535 if chunked else 70000, packed=True)


def elementwise_row(device, name, sizes, dtype, vectors=(), trained=False, used=slice(None)) -> Result:
    """`vectors`: their dtypes, in turn. `used`: the outputs that have a gradient."""
    want = elementwise_results(name, sizes, "", torch.float64, trained, used=used)
    with device.in_place_of_cuda():
        placed = {"place": device.put, "used": used}
        found = elementwise_results(name, sizes, "cuda", dtype, trained, vectors, **placed)
    # outputs are rounded once; before their use also shares of the low-rank mixes, what relu_squared keeps
    # and a layer's part of the gradient of v_first
    # and the norm that a token shift reads, and its gradient
    twice = {"shift_mix_low_rank": 1.5, "relu_squared": 1, "value_residual": 1, "shift_mix of a norm": 2}
    before = twice.get(name, 0) * ROUNDING[dtype]
    return {
        f"tensor {i}": (got if not device.rows else got[-1:], exact, 2e-6 + ROUNDING[got.dtype] + before)
        for i, (got, exact) in enumerate(zip(found, want, strict=True))
    }


def mix7_row(device, sizes, dtype, trained, kernel="cuda-exact") -> Result:
    """The recurrence and what is around it, in one backward, with the shard sums of the readout."""
    B, T, C, heads = sizes
    rank = summable(RANK, "cuda", C // heads)
    generator, shapes = torch.Generator().manual_seed(T + C), [(B, T, C)] * 6 + [(1, 1, C)] * 2
    shapes += [(heads, C // heads), (C,), (C,), (B, T, C), (B, T, rank)]
    *numbers, dy, dS = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]

    def gradients(dtype, vectors, function):
        leaves = [x.to(dtype).requires_grad_() for x in numbers[:6]]
        of_model = [x.to(vectors).requires_grad_(trained) for x in numbers[6:]]
        y, wanted = function(leaves, of_model), [*leaves, *(of_model if trained else ())]
        out = with_sums([y], [rank])
        return [*out, *torch.autograd.grad(out, wanted, [d.to(y.dtype) for d in (dy, dS)[: len(out)]])]

    def plain(leaves, of_model):
        r, w, k, v, a, g = leaves
        key, alpha, beta = delta_inputs(k, a, *of_model[:2], heads)
        y, _ = wkv7(*(x.unflatten(-1, (heads, -1)) for x in (r, w, key, v, alpha, beta)), kernel="torch")
        return readout7(y.flatten(-2), r, key, v, g, *of_model[2:], EPS)

    def native(leaves, of_model):
        return mix7(leaves, (), of_model, EPS, None, None, None, kernel, "cuda", rank)[0]

    want = gradients(torch.float64, torch.float64, plain)
    with device.in_place_of_cuda():
        got = gradients(dtype, FP32 if trained else dtype, native)
    # In half precision the recurrence's inputs and outputs are rounded in between. On tensor cores operands
    # of products are bf16 also where the inputs are fp16 (cuda/wkv7_chunked.cu). Seen: 9e-3 in bf16, 1.9e-2
    # in fp16, in da of 37 tokens. delta_inputs, the recurrence and the readout apart have the same errors.
    on_tensor_cores = kernel == "cuda"
    rounded = 4 * ROUNDING[BF16 if on_tensor_cores else dtype] + on_tensor_cores * TENSOR_CORES[7]
    names = f"y {'S ' * (rank > 0)}r w k v a g k_k k_a r_k weight bias".split()
    return {
        name: (mine, exact, (2e-5 if name == "w" else 5e-6) + rounded)
        for name, mine, exact in zip(names, got, want)
    }


def elementwise_cases() -> Iterator[Case]:
    sizes = [*SIZES, (3, 32, 128, 2)]

    def case(name, shape, dtype, quick=False, rows=0, options=EXACT, run=elementwise_row, **keywords):
        title = titled(*shape, dtype, *options, **keywords)
        if run is elementwise_row:
            keywords["name"] = name
        function = functools.partial(run, sizes=shape, dtype=dtype, **keywords)
        return Case(name, title, function, quick, rows, options)

    for name, (_, _, vectors) in FUNCTIONS.items():
        for dtype in DTYPES:
            for shape in sizes:
                quick = shape in sizes[2:5:2] and dtype != FP16
                yield case(name, shape, dtype, quick)
                if vectors:
                    yield case(name, shape, dtype, quick, vectors=[FP32], trained=True)
            for trained in (False, True) if vectors else ():
                yield case(name, sizes[2], dtype, trained and dtype == BF16, vectors=DTYPES, trained=trained)
        options = {"approx": 1, "reverse": 1}
        yield case(name, sizes[3], FP32, True, options=options, vectors=[FP32], trained=vectors > 0)
        if name != "shift_mix_low_rank":  # the shares of all tokens have no rows
            yield case(name, (1, 32, 2048, 32), BF16, rows=40000)
    for dtype, trained in itertools.product(DTYPES, (False, True)):
        norm = {"vectors": [FP32], "trained": trained}
        yield case("add_layer_norm", (2, 5, 264, 1), dtype, dtype == FP32, used=slice(1, 2), **norm)
        if not trained:  # the last layer's, whose v_first nobody reads
            yield case("value_residual", (2, 5, 264, 1), dtype, dtype == FP32, used=slice(1))
    for width in (8, 2056, 8192):
        yield case("add_layer_norm", (1, 35, width, 1), FP32, width > 8, trained=True)
    for shape, dtype, trained in itertools.product(sizes, DTYPES, (False, True)):
        if shape[1] < 3 and dtype != FP32:
            continue  # r and k of the first tokens mostly scale y: the norm leaves of that its rounding
        if shape == sizes[3] and dtype != FP32:
            continue  # for time
        quick = shape == sizes[2] and (dtype == FP32 or dtype == BF16 and trained)
        yield case("mix7", shape, dtype, quick, run=mix7_row, trained=trained)
    yield Case("elementwise", "refused arguments", refused, True)


def refused(device) -> Result:
    """Check that arguments which do not fit come back as an error, without a launch."""
    lib, before = device.library, kernels(device.library)

    def expect(function, pointers, sizes, *numbers):
        sizes = [ctypes.c_int64(n) for n in sizes]
        code = getattr(lib, function)(*pointers, *sizes, *numbers, *device.context)
        assert code == 1, f"{function} took {sizes}, {numbers}"

    for B, T, C, H, dtype in [(1, 1, 12, 1, 0), (1, 1, 264, 1, 0), (1, 0, 64, 1, 0), (1, 1, 64, 1, 3)]:
        expect("readout6_forward", [None] * 4, (0, 0, B, T, C, H), ctypes.c_float(0), dtype)
    for rank, H in [(4, 3), (24, 3), (512, 3), (16, 1)]:  # the last has a head of 96 channels
        expect("readout6_forward", [None] * 4, (rank, 0, 1, 1, 96, H), ctypes.c_float(0), 0)
    expect("add_layer_norm_forward", [None] * 5, (0, 1, 1, 8200, 1), ctypes.c_float(0), 0)
    for version, count in ((6, 11), (7, 12)):
        for B, T, H, N, dtype in [(1, 1, 1, 64, 0), (1, 1, 1, 32, 1), (1, 0, 1, 64, 1), (65536, 1, 1, 64, 1)]:
            expect(f"wkv{version}_chunked_forward", [None] * count, (B, T, H, N), dtype)
        unaligned = [ctypes.c_void_p(8), *[None] * (count - 1)]
        expect(f"wkv{version}_chunked_forward", unaligned, (1, 1, 1, 64), 1)
        for T, N, dtype in [(1, 4, 0), (1, 12, 0), (1, 264, 0), (0, 64, 0), (1, 64, 3)]:
            expect(f"wkv{version}_forward", [None] * (9 if version == 6 else 11), (1, T, 1, N), dtype)
    assert kernels(lib) == before, "a refused call launched a kernel"
    return {}


def loss_row(device, rows, vocab, dtype, weighted=False, hard=False, odd_address=False) -> Result:
    logits, targets = random_logits(1 if device.rows else rows, vocab)
    if hard:
        # a sum that is scaled again and again; many largest; nothing but -inf before the last; far apart
        logits[0], logits[1], logits[2] = torch.linspace(-80, 80, vocab), -3, -torch.inf
        logits[2, -1], targets[2], logits[3] = 2, vocab - 1, torch.linspace(1e4, -1e4, vocab)
    weights = torch.linspace(0, 2.5, len(logits)) if weighted else None  # the first token does not count
    if odd_address:
        given = device.empty((rows * vocab + 1,), FP32, True)[1:].view(rows, vocab).copy_(logits)
    else:
        given = device.put(logits, readonly=False)
    loss = device.empty((len(given),))
    others = device.put(targets), device.put(weights)
    assert losses.launch(device.library, given, *others, loss, dtype, device.context) == 0
    want, gradient = exact_loss(logits, targets, weights)
    found = losses.in_place_of(given, dtype)[-len(gradient) :]
    allowed = 1e-6 + ROUNDING[dtype]
    return {"loss": (loss[-len(want) :], want, 1e-6), "gradient": (found, gradient, allowed)}


def loss_cases() -> Iterator[Case]:
    # a block reads 4096 logits between two barriers
    sizes = [(3, 1), (3, 5), (5, 67), (4, 4096), (5, 4097), (4, 12292), (2, 20487), (4, 32772), (4, 65536)]

    def case(quick, rows, vocab, dtype, batch=0, options=EXACT, **keywords):
        function = functools.partial(loss_row, rows=rows, vocab=vocab, dtype=dtype, **keywords)
        return Case("loss", titled(rows, vocab, dtype, *options, **keywords), function, quick, batch, options)

    for (rows, vocab), dtype in itertools.product(sizes, DTYPES):
        quick = vocab < 21000 and (dtype != FP16 or vocab == 4097)
        yield case(quick, rows, vocab, dtype)
        yield case(quick and vocab < 4100, rows, vocab, dtype, weighted=True)
    for dtype in DTYPES:
        yield case(True, 4, 9001, dtype, hard=True)
        yield case(dtype == FP32, 3, 9004, dtype, options={"approx": 1, "reverse": 1}, weighted=True)
        yield case(False, 1, 65536, dtype, 40000)
    yield case(True, 3, 4100, FP32, odd_address=True)


def quantised_row(device, kind, shape, dtype) -> Result:
    out, width = shape
    packed = formats.quantise(torch.randn(shape, generator=torch.Generator().manual_seed(width)), kind)
    given, found = device.put(packed), device.empty((device.rows or out, width), dtype)
    device.lend(torch.view_as_real(formats.nf4_pairs(given.device, FP32)))
    assert quantised.launch(device.library, given, found, device.context) == 0
    want = formats.expand(packed, width, dtype)
    return {"weight": (found[-out:], want, 0.0)}


def quantised_cases() -> Iterator[Case]:
    sizes = [(3, 1), (5, 63), (2, 64), (3, 65), (4, 130), (3, 200), (2, 2048), (3, 2121), (3, 4104)]
    for kind in ("int8", "nf4"):
        for shape, dtype in itertools.product(sizes, DTYPES):
            run = functools.partial(quantised_row, kind=kind, shape=shape, dtype=dtype)
            yield Case("quantised", titled(kind, *shape, dtype), run, dtype != FP16 and shape != sizes[-1])
        run = functools.partial(quantised_row, kind=kind, shape=(1, 65545), dtype=BF16)
        yield Case("quantised", titled(kind, "far"), run, False, 40000)


def model_row(device, version, dtype, kernel) -> Result:
    """Every kernel of a layer in a training step: documents, a state to go on from, all tensors trained."""
    arch = make_arch(version, n_embd=128, head_size=64)
    weights = {name: t.to(dtype) for name, t in random_tensors(arch).items()}
    ids = torch.randint(67, (2, 47), generator=torch.Generator().manual_seed(5))
    reset = torch.zeros(2, 47, dtype=torch.bool)
    reset[0, 11] = reset[1, 1] = reset[1, 40] = True

    def step(kernel, dtype):
        model = RWKV(arch, "torch").to(dtype)
        model.load_state_dict(weights)
        model.set_kernel(kernel)
        _, state = model(ids[:, :9])
        logits, _ = model(ids, state, reset)
        logits.double().logsumexp(-1).sum().backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return found | {"logits": logits}

    want = step("torch", torch.float64)
    with device.in_place_of_cuda():
        got = step(kernel, dtype)
    assert got.keys() == want.keys()
    # in half precision what counts is whether it is worse than plain torch in the same one; tensor cores
    # multiply in bf16, also where the model is in fp16
    plain = step("torch", dtype) if dtype != FP32 else got
    least, times = (2e-5, 0) if dtype == FP32 else (1e-5, 1.25) if kernel == "cuda-exact" else (2e-2, 1.5)
    allowed = {name: least + times * distance(plain[name], want[name]) for name in want}
    return {name: (got[name], want[name], allowed[name]) for name in want}


def model_cases() -> Iterator[Case]:
    for version in OPS:
        for dtype, kernel in ((FP32, "cuda"), (BF16, "cuda"), (FP16, "cuda"), (FP16, "cuda-exact")):
            run = functools.partial(model_row, version=version, dtype=dtype, kernel=kernel)
            yield Case("model", titled(f"v{version}", dtype, kernel), run, True)


GROUPS: dict[str, Callable[[], Any]] = {
    **{f"wkv{v}{'_chunked' * c}": functools.partial(wkv_cases, v, c) for v in OPS for c in (False, True)},
    "elementwise": elementwise_cases,
    "loss": loss_cases,
    "quantised": quantised_cases,
    "model": model_cases,
}
NEED_TENSOR_CORES = ("wkv6_chunked", "wkv7_chunked", "model")  # sm_80 and later


def run_cases(device: Device, cases: Iterable[Case], say: Callable[[str], object] = str) -> list[str]:
    """Run rows; returns all that is wrong with them. `say` gets a line for each row."""
    problems = []
    for case in cases:
        found, wrong = errors(case, device)
        worst = max(found, key=lambda name: found[name][0] / (found[name][1] or 1), default="")
        error = f"{found[worst][0]:.1e} of {found[worst][1]:.0e}  {worst}" if worst else ""
        say(f"sm_{device.architecture:<4} {case.kernel:20} {case.title:52} {error}")
        for line in wrong:
            say(f"      {line}")
        problems += [f"{case.name}: {line}" for line in wrong]
    return problems


def small(run: Callable, **keywords) -> Case:
    return Case(run.__name__, titled(**keywords), functools.partial(run, **keywords), True)


# a row of each kind of kernel, for what takes long: mutants, traffic
SMALL = [
    small(loss_row, rows=2, vocab=9004, dtype=BF16, weighted=True),
    small(elementwise_row, name="add_layer_norm", sizes=(1, 35, 512, 1), dtype=BF16, trained=True),
    small(elementwise_row, name="shift_mix", sizes=(2, 70, 160, 2), dtype=FP32, trained=True),
    small(elementwise_row, name="readout7", sizes=(2, 37, 160, 2), dtype=FP32, trained=True),
    small(wkv, version=6, chunked=False, shape=(2, 19, 2, 64), dtype=FP32, packed=True),
    small(wkv, version=7, chunked=False, shape=(2, 19, 2, 64), dtype=FP32, packed=True),
    small(wkv, version=6, chunked=True, shape=(2, 100, 2, 64), dtype=BF16, packed=True),
    small(wkv, version=7, chunked=True, shape=(2, 100, 2, 64), dtype=BF16, packed=True),
    small(mix7_row, sizes=(2, 50, 128, 2), dtype=BF16, trained=True, kernel="cuda"),
]
