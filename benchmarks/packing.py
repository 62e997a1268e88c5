"""Measure how full packed rows are beside padded ones, and the trained tokens a second.

The data is question-answer data; both forms run together.

    python -m benchmarks.packing DATA.jsonl [--ctx_len 512] [--micro_bsz 2] [--steps 4] [--n_layer 12]
    [--n_embd 768]

A random RWKV-7 with MiSS takes steps on both kinds of row by turns; the rate is trained tokens over wall
time, all steps together. Padded rows come in three kinds: to the longest of their micro-batch; to ctx_len;
and to ctx_len with the head on every position, as trainers have it that mask the loss afterwards. The last
line is JSON.
"""

import time
from collections.abc import Iterator

import torch

from src.config import Config
from src.data.batches import Batches, Schedule, make_schedule
from src.data.dataset import load_documents
from src.data.tokenizer import load_tokenizer
from src.model.layers import chosen
from src.model.loss import loss_sum
from src.training.optimizer import parameter_groups

from .common import add_integers, argument_parser, report, settings_without
from .step import random_model

FORMS = ("packed", "padded to the longest", "padded to ctx_len", "padded to ctx_len, head on all")


def to_ctx_len(batch: dict, ctx_len: int) -> dict:
    """The batch with its rows padded to ctx_len."""
    width = batch["ids"].shape[1]
    where = batch["where"] + batch["where"] // width * (ctx_len - width)
    return batch | {"ids": torch.nn.functional.pad(batch["ids"], (0, ctx_len - width)), "where": where}


def train_step(model, optimizer, batch, every_position: bool) -> tuple[int, float]:
    """(trained tokens, seconds) of one step; the head on the trained tokens only, or on every position."""
    start = time.perf_counter()
    x, _ = model.features(batch["ids"], reset=batch["reset"])
    where = batch["where"]
    logits = chosen(model.head(x), where) if every_position else model.head(chosen(x, where))
    (loss_sum(logits, batch["targets"]) / (batch["step_weight"] or 1.0)).backward()
    optimizer.step()
    optimizer.zero_grad()
    return len(where), time.perf_counter() - start


def share_filled(form: str, schedule: Schedule, ctx_len: int) -> float:
    """Tokens of the documents over positions of the rows."""
    room = 0
    for step in range(schedule.steps_per_pass):
        rows = schedule.step_rows(step)
        width = max(schedule.lengths[row] for row in rows) if "longest" in form else ctx_len
        room += len(rows) * width
    return sum(schedule.lengths) / room


def trained_tokens_per_second(model, batches: dict[str, Iterator[dict]], args) -> dict[str, float]:
    """Of every form, which take turns; the first step of each is the warm-up."""
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-4, 0.0))
    tokens, seconds = dict.fromkeys(batches, 0), dict.fromkeys(batches, 0.0)
    for step in range(args.steps + 1):
        for form, source in batches.items():
            batch = next(source)
            if "ctx_len" in form:
                batch = to_ctx_len(batch, args.ctx_len)
            trained, spent = train_step(model, optimizer, batch, "head on all" in form)
            if step:
                tokens[form] += trained
                seconds[form] += spent
    return {form: tokens[form] / seconds[form] for form in batches}


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("data")
    add_integers(parser, ctx_len=512, micro_bsz=2, steps=4, n_layer=12, n_embd=768)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = random_model(7, args.n_layer, args.n_embd, 65536, 64)

    start = time.perf_counter()
    documents = load_documents(args.data, load_tokenizer("world", 65536), args.ctx_len)
    tokenise_seconds = time.perf_counter() - start
    batches, fill = {}, {}
    for form in FORMS:
        config = Config(packing=form == "packed", ctx_len=args.ctx_len, micro_bsz=args.micro_bsz)
        schedule = make_schedule(documents, config, 1)
        batches[form] = iter(Batches(documents, schedule, args.steps + 1, 0))
        fill[form] = share_filled(form, schedule, args.ctx_len)

    rate = trained_tokens_per_second(model, batches, args)
    for form in FORMS:
        times = rate["packed"] / rate[form]
        print(
            f"{form:<30} {fill[form]:6.1%} full   {rate[form]:8.1f} trained tokens/s   packed is"
            f" {times:.2f} times as fast"
        )
    report(
        "packing",
        fill={form: round(share, 4) for form, share in fill.items()},
        trained_tokens_per_s={form: round(speed, 1) for form, speed in rate.items()},
        tokenise_seconds=round(tokenise_seconds, 2),
        documents=len(documents),
        **settings_without(args, "data"),
    )


if __name__ == "__main__":
    main()
