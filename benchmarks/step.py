"""Measure the training step of a random RWKV with MiSS, whole and in parts.

For comparison the same loop runs with the step's bare matrix products, and with HF peft.

    python -m benchmarks.step [--n_layer 12] [--n_embd 768] [--ctx_len 512] [--version 7] [--threads 1]
    [--rounds 5] [--variants NAME ...] [--memory] [--device cuda --micro_bsz 8]

A step is forward, loss, backward and AdamW on micro_bsz rows. The variants take turns and the fastest round
of each counts: CPU time with one thread, wall time with several and on a GPU. `--memory` adds, for each
variant, the most memory above the model in two steps of a fresh process, and the bytes that the layers keep
for the backward. On a GPU the micro batch is halved until the first variant fits, and `asked_micro_bsz` has
the original one; another variant that does not fit has a row without seconds. The last line is JSON.
"""

import argparse
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F

import rwkv_miss
from rwkv_miss.adapter import adapted_linears
from rwkv_miss.errors import UserError
from rwkv_miss.gemm import product
from src.common.device import PRECISIONS
from src.common.freed_memory import keep_freed
from src.common.token_loss import loss_sum
from src.model import RWKV, default_arch, rwkv7
from src.training.optimizer import parameter_groups

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
    same_flags,
    settings_without,
)
from .ops import OpForm, fla, wkv_inputs, wkv_of

TARGETS = ["receptance", "key", "value", "gate", "output"]
VARIANTS = {
    "miss": "MiSS r, as train.py runs it",
    "half masked": "the same, half of the tokens without loss",
    "bf16": "the same, with bf16 weights and activations",
    "grad_cp 2": "the same, time mixes recomputed",
    "grad_cp 1": "the same, whole layers recomputed",
    "layers last:6": "the same, adapters in the last 6 layers only",
    "layers last:3": "the same, adapters in the last 3 layers only",
    "all logits": "the same, with the loss of all logits at once, plain torch",
    "lora": "LoRA r / 2, as train.py runs it",
    "none": "no adapter, the whole model trained, as train.py --peft none runs it",
    "peft miss": "HF peft's MiSS r on the same model",
    "peft lora": "HF peft's LoRA r / 2 on the same model",
    "fla": "the same, with the WKV of flash-linear-attention",
    "compiled": "MiSS r, with everything but the adapters in plain torch, compiled by torch.compile",
    "plain": "MiSS r, with everything but the adapters in plain torch, WKV in chunks",
    "plain, by tokens": "MiSS r, with everything but the adapters in plain torch, WKV token by token",
}
KERNELS = {"compiled": "torch", "plain": "torch", "plain, by tokens": "reference"}
ON_GPU = ("miss", "lora", "peft miss", "peft lora")  # default --variants on a GPU


def random_base(version: int, n_layer: int, n_embd: int, vocab_size: int, kernel: str = "cpu") -> RWKV:
    """Make a model with the initial values of a new one, but random maps instead of zero ones; by default
    with the CPU's native kernels.
    """
    model = RWKV(default_arch(version, n_layer, n_embd, vocab_size), kernel)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2 and not p.any():
                p.normal_(std=0.02)
    return model.requires_grad_(False)


def random_model(version: int, n_layer: int, n_embd: int, vocab_size: int, rank: int) -> RWKV:
    """Make a random_base with MiSS on the paper's linears."""
    model = random_base(version, n_layer, n_embd, vocab_size)
    rwkv_miss.inject(model, "miss", rank=rank)
    return model


