"""Data that a person can check by eye: reverse, or sort, a string of letters, in chat form.

python -m demo.task sort --rows 20000 --out sort.jsonl --heldout 500 --heldout_out sort-heldout.jsonl
"""

from __future__ import annotations

import argparse
import json
import random
import string

TASKS = {"reverse": lambda letters: letters[::-1], "sort": lambda letters: "".join(sorted(letters))}
LENGTHS = range(3, 8)


def rows(task: str, count: int, seed: int, taken: set[str]) -> list[dict]:
    """`count` conversations about strings of 3 to 7 different letters, none of which is in `taken`; they are added to it."""
    rng = random.Random(seed)
    result = []
    while len(result) < count:
        letters = "".join(rng.sample(string.ascii_lowercase, rng.choice(LENGTHS)))
        # short strings are few: only longer ones must be new
        if letters in taken and len(letters) > LENGTHS[0]:
            continue
        taken.add(letters)
        result.append({"messages": [{"role": "user", "content": f"{task} {letters}"}, {"role": "assistant", "content": TASKS[task](letters)}]})
    return result


def write(path: str, data: list[dict]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in data)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m demo.task", description=__doc__)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--heldout", type=int, default=500)
    parser.add_argument("--heldout_out", required=True)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    heldout = rows(args.task, args.heldout, args.seed, taken := set())
    write(args.heldout_out, heldout)
    write(args.out, rows(args.task, args.rows, args.seed + 1, taken))


if __name__ == "__main__":
    main()
