"""Measure how full packed rows are beside padded ones, and the trained tokens a second.

The data is question-answer data; both forms run together.

    python -m benchmarks.packing DATA.jsonl [--ctx_len 512] [--micro_bsz 2] [--steps 4] [--n_layer 12]
    [--n_embd 768]

A random RWKV-7 with MiSS takes steps on both kinds of row by turns; the rate is trained tokens over wall
time, all steps together. Padded rows come in three kinds: to the longest of their micro-batch; to ctx_len;
and to ctx_len with the head on every position, as trainers have it that mask the loss afterwards. The last
line is JSON.
"""

import argparse
import time

import torch

from src.config import Config
from src.data.batches import Batches, make_schedule
from src.data.dataset import load_documents
from src.data.tokenizer import load_tokenizer
from src.model.loss import loss_sum
from src.training.optimizer import parameter_groups

from .common import report
from .step import random_model


def to_ctx_len(batch: dict, ctx_len: int) -> dict:
    """The batch with its rows padded to ctx_len."""
    missing = ctx_len - batch["ids"].shape[1]
    return batch | {
        name: torch.nn.functional.pad(batch[name], (0, missing)) for name in ("ids", "targets", "mask")
    }


def train_step(model, optimizer, batch, every_position: bool) -> tuple[int, float]:
    """(trained tokens, seconds) of one step; the head on the trained tokens only, or on every position."""
    start = time.perf_counter()
    x, _ = model.features(batch["ids"], reset=batch["reset"])
    mask = batch["mask"]
    logits = model.head(x)[mask] if every_position else model.head(x[mask])
    (loss_sum(logits, batch["targets"][mask]) / max(batch["step_targets"], 1)).backward()
    optimizer.step()
    optimizer.zero_grad()
    return batch["step_targets"], time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0], allow_abbrev=False)
    parser.add_argument("data")
    for name, default in (("ctx_len", 512), ("micro_bsz", 2), ("steps", 4), ("n_layer", 12), ("n_embd", 768)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = random_model(7, args.n_layer, args.n_embd, 65536, 64)
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-4, 0.0))

    start = time.perf_counter()
    documents = load_documents(args.data, load_tokenizer("world", 65536), args.ctx_len)
    tokenise_seconds = time.perf_counter() - start
    batches, fill = {}, {}
    for title in ("packed", "padded to the longest", "padded to ctx_len", "padded to ctx_len, head on all"):
        schedule = make_schedule(
            documents, Config(packing=title == "packed", ctx_len=args.ctx_len, micro_bsz=args.micro_bsz), 1
        )
        batches[title] = iter(Batches(documents, schedule, args.steps + 1, 0))
        steps = range(schedule.steps_per_pass)
        widths = (
            {step: max(schedule.lengths[row] for row in schedule.step_rows(step)) for step in steps}
            if "longest" in title
            else {}
        )
        room = sum(len(schedule.step_rows(step)) * widths.get(step, args.ctx_len) for step in steps)
        fill[title] = sum(schedule.lengths) / room

    tokens, seconds = dict.fromkeys(batches, 0), dict.fromkeys(batches, 0.0)
    for step in range(args.steps + 1):
        for title, source in batches.items():
            batch = next(source)
            trained, spent = train_step(
                model,
                optimizer,
                to_ctx_len(batch, args.ctx_len) if "ctx_len" in title else batch,
                "head on all" in title,
            )
            if step:  # the first is the warm-up
                tokens[title] += trained
                seconds[title] += spent
    rate = {title: tokens[title] / seconds[title] for title in batches}
    for title in batches:
        times = rate["packed"] / rate[title]
        print(
            f"{title:<30} {fill[title]:6.1%} full   {rate[title]:8.1f} trained tokens/s   packed is"
            f" {times:.2f} times as fast"
        )
    report(
        "packing",
        fill={k: round(v, 4) for k, v in fill.items()},
        trained_tokens_per_s={k: round(v, 1) for k, v in rate.items()},
        tokenise_seconds=round(tokenise_seconds, 2),
        documents=len(documents),
        **{k: v for k, v in vars(args).items() if k != "data"},
    )


if __name__ == "__main__":
    main()