def build(variant: str, base: RWKV, rank: int) -> RWKV:
    """Make the model of a variant; it shares the memory of `base`, except in bf16."""
    with torch.device("meta"):
        model = RWKV(base.arch, KERNELS.get(variant, base.emb.weight.device.type))
    dtype = torch.bfloat16 if variant == "bf16" else base.emb.weight.dtype
    model.load_state_dict({name: t.to(dtype) for name, t in base.state_dict().items()}, assign=True)
    model.requires_grad_(variant == "none")
    if variant == "none":
        pass
    elif variant.startswith("peft"):
        add_peft(model, variant, rank)
    else:
        method = "lora" if variant == "lora" else "miss"
        layers = variant.removeprefix("layers ") if variant.startswith("layers") else None
        rwkv_miss.inject(model, method, layers=layers, rank=rank // 2 if method == "lora" else rank)
    if variant == "fla":
        use_fla(model)
    elif variant == "compiled":
        model.features = torch.compile(model.features)
    if variant.startswith("grad_cp"):
        model.grad_cp = int(variant[-1])
    return model


def use_fla(model: RWKV) -> None:
    """Replace an RWKV-7's WKV by flash-linear-attention's, whose kernels also keep the state in fp32."""
    theirs, wkv7, mix7 = fla(7), rwkv7.wkv7, rwkv7.mix7

    # rows of a step begin without a state, and nothing reads the last state
    def wkv(*heads, **named):
        return (theirs(*heads[:6]), None) if "fla" in heads else wkv7(*heads, **named)

    def mix(activations, residual, vectors, eps, *rest):
        if "fla" not in rest[3:4]:
            return mix7(activations, residual, vectors, eps, *rest)
        r, w, k, v, a, g = activations
        k_k, k_a, r_k, weight, bias = vectors
        heads, native = len(model.blocks[0].att.r_k), rest[4]
        v, v_first = rwkv7.value_residual(v, *residual, native) if residual else (v, None)
        k, alpha, beta = rwkv7.delta_inputs(k, a, k_k, k_a, heads, native)
        y = theirs(*rwkv7.split_heads(heads, r, w, k, v, alpha, beta))
        return rwkv7.readout7(y.flatten(-2), r, k, v, g, r_k, weight, bias, eps, native), None, v_first

    rwkv7.wkv7, rwkv7.mix7 = wkv, mix
    for block in model.blocks:
        block.att.kernel = "fla"


def add_peft(model: RWKV, variant: str, rank: int) -> None:
    """Put HF peft's MiSS, or its LoRA with half of the rank, on the paper's linears, in place."""
    import peft

    if variant == "peft lora":
        settings = peft.LoraConfig(r=rank // 2, lora_alpha=rank)
    else:
        settings = peft.MissConfig(r=rank)
    settings.target_modules = [name for name in TARGETS if name in str(model.state_dict().keys())]
    # in the base's dtype, which is fastest: by default peft computes a bf16 base's adapters in fp32
    peft.get_peft_model(model, settings, autocast_adapter_dtype=False)


def make_step(variant: str, base: RWKV, rank: int, ids: torch.Tensor) -> Callable[[], None]:
    rows, length = len(ids), ids.shape[1] - 1
    wanted = torch.arange(rows * length, device=ids.device).view(rows, length)
    if variant == "half masked":
        wanted = wanted[:, length // 2 :]
    wanted = wanted.flatten()
    return training_step(build(variant, base, rank), ids, wanted, all_logits=variant == "all logits")


def training_step(
    model: RWKV, ids: torch.Tensor, wanted: torch.Tensor, all_logits: bool = False
) -> Callable[[], None]:
    """Make a step: forward, loss on the `wanted` of the B T tokens, backward and AdamW on rows of ids (B, T +
    1).
    """
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-4, 0.0))
    targets = ids[:, 1:].flatten()[wanted]

    def step() -> None:
        x, _ = model.features(ids[:, :-1], wanted=wanted)
        loss = loss_sum(model.head(x), targets) if all_logits else model.loss(x, targets)
        (loss / len(targets)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def is_multiplied(name: str, p: torch.Tensor) -> bool:
    """Tell whether a token is multiplied with this parameter of the base, as with a matrix."""
    if p.requires_grad or p.dim() < 2 or p.shape[0] == 1:
        return False
    if name == "emb.weight" or name.endswith(("r_k", "time_faaaa", "time_state")):
        return False
    # layer 0 has no value residual
    return not (name.startswith("blocks.0.att.v") and name[-1] in "012")


def matrices(base: RWKV) -> list[torch.Tensor]:
    """List the frozen weights that a token is multiplied with, (out, in)."""
    found = []
    for name, p in base.named_parameters():
        if not is_multiplied(name, p):
            continue
        if name.endswith("weight"):
            found.append(p)
        elif p.dim() == 3:  # RWKV-6 stacks its five maps in one tensor
            found += [part.t() for part in p]
        else:
            found.append(p.t())
    return found


def adapters(base: RWKV, rank: int) -> list[torch.Tensor]:
    """Make MiSS's D (r, out) of the paper's linears."""
    with torch.device("meta"):
        model = RWKV(base.arch)
        rwkv_miss.inject(model, "miss", rank=rank)
    return [torch.zeros(rank, layer.out_features) for layer in adapted_linears(model).values()]


def make_gemms(base: RWKV, rank: int, tokens: int, multiply: Callable) -> Callable[[], None]:
    """Make only the matrix products of variant "miss": y = x W^T and dx = dy W for the frozen weights; S D,
    dy D^T and S^T dy for each adapter. `multiply(x, W)` is x W^T.
    """
    weights, all_D = matrices(base), adapters(base, rank)
    widths = {rank}.union(*(w.shape for w in weights))
    x = {width: torch.randn(tokens, width).to(weights[0]) for width in widths}
    all_D = [D.to(weights[0]) for D in all_D]

    def gemms() -> None:
        for w in weights:
            multiply(x[w.shape[1]], w)
            multiply(x[w.shape[0]], w.t())
        for D in all_D:
            multiply(x[rank], D.t())
            multiply(x[D.shape[1]], D)
            multiply(x[rank].t(), x[D.shape[1]].t())

    return gemms


def flops(base: RWKV, rank: int, tokens: int) -> int:
    """Count the operations of make_gemms()'s products."""
    return tokens * (
        4 * sum(w.numel() for w in matrices(base)) + 6 * sum(D.numel() for D in adapters(base, rank))
    )


def peak(args, variant: str) -> int:
    """Measure the most memory above the model in two steps, in bytes, in a fresh process."""
    sizes = same_flags(args, "version", "n_layer", "n_embd", "vocab_size", "ctx_len", "rank")
    return json_of_process("benchmarks.step", *sizes, "--threads", "1", "--variants", variant, "--peak")


def kept(variant: str, base: RWKV, rank: int, ids: torch.Tensor) -> int:
    """Count the bytes that the layers keep for the backward of a step."""
    model, sizes = build(variant, base, rank), {}
    own = {p.untyped_storage()._cdata for p in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            sizes[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = model.features(ids[:, :-1])  # noqa: F841, whose graph holds the storages
    return sum(sizes.values())


def arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    add_integers(parser, version=7, n_layer=12, n_embd=768, vocab_size=65536, ctx_len=512, rank=64)
    add_integers(parser, micro_bsz=1, threads=1, rounds=5)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="auto", choices=["auto", *PRECISIONS], help="of the base")
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, help="by default all but none and the plain ones"
    )
    parser.add_argument("--memory", action="store_true", help="measure the memory of every variant, too")
    parser.add_argument("--peak", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    on_cpu = [name for name in VARIANTS if not name.startswith(("plain", "none", "fla", "compiled"))]
    args.dtype = precision_on(args.device, args.dtype)
    args.variants = args.variants or (on_cpu if args.device == "cpu" else ON_GPU)
    return args


def bare_parts(base: RWKV, args) -> dict[str, Callable[[], None]]:
    """Make the parts that a step is compared with: its matrix products in torch and here, and its WKV."""
    shape, tokens = (args.micro_bsz, args.ctx_len, args.n_embd), args.micro_bsz * args.ctx_len
    inputs, dy = wkv_inputs(args.version, shape, PRECISIONS[args.dtype], args.device)
    wkv = OpForm("", functools.partial(wkv_of(args.version, args.device), *inputs), inputs, dy)

    def wkv_of_all_layers() -> None:
        for _ in range(args.n_layer):
            wkv()

    return {
        "bare GEMMs, torch": make_gemms(base, args.rank, tokens, F.linear),
        "bare GEMMs, ours": make_gemms(base, args.rank, tokens, product),
        "WKV alone": wkv_of_all_layers,
    }


def show(name: str, row: dict, tokens: int) -> None:
    print(
        f"{name:<18} {row['seconds']:8.3f} s {tokens / row['seconds']:8.1f} tokens/s"
        f" {row['of_bare_torch_gemms']:6.2f} of bare GEMMs {row.get('of_miss', 0):6.2f} of miss"
        f" {row.get('peak_MB', '')} {row.get('kept_MB', '')}  {VARIANTS.get(name, '')}",
        flush=True,
    )


def steps_that_fit(base: RWKV, args) -> tuple[dict[str, Callable[[], None]], list[str], torch.Tensor]:
    """Make the variants' steps; returns (the steps that fit in memory, names of the others, rows of ids).

    args.micro_bsz is halved until the first variant fits.
    """
    while True:
        ids = torch.randint(
            args.vocab_size, (args.micro_bsz, args.ctx_len + 1), device=base.emb.weight.device
        )
        steps = {variant: make_step(variant, base, args.rank, ids) for variant in args.variants}
        if args.device == "cpu":
            return steps, [], ids
        first, *others = steps
        if not runs_out(steps[first]):
            break
        if args.micro_bsz == 1:
            raise UserError(f"one row of --ctx_len {args.ctx_len} does not fit in the GPU's memory: {first}")
        print(f"micro batch {args.micro_bsz // 2}: {args.micro_bsz} does not fit in the GPU's memory")
        args.micro_bsz //= 2
    too_large = [variant for variant in others if runs_out(steps[variant])]
    for variant in too_large:
        print(f"{variant}: the GPU's memory does not suffice")
    return {name: step for name, step in steps.items() if name not in too_large}, too_large, ids


def rows_of(seconds: dict[str, float], too_large: list[str]) -> dict[str, dict]:
    """Compute each time's ratios to the bare products and to MiSS."""
    rows: dict[str, dict] = {variant: {"out_of_memory": True} for variant in too_large}
    for name, s in seconds.items():
        rows[name] = {
            "seconds": round(s, 4),
            "of_bare_torch_gemms": round(s / seconds["bare GEMMs, torch"], 3),
        }
        if "miss" in seconds:
            rows[name]["of_miss"] = round(s / seconds["miss"], 3)
    return rows


def main() -> None:
    args = arguments()
    asked = args.micro_bsz
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    with torch.device(args.device):
        base = random_base(args.version, args.n_layer, args.n_embd, args.vocab_size, args.device)
    base.to(PRECISIONS[args.dtype])
    steps, too_large, ids = steps_that_fit(base, args)
    if args.peak:
        print(peak_above_start(lambda: [step() for step in (*steps.values(), *steps.values())]))
        return
    keep_freed()  # a training also keeps freed memory
    settings = settings_without(args, "peak", "variants", "memory")
    settings["clock"] = clock_name(args.threads) if args.device == "cpu" else "wall time"
    if args.micro_bsz < asked:
        settings["asked_micro_bsz"] = asked

    def so_far(seconds: dict[str, float]) -> None:
        if args.device == "cuda":
            report_so_far("step", rows=rows_of(seconds, too_large), **settings)

    seconds = fastest_by_turns(steps | bare_parts(base, args), args.rounds, args.device, so_far)
    rows = rows_of(seconds, too_large)
    for name in seconds:
        if args.memory and name in VARIANTS:
            rows[name]["peak_MB"] = round(peak(args, name) / 1e6)
            rows[name]["kept_MB"] = round(kept(name, base, args.rank, ids) / 1e6, 1)
        show(name, rows[name], len(ids) * args.ctx_len)
    report("step", rows=rows, **settings)


if __name__ == "__main__":
    main()
