"""Single operators, forward and backward, compared with other forms of the same operator in one run.

    python -m benchmarks.ops wkv [--shapes B,T,C ...] [--kernels cpu torch reference] [--device cuda]
    [--peers] [--rwkv_lm FOLDER]
    python -m benchmarks.ops elementwise [--shapes B,T,C ...]
    python -m benchmarks.ops linear [--shapes TOKENS,IN,OUT,RANK ...] [--systems miss lora]
    python -m benchmarks.ops head [--shapes TOKENS,C,V ...] [--memory]

All take [--dtypes float32 bfloat16] [--threads 1] [--rounds 10]. On a GPU the default dtype is train.py's.
The forms take turns, and the fastest round of each counts: CPU time of one thread, wall time of several, or
the time until a GPU is done. "of" is the time divided by the first form's. A form that does not fit in a
GPU's memory has a row that says so. --memory adds the most memory above the start, in a process for each
form. The last line is JSON.

wkv: every kernel, and the token-by-token form under autograd. Errors are against float64, for the first row
of the batch. "Kept" is the memory that autograd holds between forward and backward, without the inputs.
--peers adds flash-linear-attention (pip install -e '.[bench]'), --rwkv_lm the kernels of a checkout of
RWKV-LM, in bf16; both run on GPUs only.

elementwise: the functions between the products of a layer, in plain torch and native, and a copy of one
activation. GB/s counts each activation and gradient once. relu_squared has four times the width.

linear: one adapted linear, the frozen one, and HF peft's MiSS and LoRA. LoRA, and every other of --systems
(names of benchmarks.paper, or all), has the rank at which it has as many parameters as MiSS. "torch" is
F.linear, "ours" the product of this project's layers. "Kept" counts tensors as long as the input. In bf16
peft is measured twice: as get_peft_model() makes it, with adapters in fp32, and in one dtype.

head: the loss of all logits at once in plain torch, and of blocks of rows.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rwkv_miss
from rwkv_miss.functional import linear
from src import ops
from src.common.device import PRECISIONS
from src.common.freed_memory import keep_freed
from src.common.token_loss import loss_sum
from src.model.loss import head_loss
from src.ops import elementwise

from . import rwkv_lm
from .common import (
    add_integers,
    argument_parser,
    clock_name,
    fastest_by_turns,
    json_of_process,
    peak_above_start,
    precision_on,
    report,
    report_so_far,
    runs_out,
)
from .paper.methods import systems

HEAD, RANK = 64, 32  # channels of a head, rank of RWKV-6's mixes
TOO_LARGE = "out_of_memory"
WKV = {7: ops.wkv7, 6: ops.wkv6}
SHAPES = {
    "wkv": "1,512,768 1,1024,2048",
    "elementwise": "1,512,768 1,512,2048",
    "linear": "2048,2048,2048,64 512,768,768,64 512,768,3072,64 512,3072,768,64 2048,2048,2048,16"
    " 1024,4096,4096,64",
    "head": "2048,768,65536",
}


class OpForm(NamedTuple):
    """One way to compute an operator, with gradients of its results, and inputs that need gradients."""

    name: str
    run: Callable[[], Any]
    inputs: list[Tensor]
    gradients: Any
    facts: dict[str, Any] = {}  # noqa: RUF012 (nothing writes to it)
    moved: int = 0  # bytes read and written, for the printed GB/s

    def __call__(self) -> tuple[Any, ...]:
        out = self.run()
        return out, *(torch.autograd.grad(out, self.inputs, self.gradients) if self.inputs else ())


def kept_mb(run: Callable[[], Any], known: set[int], rows: int | None = None) -> float:
    """Count the MB that autograd keeps of run(), without `known` storages; rows: only tensors this long."""
    kept: dict[int, Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
    ):
        out = run()  # held, so that no address is reused
    del out
    found = [
        t for place, t in kept.items() if place not in known and (rows is None or t.shape[:1] == (rows,))
    ]
    return round(sum(t.untyped_storage().nbytes() for t in found) / 1e6, 2)


def wkv_inputs(version: int, shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu"):
    """Make random inputs of `wkv6` or `wkv7` in the range of a trained model, and the gradient of y."""
    B, T, C = shape
    sizes = B, T, C // HEAD, HEAD
    torch.manual_seed(0)
    r, k, v, w, p, q, dy = (torch.randn(sizes) for _ in range(7))
    kappa = F.normalize(p, dim=-1)
    if version == 6:
        inputs = [r, k, v, w - 2, torch.randn(sizes[2:])]
    else:
        inputs = [r, 2 * w - 2, k, v, -kappa, kappa * torch.sigmoid(q)]
    return [x.to(device, dtype).requires_grad_() for x in inputs], dy.to(device, dtype)


def wkv_of(version: int, kernel: str) -> Callable[..., Tensor]:
    return lambda *inputs: WKV[version](*inputs, kernel=kernel)[0]


def fla(version: int) -> Callable[..., Tensor]:
    """Call fla's chunked kernel with our arguments: it takes log decays, and for RWKV-7 no raw ones."""
    from fla.ops.rwkv6 import chunk_rwkv6
    from fla.ops.rwkv7 import chunk_rwkv7

    from src.ops.reference import log_decay7

    if version == 6:
        return lambda r, k, v, w, u: chunk_rwkv6(r, k, v, -torch.exp(w.float()), u, scale=1.0)[0]
    return lambda r, w, k, v, a, b: chunk_rwkv7(r, log_decay7(w.float()), k, v, a, b, scale=1.0)[0]


