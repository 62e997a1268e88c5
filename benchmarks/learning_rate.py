"""Learning rates of an adapter method on a small real task, by turns from low to high: what a default can be chosen from.

    python -m benchmarks.learning_rate [--peft state] [--train_parts state] [--load_model FILE --data_file FILE --tokenizer NAME]
        [--rates 1e-3 1e-2 ...]

Without files: the demo's base, which reverses letters, is taught to sort them. Each rate trains from the same start on the same rows with
what train.py does by default (AdamW, cosine to a tenth, clip 1). Loss is in nats per trained token: before, over the last tenth of the steps,
and on held-out documents at the end; the peak is the worst step's loss over the first one's. With --train_parts state the rates are those of
the state, and the method keeps its own. The last line is JSON.
"""

import argparse
import dataclasses
import math
import pathlib
import tempfile

import numpy as np
import torch

import rwkv_miss
from demo import task
from src import ops
from src.config import Config, adapter_options
from src.data import Batches, Documents, collate, load_documents, make_schedule
from src.held_out import evaluation_batches
from src.infctx import chunks_of, rows_loss
from src.learning_rate import learning_rate_factor, state_learning_rate
from src.model import RWKV, parameter_groups
from src.tokenizer import recorded_tokenizer

from .common import report

ROOT = pathlib.Path(__file__).parent.parent
RATES = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0]


def train(config: Config, documents: Documents, steps: int, lr: float) -> tuple[RWKV, list[float]]:
    """A fresh adapter trained at a rate, and the loss of every step; it ends early when one is not finite."""
    torch.manual_seed(config.random_seed)
    kernel, _ = ops.choose("auto", "cpu", rwkv_miss.Arch.detect(rwkv_miss.read_checkpoint(config.load_model)).head_size)
    model = RWKV.load(config.load_model, torch.float32, kernel=kernel)
    options, targets = adapter_options(config)
    rwkv_miss.inject(model, config.peft, targets, config.train_parts, **options)
    state_lr = state_learning_rate(dataclasses.replace(config, state_lr=lr))
    groups = parameter_groups(model, rwkv_miss.METHODS[config.peft].default_lr if state_lr else lr, 0.0, state_lr)
    optimizer = torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), eps=config.adam_eps)
    factor = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor(dataclasses.replace(config, lr_init=lr), steps))
    losses = []
    for batch in Batches(documents, make_schedule(documents, config, 1), steps, 0):
        loss = rows_loss(model, batch, chunks_of(config)) / batch["step_targets"]
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            break
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        factor.step()
    return model, losses


@torch.no_grad()
def held_out_loss(model: RWKV, config: Config, held_out: Documents) -> float:
    total = sum(float(rows_loss(model, collate(batch, 1), chunks_of(config))) for batch in evaluation_batches(held_out, config))
    return total / held_out.targets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    for name, default in (("peft", "state"), ("train_parts", ""), ("load_model", str(ROOT / "demo/rwkv7-reverse.pth")), ("data_file", ""),
                          ("tokenizer", "auto")):
        parser.add_argument(f"--{name}", default=default)
    for name, default in (("steps", 150), ("micro_bsz", 8), ("ctx_len", 128), ("held_out", 200), ("random_seed", 42)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        data_file = args.data_file or f"{folder}/sort.jsonl"
        if not args.data_file:
            task.write(data_file, task.rows("sort", 5 * args.micro_bsz * args.steps, 1))
        config = Config(load_model=args.load_model, peft=args.peft, train_parts=args.train_parts, micro_bsz=args.micro_bsz, ctx_len=args.ctx_len,
                        random_seed=args.random_seed)
        vocab_size = rwkv_miss.read_checkpoint(args.load_model)["emb.weight"].shape[0]
        documents = load_documents(data_file, recorded_tokenizer(args.tokenizer, "", vocab_size, args.load_model), args.ctx_len)
    if len(documents.rows) <= args.held_out:
        parser.error(f"there are {len(documents.rows)} documents, of which --held_out {args.held_out} leaves none to train on")
    order = np.random.default_rng(0).permutation(len(documents.rows))
    held_out, documents = documents.take(order[: args.held_out]), documents.take(order[args.held_out :])

    results = []
    for lr in args.rates:
        model, losses = train(config, documents, args.steps, lr)
        tail = losses[-max(1, args.steps // 10) :]
        held = held_out_loss(model, config, held_out) if len(losses) == args.steps else math.nan
        results.append({"lr": lr, "first": round(losses[0], 4), "last": round(sum(tail) / len(tail), 4), "held_out": round(held, 4),
                        "peak": round(max(losses) / losses[0], 3), "steps": len(losses)})
        print("lr {lr:<8g} loss {first:.4f} to {last:.4f}, held out {held_out:.4f}, peak {peak:.2f} x, {steps} steps".format(**results[-1]),
              flush=True)
    report("learning_rate", results=results, base=pathlib.Path(args.load_model).name, data=pathlib.Path(args.data_file).name or "sort",
           **{k: v for k, v in vars(args).items() if k not in ("load_model", "data_file", "rates")})


if __name__ == "__main__":
    main()
