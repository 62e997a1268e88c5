"""Cost of a first run on a laptop, in absolute numbers: training 1,000 conversations, and chatting.

    python -m benchmarks.laptop [--data FILE] [--rows 1000] [--steps 8] [--n_layer 12] [--n_embd 768]

The model is a random RWKV-7 of the released 0.1B model's size, in bf16 as released files are. train.py runs
in its own process with its defaults and --peft miss, once in fp32 and once with --precision bf16. It stops
after --steps steps, which have the size of a run's steps over all rows. Tokens a second are the median of the
steps after the first. Minutes are the time of all rows once: the steps that scripts.plan counts, at the
median, without the start and the evaluations. The chat answers greedily with the engine of demo.chat.

Without --data the rows are generated, with lengths distributed like GSM8K's. Only an idle machine gives
useful numbers: the load before the start is printed, and is in the JSON of the last line.
"""

import argparse
import json
import math
import os
import pathlib
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time

import torch

from src.inference.adapters import BASE
from src.inference.decoders import fastest
from src.inference.load import load

from .common import report, write_random_base

# each word, with a space before it, is one token of the World vocabulary
WORDS = "the of and to in is for it with on as at by from that this have not are was".split()
# tokens of GSM8K's 7,473 training rows: the median, and the standard deviation of the logarithm
QUESTION, ANSWER = (53, 0.36), (92, 0.43)
CORRELATION = 0.53  # between the logarithms of both lengths
RUNS = {"fp32": [], "bf16": ["--precision", "bf16"]}
PROMPT = 64  # tokens


def write_rows(path: pathlib.Path, count: int) -> None:
    """Write `count` conversations of one question and one answer."""
    draw = random.Random(0)

    def text(median: int, spread: float, deviation: float) -> str:
        return " ".join(draw.choices(WORDS, k=max(1, round(median * math.exp(spread * deviation)))))

    with open(path, "w", encoding="utf-8") as file:
        for _ in range(count):
            first, second = draw.gauss(0, 1), draw.gauss(0, 1)
            turns = {
                "user": text(*QUESTION, first),
                "assistant": text(*ANSWER, CORRELATION * first + (1 - CORRELATION**2) ** 0.5 * second),
            }
            messages = [{"role": role, "content": content} for role, content in turns.items()]
            file.write(json.dumps({"messages": messages}) + "\n")


def run(command: list[str]) -> str:
    """Return the output of a command of this repository; its errors end the benchmark."""
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    return done.stdout


def whole_pass(settings: list[str]) -> tuple[dict, list[str]]:
    """Return (the plan of a run over all rows, the flags for its rows a step). A short run would choose more
    rows a step.
    """
    once = ["--epoch_count", "1", "--tokens_per_second", "1"]
    *lines, last = run(["-m", "scripts.plan", "--json", *once, *settings]).splitlines()
    sizes = re.search(r"micro_bsz (\d+) x accumulate (\d+)", "\n".join(lines))
    return json.loads(last), ["--micro_bsz", sizes[1], "--accumulate_grad_batches", sizes[2]]


def train(settings: list[str], folder: pathlib.Path, steps: int) -> dict:
    """Do a run of `steps` steps; return its figures, and those of a pass over all rows at the same speed."""
    plan, sizes = whole_pass(settings)
    run(["train.py", *settings, *sizes, "--proj_dir", str(folder), "--epoch_steps", str(steps)])
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return figures(metrics, json.loads((folder / "run.json").read_text()), plan)


def figures(metrics: list[dict], summary: dict, plan: dict) -> dict:
    """Compute the figures from metrics.jsonl's lines, run.json, and the plan of a pass over all rows."""
    warm = metrics[1:]
    seconds = statistics.median(line["seconds"] for line in warm)
    return {
        "tokens_per_second": round(statistics.median(line["tokens_per_second"] for line in warm), 1),
        "seconds_per_step": round(seconds, 2),
        "tokens": plan["tokens"],
        "steps": plan["steps"],
        "minutes": round(plan["steps"] * seconds / 60, 1),
        "evaluation_share": round(plan["evaluation_seconds"] / plan["seconds"], 3),
        "first_step_seconds": round(summary["command_to_first_step_seconds"], 1),
        "peak_memory_bytes": summary["peak_memory_bytes"],
        "mapped_file_bytes": summary["mapped_file_bytes"],
    }


@torch.no_grad()
def chat(base: pathlib.Path, int8: bool, tokens: int) -> float:
    """Measure tokens a second of a greedy answer after a prompt."""
    model, _ = load(base)
    decoder, _ = fastest(model, int8=int8)
    logits, state = decoder.read(torch.arange(1, PROMPT + 1)[None], None)
    decoder.put(0, state)
    seconds = []
    for _ in range(tokens):
        start = time.perf_counter()
        logits = decoder.step(logits.argmax(-1).tolist(), [BASE])
        seconds.append(time.perf_counter() - start)
    return round(1 / statistics.median(seconds), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--data", type=pathlib.Path, help="a file that train.py reads [generated rows]")
    parser.add_argument("--rows", type=int, default=1000, help="rows that are generated [%(default)s]")
    parser.add_argument("--steps", type=int, default=8, help="training steps of each run [%(default)s]")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of an answer [%(default)s]")
    parser.add_argument("--n_layer", type=int, default=12)
    parser.add_argument("--n_embd", type=int, default=768)
    args = parser.parse_args()
    if args.steps < 2:
        parser.error(f"--steps {args.steps}: the first one does not count, so there must be 2 or more")
    load_before = os.getloadavg()[0]
    print(f"load average before the start: {load_before:.1f}; an idle machine has less than 0.5")
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        base, data = folder / "base.pth", args.data or folder / "rows.jsonl"
        parameters = write_random_base(base, 7, args.n_layer, args.n_embd, tokenizer="")
        if not args.data:
            write_rows(data, args.rows)
        settings = ["--load_model", str(base), "--data_file", str(data), "--peft", "miss"]
        runs = {}
        for name, flags in RUNS.items():
            runs[name] = found = train([*settings, *flags], folder / name, args.steps)
            print(
                f"training in {name}: {found['tokens_per_second']:,.0f} tokens/s; all rows once"
                f" {found['minutes']:.1f} min; first step after {found['first_step_seconds']:.0f} s;"
                f" peak memory {found['peak_memory_bytes'] / 1e9:.1f} GB, and"
                f" {found['mapped_file_bytes'] / 1e9:.1f} GB of mapped files",
                flush=True,
            )
        answers = {name: chat(base, name == "int8", args.tokens) for name in ("bf16", "int8")}
    for name, speed in answers.items():
        print(f"chat in {name}: {speed:.0f} tokens/s")
    report(
        "laptop",
        training=runs,
        chat_tokens_per_second=answers,
        parameters=parameters,
        shapes={"layers": args.n_layer, "width": args.n_embd, "vocabulary": 65536},
        dtype="base in bfloat16; trained in float32 or with --precision bf16",
        data=args.data.name if args.data else f"{args.rows} generated rows",
        training_steps=args.steps,
        load_before=round(load_before, 1),
    )


if __name__ == "__main__":
    main()