def wkv(shape: tuple[int, ...], dtype: torch.dtype, args) -> Iterator[list[OpForm]]:
    native = [name for name, device in ops.NATIVE.items() if device == args.device]
    kernels = args.kernels or [*reversed(ops.PLAIN), *(() if dtype == torch.float64 else native)]
    theirs = rwkv_lm.peers(args.rwkv_lm.absolute(), shape[1]) if args.rwkv_lm else {6: {}, 7: {}}
    for version in WKV:
        inputs, dy = wkv_inputs(version, shape, dtype, args.device)
        runs = {kernel: wkv_of(version, kernel) for kernel in kernels} | theirs[version]
        if args.peers:
            runs["fla"] = fla(version)
        first = [(x if x.dim() == 2 else x[:1]).detach().requires_grad_() for x in inputs]
        exact = [x.detach().cpu().double().requires_grad_() for x in first]
        plain = functools.partial(wkv_of(version, "torch"), *exact)
        want = [x.detach() for x in OpForm("", plain, exact, dy[:1].cpu().double())()]
        known, forms = {x.untyped_storage().data_ptr() for x in inputs}, []
        for name, run in runs.items():
            form = OpForm(f"wkv{version} {name}", functools.partial(run, *inputs), inputs, dy, {})
            one_row = OpForm("", functools.partial(run, *first), first, dy[:1])

            def find(form=form, one_row=one_row, want=want, known=known) -> None:
                got = one_row()
                error = max(
                    float((a.detach().cpu().double() - b).norm() / b.norm()) for a, b in zip(got, want)
                )
                form.facts.update(kept_MB=kept_mb(form.run, known), error=f"{error:.1e}")
                form()

            if runs_out(find):
                form.facts[TOO_LARGE] = True
            forms.append(form)
        yield forms


