"""A quantised base against the unquantised one: what it learns, what it takes, how long a step lasts.

    python -m benchmarks.quant [--data ../shared/data] [--steps 200] [--seeds 3] [--n_layer 12] [--n_embd 768]
    [--ctx_len 512] [--threads 1]

Learning: small trained models are taught something new by MiSS, in the same steps on every kind of base: the
demo's base to sort, rwkv7-reverse its changed task (`123,` -> `432#`), and an English RWKV-6 Shakespeare;
without --data the first alone. Shown is the held-out loss after the steps, in nats a token, a mean over the
seeds, on the kind of base that the adapter was trained on; "merged" is that of the adapter on the unquantised
base, as the merge makes it. Rates are so low that rounding alone does not change the outcome: at 1e-2 the
runs of digits are chaotic, and int8 is then 0.84 to 1.20 times none, by the seed.

Cost: a random RWKV-7 of the given size, CPU seconds of one step (forward and backward of a row), the kinds
taking turns, the fastest of the rounds; what a whole run takes is in benchmarks/memory.py. The last line is
JSON.
"""

import contextlib
import pathlib
import random
import statistics
import tempfile
import time

import torch

from demo import task
from rwkv_miss.files.checkpoint import Arch
from rwkv_miss.inject import adapter_tensors
from rwkv_miss.quantised import CODES
from src.common.device import PRECISIONS
from src.config import Config
from src.data.collate import trained_tokens
from src.model import read_model_file
from src.model.batch_loss import batch_loss
from src.ops import self_test
from src.planning.base_model import build_model
from src.planning.step import chunks_of

from .common import add_integers, argument_parser, report, settings_without, write_random_base

ROOT = pathlib.Path(__file__).parent.parent
KINDS = ("none", *CODES)
WAYS = (*KINDS, "nf4, plain torch")  # without the native kernel that expands a weight
DIGITS = "0123456789,#"  # the vocabulary of rwkv7-reverse: an id is a place in it


def digits(count: int, seed: int) -> list[tuple[list[int], int]]:
    """Rows (ids, number of ids that are given) of the changed task of rwkv7-reverse: reverse, and add 1 to
    every digit.
    """
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        question = draw.choices(range(10), k=draw.randint(3, 15))
        rows.append(
            (
                [
                    *question,
                    DIGITS.index(","),
                    *((digit + 1) % 10 for digit in reversed(question)),
                    DIGITS.index("#"),
                ],
                len(question) + 1,
            )
        )
    return rows


def sorting(count: int, seed: int) -> list[tuple[list[int], int]]:
    """Rows of the demo's task, bytes."""
    rows = []
    for row in task.rows("sort", count, seed):
        question, answer = (message["content"] for message in row["messages"][:2])
        given = f"User: {question}\n\nAssistant: ".encode()
        rows.append(([*given, *answer.encode(), 0], len(given)))
    return rows


def shakespeare(path: pathlib.Path, count: int, seed: int) -> list[tuple[list[int], int]]:
    """Rows of 200 characters, UTF-16-LE bytes; seed 0 has them from the last tenth of the text, any other
    from what is before.
    """
    text = path.read_text()
    cut = len(text) * 9 // 10
    draw = random.Random(seed)
    starts = [
        draw.randrange(cut, len(text) - 200) if seed == 0 else draw.randrange(cut - 200) for _ in range(count)
    ]
    return [(list(text[start : start + 200].encode("utf-16-le")), 1) for start in starts]


def tasks(data: pathlib.Path | None) -> dict[str, dict]:
    """Name -> base, rows(count, seed), rows in a step, rank, learning rate."""
    found = {
        "demo: sort": {
            "base": ROOT / "demo/rwkv7-reverse.pth",
            "rows": sorting,
            "batch": 16,
            "rank": 12,
            "lr": 5e-3,
        }
    }
    if data:
        found["rwkv7-reverse: digits"] = {
            "base": data / "real/rwkv7-reverse.pth",
            "rows": digits,
            "batch": 16,
            "rank": 8,
            "lr": 1e-3,
        }
        found["rwkv6-3m: Shakespeare"] = {
            "base": data / "real/rwkv6-3m-utf16.pth",
            "batch": 4,
            "rank": 16,
            "lr": 3e-3,
            "rows": lambda count, seed: shakespeare(data / "tinyshakespeare.txt", count, seed),
        }
    return found


def batch(rows: list[tuple[list[int], int]]) -> dict:
    """Rows as the trainer has them, padded on the right."""
    width = max(len(ids) for ids, _ in rows) - 1
    ids, targets = (torch.zeros(len(rows), width, dtype=torch.int64) for _ in range(2))
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, (row, given) in enumerate(rows):
        n = len(row) - 1
        ids[i, :n], targets[i, :n] = torch.tensor(row[:-1]), torch.tensor(row[1:])
        mask[i, given - 1 : n] = True
    return {"ids": ids, "reset": None, **trained_tokens(targets.numpy(), mask.numpy())}


