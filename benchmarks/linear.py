"""Measure one adapted linear, forward and backward, beside the frozen linear alone.

In one run: the methods of this project, and HF peft's MiSS and LoRA.

    python -m benchmarks.linear [--shapes 2048,2048,2048,64 512,768,3072,64] [--dtypes float32 bfloat16]
    [--systems miss lora] [--threads 1]

Shapes are tokens, inputs, outputs, rank of MiSS; LoRA has the rank of as many parameters, r out / (in + out),
and so has every other of --systems, which are methods and variants as benchmarks.paper sets them up, or all.
CPU time with one thread, wall time with several; the layers take turns and the fastest round of each counts.
"torch" is F.linear, "ours" the product that this project's layers use, with the same frozen weight. Kept is
what a forward leaves for its backward, beside parameters. The last line is JSON.

In bf16 peft comes twice: as get_peft_model() makes it, with adapters in fp32, by which it multiplies in fp32,
and with autocast_adapter_dtype=False, in one dtype. Our adapters are fp32 and are cast to bf16 for the
products.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rwkv_miss
from rwkv_miss.functional import linear

from .common import add_dtypes, add_integers, argument_parser, clock_name, report, timed
from .paper.methods import systems

SHAPES = [
    "2048,2048,2048,64",
    "512,768,768,64",
    "512,768,3072,64",
    "512,3072,768,64",
    "2048,2048,2048,16",
    "1024,4096,4096,64",
]


def layers(width: int, out: int, rank: int, dtype: torch.dtype, labels: list[str]) -> dict[str, nn.Module]:
    """Every layer on the same weight, with an adapter that is not zero."""
    import peft

    weight = torch.randn(out, width).mul_(0.02).to(dtype)

    def frozen() -> nn.Sequential:
        model = nn.Sequential(nn.Linear(width, out, bias=False, dtype=dtype))
        model[0].weight = nn.Parameter(weight, requires_grad=False)
        return model

    class Ours(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return linear(x, self.weight)

    with torch.device("meta"):
        ours = Ours(width, out, bias=False)
    ours.weight = nn.Parameter(weight, requires_grad=False)
    lora = max(1, rank * out // (width + out))
    found = {"frozen, torch": frozen(), "frozen, ours": ours}
    named = systems(lora, width, out)
    for name, (method, options) in named.items():
        if name in ("miss", *labels) or "all" in labels:
            if name == "miss":
                options = options | {"rank": rank}
            found[name] = frozen()
            rwkv_miss.inject(found[name], method, targets=["0"], **options)
    configs = {
        "miss": peft.MissConfig(r=rank),
        "lora": peft.LoraConfig(r=lora, lora_alpha=lora),
        "bat": peft.MissConfig(init_weights="bat"),
        "vera": peft.VeraConfig(),
        "dora": peft.LoraConfig(lora_alpha=lora, use_dora=True),
    }
    for name, settings in configs.items():
        if name in found:
            settings.target_modules = ["0"]
            settings.r = rank if name == "miss" else named[name][1]["rank"]
            found[f"peft {name}"] = peft.get_peft_model(frozen(), settings, autocast_adapter_dtype=False)
            if dtype != torch.float32:
                found[f"peft {name}, fp32"] = peft.get_peft_model(frozen(), settings)
    with torch.no_grad():
        for model in found.values():
            for p in model.parameters():
                if p.requires_grad:
                    p.normal_(std=0.01)
    return found


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """What a forward keeps that is as long as its input; parameters, and casts of them, are not."""
    parameters, kept = {p.data_ptr() for p in model.parameters()}, {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
    ):
        y = model(x)
    if not y.requires_grad:
        return 0
    rows = [t for place, t in kept.items() if place not in parameters and t.shape[0] == len(x)]
    return sum(t.numel() * t.element_size() for t in rows)


def measure(shape: str, dtype: torch.dtype, rounds: int, labels: list[str]) -> dict:
    tokens, width, out, rank = map(int, shape.split(","))
    torch.manual_seed(0)
    x, dy = torch.randn(tokens, width).to(dtype).requires_grad_(), torch.randn(tokens, out).to(dtype)
    models = layers(width, out, rank, dtype, labels)
    if dtype == torch.float32:
        y, merged = models["miss"](x), models["frozen, torch"][0].weight + models["miss"][0].delta()
        difference = (y - F.linear(x, merged)).norm()
        assert difference < 1e-5 * y.norm(), float(difference)
    seconds = dict.fromkeys(models, float("inf"))
    for _ in range(rounds + 1):
        for name, model in models.items():
            seconds[name] = min(seconds[name], timed(lambda: model(x).backward(dy)))  # noqa: B023
            x.grad = None
            for p in model.parameters():
                p.grad = None
    base = seconds["frozen, ours"]
    rows = {
        name: {
            "ms": round(s * 1e3, 3),
            "of_frozen_ours": round(s / base, 3),
            "of_frozen_torch": round(s / seconds["frozen, torch"], 3),
            "kept_bytes": kept_bytes(models[name], x),
            "parameters": sum(p.numel() for p in models[name].parameters() if p.requires_grad),
        }
        for name, s in seconds.items()
    }
    ratios = {}
    for other in ("peft miss", "peft lora", "peft miss, fp32", "peft lora, fp32"):
        if other in seconds:
            overhead = (seconds[other] - seconds["frozen, torch"]) / (seconds["miss"] - base)
            ratios[f"{other}_overhead_of_ours"] = round(overhead, 2)
    print(f"{shape} {dtype}")
    for name, row in rows.items():
        print(
            f"    {name:<16} {row['ms']:9.3f} ms  {row['of_frozen_ours']:6.3f} of frozen, ours "
            f" {row['of_frozen_torch']:6.3f} of frozen, torch  {row['kept_bytes']:>12,} bytes kept "
            f" {row['parameters']:>9,} parameters"
        )
    print(f"    overhead of HF peft over its frozen linear / ours over ours: {ratios}", flush=True)
    return {"shape": shape, "dtype": str(dtype), "layers": rows, **ratios}


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    add_dtypes(parser)
    parser.add_argument(
        "--systems", nargs="+", default=["miss", "lora"], help=f"of {', '.join(systems(1))}; or all"
    )
    add_integers(parser, threads=1, rounds=9)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = []
    for dtype in args.dtypes:
        for shape in args.shapes:
            results.append(measure(shape, getattr(torch, dtype), args.rounds, args.systems))
    report("linear", results=results, clock=clock_name(args.threads), rounds=args.rounds)


if __name__ == "__main__":
    main()