def elementwise_forms(shape: tuple[int, ...], dtype: torch.dtype, args) -> Iterator[list[OpForm]]:
    B, T, C = shape
    heads, eps = C // HEAD, 64e-5

    def x(*sizes: int) -> Tensor:
        return torch.randn(sizes or shape).to(dtype).requires_grad_()

    mixes, maps, last = [torch.randn(C) for _ in range(6)], torch.randn(5, RANK, C), x(B, C)
    k_k, k_a, weight, bias = (torch.randn(C) for _ in range(4))
    r_k, e = torch.randn(heads, HEAD), elementwise
    # name -> (function of (activations, native), activations, number of those read or written in both passes)
    cases = {
        "shift_mix, 6 mixes": (lambda z, n: e.shift_mix(z, last, None, mixes, n), [x()], 7 + 7),
        "shift_mix, 1 mix": (lambda z, n: e.shift_mix(z, last, None, mixes[:1], n), [x()], 2 + 2),
        "shift_mix_low_rank": (
            lambda z, q, n: e.shift_mix_low_rank(z, last, None, mixes[:5], q, maps, n),
            [x(), x(5, B * T, RANK)],
            6 + 7,
        ),
        "value_residual": (lambda *a: e.value_residual(*a)[0], [x(), x(), x()], 4 + 7),
        "delta_inputs": (lambda k, a, n: e.delta_inputs(k, a, k_k, k_a, heads, n), [x(), x()], 5 + 7),
        "readout7": (
            lambda *a: e.readout7(*a[:5], r_k, weight, bias, eps, a[5]),
            [x() for _ in range(5)],
            6 + 11,
        ),
        "readout6": (lambda y, g, n: e.readout6(y, g, weight, bias, heads, eps, n), [x(), x()], 3 + 5),
        "relu_squared": (e.relu_squared, [x(B, T, 4 * C)], 4 * (2 + 3)),
    }
    activation = torch.randn(shape).to(dtype)
    other, size = torch.empty_like(activation), activation.nbytes
    for name, (function, inputs, moved) in cases.items():
        runs = {kind: functools.partial(function, *inputs, kind) for kind in ("", "cpu")}
        out = runs[""]()
        gradients = [torch.randn_like(y) for y in (out if isinstance(out, (list, tuple)) else [out])]
        yield [
            *(
                OpForm(f"{name}, {'native' if kind else 'plain'}", run, inputs, gradients, moved=moved * size)
                for kind, run in runs.items()
            ),
            OpForm(
                f"{name}, compared with a copy", lambda: other.copy_(activation), [], None, moved=2 * size
            ),
        ]