def loss(model, config: Config, rows: dict) -> torch.Tensor:
    return batch_loss(model, rows, chunks_of(config)) / len(rows["where"])


def build(base, kind: str, rank: int, precision: str = "fp32"):
    """(settings, model with MiSS on a base of this kind), every time with the same adapter."""
    config = Config(load_model=str(base), peft_config={"r": rank}, quant=kind, precision=precision)
    torch.manual_seed(0)
    return config, build_model(config, Arch.detect(read_model_file(base)), "cpu", PRECISIONS[precision])


def learn(task: dict, kind: str, steps: int, seed: int = 1) -> dict[str, float]:
    """Held-out losses before and after the steps, and of the adapter on the unquantised base."""
    config, model = build(task["base"], kind, task["rank"])
    heldout = batch(task["rows"](200, 0))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=task["lr"], betas=(0.9, 0.99), weight_decay=0.0)
    warmup = steps // 10
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / (steps - warmup))
    )
    with torch.no_grad():
        before = float(loss(model, config, heldout))
    rows = task["rows"](steps * task["batch"], seed)
    for step in range(steps):
        loss(model, config, batch(rows[step * task["batch"] :][: task["batch"]])).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    with torch.no_grad():
        after = float(loss(model, config, heldout))
        _, whole = build(task["base"], "none", task["rank"])
        for name, tensor in adapter_tensors(whole).items():
            tensor.copy_(adapter_tensors(model)[name])
        merged = float(loss(whole, config, heldout))
    return {"before": before, "after": after, "merged": merged}


def compare(name: str, chosen: dict, args) -> list[dict]:
    """Every kind's losses, means over --seeds orders of other rows, beside those of the unquantised base."""
    results = []
    for kind in KINDS:
        runs = [learn(chosen, kind, args.steps, seed) for seed in range(1, args.seeds + 1)]
        result = {key: statistics.mean(run[key] for run in runs) for key in runs[0]}
        plain = (results or [result])[0]["after"]
        ratios = {
            "times_none": round(result["after"] / plain, 4),
            "merged_times_none": round(result["merged"] / plain, 4),
        }
        results.append({"task": name, "kind": kind, **result, **ratios})
        print(
            f"{name:<24} {kind:<5} held-out loss {result['before']:.4f}, after {args.steps} steps"
            f" {result['after']:.4f}, {ratios['times_none']:.4f} times none; merged {result['merged']:.4f},"
            f" {ratios['merged_times_none']:.4f} times",
            flush=True,
        )
    return results


def step_seconds(config: Config, model, rows: dict) -> float:
    """CPU seconds of a forward and backward."""
    start = time.process_time()
    loss(model, config, rows).backward()
    spent = time.process_time() - start
    model.zero_grad()
    return spent


@contextlib.contextmanager
def plain_torch():
    """Context in which quantised weights are expanded as where there is no compiler."""
    status, self_test.status = self_test.status, lambda device: self_test.Status(False, False)
    try:
        yield
    finally:
        self_test.status = status


def cost(base, args, precision: str) -> list[dict]:
    """Bytes and seconds of every kind."""
    generator = torch.Generator().manual_seed(0)
    rows = batch([(torch.randint(256, (args.ctx_len + 1,), generator=generator).tolist(), 1)])
    models = {kind: build(base, kind, 64, precision) for kind in KINDS}
    seconds = dict.fromkeys(WAYS, float("inf"))
    for _ in range(args.rounds + 1):  # the first warms up, and is too slow to count
        for way in WAYS:
            with plain_torch() if way == "nf4, plain torch" else contextlib.nullcontext():
                seconds[way] = min(seconds[way], step_seconds(*models[way.partition(",")[0]], rows))
    figures = []
    for way in WAYS:
        _, model = models[way.partition(",")[0]]
        held = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
        ratio = round(seconds[way] / seconds["none"], 3)
        figures.append(
            {
                "precision": precision,
                "kind": way,
                "base_bytes": held,
                "step_s": round(seconds[way], 4),
                "times_none": ratio,
            }
        )
        print(
            f"{precision} {way:<16} base {held / 1e6:7.1f} MB, a step {seconds[way]:6.3f} s, {ratio:.3f}"
            " times none",
            flush=True,
        )
    return figures


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--data", type=pathlib.Path)
    add_integers(parser, steps=200, seeds=3, n_layer=12, n_embd=768, ctx_len=512, threads=1, rounds=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    learned = []
    if args.steps:
        for name, chosen in tasks(args.data).items():
            learned += compare(name, chosen, args)
    with tempfile.TemporaryDirectory() as folder:
        base = pathlib.Path(folder, "base.pth")
        write_random_base(base, 7, args.n_layer, args.n_embd)
        costs = [figure for precision in ("fp32", "bf16") for figure in cost(base, args, precision)]
    report("quant", learned=learned, costs=costs, **settings_without(args, "data"))


if __name__ == "__main__":
    main()
