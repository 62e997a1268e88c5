"""The same answers to many questions three ways: through the engine, in fixed batches, and one by one.

    python -m benchmarks.evaluate [--questions gsm8k_test.jsonl] [--count 200] [--length 92]
    [--deviation 0.43] [--alone 20] [--precision fp32] [--threads 1] [--n_layer 12] [--n_embd 768]
    [--version 7]

- engine: what scripts.evaluate does, with its own number of rows.
- batch 256: what it did before the engine (commit 0b18c5c): prompts of one length are read together, 256
  answers are made at once, and the next batch begins when the last of them is complete.
- one by one: the engine with one row, which is the chat. Of the first --alone questions; its time for all is
  that of their tokens, prompts included.

The model is random, and such a one never ends an answer. So the answers have lengths that are drawn: a median
of --length tokens, and --deviation of its logarithm, as GSM8K's right answers have them; 0 makes all alike.
Without --questions these are random words, in lengths as GSM8K's. CPU time of one thread, wall time of
several. The last line is JSON.
"""

import itertools
import json
import math
import pathlib
import random
import tempfile

import torch

from rwkv_miss.progress import Progress
from src.data.chat_template import before_stops
from src.data.questions import Question, read_questions
from src.data.rwkv_template import DEFAULT
from src.evaluation.answering import completed, engine_for
from src.inference.load import load
from src.inference.request import Request
from src.model import LayerState

from .common import (
    add_integers,
    argument_parser,
    clock_name,
    report,
    settings_without,
    timed,
    write_random_base,
)
from .laptop import write_rows

BATCH = 256


@torch.no_grad()
def in_batches(model, tokenizer, prompts: list[list[int]], limits: list[int]) -> list[str]:
    """The loop of before: greedy texts of `limits` tokens at most, BATCH at a time."""
    texts = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), BATCH):
        going = order[start : start + BATCH]
        said: dict[int, list[int]] = {i: [] for i in going}
        logits, state = read_together(model, [prompts[i] for i in going])
        while True:
            tokens = logits[:, : tokenizer.vocab_size].argmax(-1)
            for i, token in zip(going, tokens.tolist(), strict=True):
                said[i].append(token)
            left = [row for row, i in enumerate(going) if not is_over(said[i], tokenizer, limits[i])]
            if len(left) < len(going):
                rows = torch.tensor(left, dtype=torch.int64)
                going, tokens = [going[row] for row in left], tokens[rows]
                state = [LayerState(*(part[rows] for part in layer)) for layer in state]
            if not going:
                break
            logits, state = model.next_logits(tokens[:, None], state)
        for i, ids in said.items():
            ended = tuple(ids[-1:]) == tokenizer.eod
            texts[i] = before_stops(tokenizer.decode(ids[:-1] if ended else ids), DEFAULT.stops)
    return texts


def read_together(model, prompts: list[list[int]]):
    """Logits (B, V) after each prompt, and the states: those of one length are read together."""
    read = [model.next_logits(torch.tensor(list(same))) for _, same in itertools.groupby(prompts, key=len)]
    logits, states = zip(*read, strict=True)
    state = [LayerState(*map(torch.cat, zip(*layer, strict=True))) for layer in zip(*states, strict=True)]
    return torch.cat(logits), state


def is_over(ids: list[int], tokenizer, limit: int) -> bool:
    """Whether the last of these ids ends the answer."""
    if tuple(ids[-1:]) == tokenizer.eod or len(ids) >= limit:
        return True
    tail = tokenizer.decode(ids[-(max(map(len, DEFAULT.stops)) + 2) :])
    return any(stop in tail for stop in DEFAULT.stops)


def through_engine(
    model, tokenizer, prompts: list[list[int]], limits: list[int], rows: int | None = None
) -> list[str]:
    """The texts, `rows` at once."""
    requests = [Request(ids, limit, stops=DEFAULT.stops) for ids, limit in zip(prompts, limits, strict=True)]
    engine = engine_for(model, tokenizer, len(requests), rows)
    with Progress("answering", len(requests), "answers") as bar:
        answers = dict(completed(engine, requests, bar))
    return [answers[place].text for place in range(len(requests))]


def timed_result(work) -> tuple[float, list[str]]:
    """(seconds of work(), what it returns)."""
    results: list[str] = []
    return timed(lambda: results.extend(work())), results


def questions_of(args, folder: pathlib.Path) -> list[Question]:
    if not args.questions:
        args.questions = folder / "questions.jsonl"
        write_rows(args.questions, args.count)
    return read_questions(args.questions, DEFAULT)[: args.count]


def seconds_of(args, folder: pathlib.Path) -> dict[str, object]:
    """Way -> seconds, and what the answers were."""
    write_random_base(folder / "base.pth", args.version, args.n_layer, args.n_embd, "world")
    model, tokenizer = load(folder / "base.pth", precision=args.precision, accelerator="cpu")
    prompts = [question.ids(tokenizer) for question in questions_of(args, folder)]
    draw = random.Random(0)
    limits = [max(1, round(args.length * math.exp(draw.gauss(0, args.deviation)))) for _ in prompts]
    few = prompts[: args.alone]
    ways = {
        "engine": lambda: through_engine(model, tokenizer, prompts, limits),
        "batch 256": lambda: in_batches(model, tokenizer, prompts, limits),
        "one by one": lambda: through_engine(model, tokenizer, few, limits[: args.alone], 1),
    }
    # warms up, and builds what is native
    through_engine(model, tokenizer, prompts[:2], [3, 3])
    in_batches(model, tokenizer, prompts[:2], [3, 3])
    texts: dict[str, list[str]] = {}
    seconds = {}
    for name, work in ways.items():
        seconds[name], texts[name] = timed_result(work)
        print(f"{name}: {seconds[name]:.1f} s", flush=True)
    asked = [sum(map(len, some)) + sum(limits[: len(some)]) for some in (prompts, few)]
    seconds["one by one"] *= asked[0] / asked[1]
    for name in ("batch 256", "one by one"):
        same = sum(map(str.__eq__, texts["engine"], texts[name]))
        print(f"{same} of {len(texts[name])} answers are the same as with {name}")
    return {
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "times as fast": {
            name: round(value / seconds["engine"], 2) for name, value in seconds.items() if name != "engine"
        },
        "same answers": texts["engine"] == texts["batch 256"]
        and texts["engine"][: len(few)] == texts["one by one"],
        "prompt tokens": sum(map(len, prompts)),
        "answer tokens": sum(limits),
    }


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--questions", type=pathlib.Path)
    parser.add_argument("--deviation", type=float, default=0.43)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    add_integers(parser, count=200, length=92, alone=20, threads=1, n_layer=12, n_embd=768, version=7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        found = seconds_of(args, pathlib.Path(folder))
    print(f"{clock_name(args.threads)}: {json.dumps(found['times as fast'])}")
    report("evaluate", **settings_without(args, "questions"), **found)


if __name__ == "__main__":
    main()