class OurLinear(nn.Linear):
    """A frozen linear with this project's product."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


def adapted(width: int, out: int, rank: int, dtype: torch.dtype, labels: list[str]) -> dict[str, nn.Module]:
    """Put every adapter of --systems on the same weight, and peft's version if it has one."""
    import peft

    weight = nn.Parameter(torch.randn(out, width).mul_(0.02).to(dtype), requires_grad=False)

    def frozen(kind: type[nn.Linear] = nn.Linear) -> nn.Sequential:
        with torch.device("meta"):
            model = nn.Sequential(kind(width, out, bias=False))
        model[0].weight = weight
        return model

    lora = max(1, rank * out // (width + out))
    named = systems(lora, width, out)
    named["miss"] = "miss", {"rank": rank}
    found = {"frozen, ours": frozen(OurLinear), "frozen, torch": frozen()}
    for name, (method, options) in named.items():
        if name in ("miss", *labels) or "all" in labels:
            found[name] = frozen()
            rwkv_miss.inject(found[name], method, targets=["0"], **options)
    configs = {
        "miss": peft.MissConfig(),
        "lora": peft.LoraConfig(lora_alpha=lora),
        "bat": peft.MissConfig(init_weights="bat"),
        "vera": peft.VeraConfig(),
        "dora": peft.LoraConfig(lora_alpha=lora, use_dora=True),
    }
    for name, settings in configs.items():
        if name in found:
            settings.target_modules, settings.r = ["0"], named[name][1]["rank"]
            found[f"peft {name}"] = peft.get_peft_model(frozen(), settings, autocast_adapter_dtype=False)
            if dtype != torch.float32:
                found[f"peft {name}, fp32"] = peft.get_peft_model(frozen(), settings)
    return found


def linear_forms(shape: tuple[int, ...], dtype: torch.dtype, args) -> Iterator[list[OpForm]]:
    tokens, width, out, rank = shape
    x, dy = torch.randn(tokens, width).to(dtype).requires_grad_(), torch.randn(tokens, out).to(dtype)
    forms = []
    for name, model in adapted(width, out, rank, dtype, args.systems).items():
        trained = [p for p in model.parameters() if p.requires_grad]
        for p in trained:
            nn.init.normal_(p, std=0.01)
        kept = kept_mb(functools.partial(model, x), {p.data_ptr() for p in model.parameters()}, tokens)
        facts = {"kept_MB": kept if trained else 0, "parameters": sum(p.numel() for p in trained)}
        forms.append(OpForm(name, functools.partial(model, x), [x, *trained], dy, facts))
    yield forms


def head(shape: tuple[int, ...], dtype: torch.dtype, args) -> Iterator[list[OpForm]]:
    tokens, width, vocab = shape
    x = torch.randn(tokens, width).to(dtype).requires_grad_()
    weight, targets = torch.randn(vocab, width).mul_(0.02).to(dtype), torch.randint(vocab, (tokens,))
    runs = {
        "all logits": lambda: loss_sum(F.linear(x, weight), targets),
        "blocks, plain softmax": lambda: head_loss(x, weight, targets),
        "blocks": lambda: head_loss(x, weight, targets, native=True),
    }
    yield [OpForm(name, run, [x], None) for name, run in runs.items()]


OPERATORS = {"wkv": wkv, "elementwise": elementwise_forms, "linear": linear_forms, "head": head}


def groups(shape: str, dtype: str, args) -> Iterator[list[OpForm]]:
    """Make groups of forms to compare; the first form of a group is the one to compare with."""
    torch.manual_seed(0)
    return OPERATORS[args.operator](tuple(map(int, shape.split(","))), getattr(torch, dtype), args)


def rows_of(forms: list[OpForm], shape: str, dtype: str, args) -> Iterator[dict[str, Any]]:
    """Measure forms in turns, and print a row for each."""
    fitting = [form for form in forms if TOO_LARGE not in form.facts]
    seconds = fastest_by_turns({form.name: form for form in fitting}, args.rounds, args.device)
    for form in forms:
        row = {"form": form.name, "shape": shape, "dtype": dtype}
        if form not in fitting:
            print(f"{form.name:<34} the GPU's memory does not suffice", flush=True)
            yield row | form.facts
            continue
        s = seconds[form.name]
        row["ms"] = round(1e3 * s, 3)
        row["of"] = float(f"{s / seconds[fitting[0].name]:.4g}")
        if form.moved:
            row["GB_per_s"] = round(form.moved / s / 1e9, 1)
        if args.memory:
            same = ["--shapes", shape, "--dtypes", dtype, "--threads", str(args.threads)]
            peak = json_of_process("benchmarks.ops", args.operator, *same, "--peak", form.name)
            row["peak_MB"] = round(peak / 1e6)
        row |= form.facts
        others = "  ".join(f"{name} {value}" for name, value in row.items() if name != "form")
        print(f"{form.name:<34} {others}", flush=True)
        yield row


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("operator", choices=OPERATORS)
    parser.add_argument("--shapes", nargs="+", help="numbers with commas")
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16", "float16", "float64"])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="of wkv")
    add_integers(parser, threads=1, rounds=10)
    parser.add_argument("--memory", action="store_true", help="measure the most memory of each form, too")
    parser.add_argument("--kernels", nargs="+", choices=ops.KERNELS, help="wkv: of these [all on the device]")
    parser.add_argument("--peers", action="store_true", help="wkv: measure flash-linear-attention, too")
    parser.add_argument("--rwkv_lm", type=pathlib.Path, help="wkv: a checkout of RWKV-LM")
    named = f"linear: of {', '.join(systems(1))}; or all"
    parser.add_argument("--systems", nargs="+", default=["miss", "lora"], help=named)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    on_gpu = args.device == "cuda"
    here = [str(PRECISIONS[precision_on("cuda", "auto")]).removeprefix("torch.")] if on_gpu else None
    args.dtypes = args.dtypes or here or ["float32", "bfloat16"]
    asked = [
        (shape, dtype) for shape in args.shapes or SHAPES[args.operator].split() for dtype in args.dtypes
    ]
    if args.peak:
        named = {form.name: form for forms in groups(*asked[0], args) for form in forms}
        print(peak_above_start(named[args.peak]))
        return
    pages_kept = keep_freed()
    rows = []
    for case in asked:
        for forms in groups(*case, args):
            rows += rows_of(forms, *case, args)
            if on_gpu:
                report_so_far(args.operator, rows=rows, rounds=args.rounds)
    clock = "until the GPU is done" if on_gpu else clock_name(args.threads)
    card = {"card": torch.cuda.get_device_name()} if on_gpu else {}
    report(args.operator, rows=rows, rounds=args.rounds, clock=clock, pages_kept=pages_kept, **card)


if __name__ == "__main__":
    main()
