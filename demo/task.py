"""Make data that a person can check by eye: reverse or sort a string of letters, as a conversation.

python -m demo.task sort --rows 20000 --out sort.jsonl --heldout 500
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import random
import string
from collections.abc import Sequence

TASKS = {"reverse": lambda letters: letters[::-1], "sort": lambda letters: "".join(sorted(letters))}
LENGTHS = range(3, 8)
FEWEST = 3  # letters; there are 17,576 strings of this length


def rows(
    task: str, count: int, seed: int, excluded: set[str] = frozenset(), lengths: Sequence[int] = LENGTHS
) -> list[dict]:
    """Make `count` conversations of one or two questions about strings of `lengths` letters, none of which
    is in `excluded`."""
    rng = random.Random(seed)

    def turn() -> list[dict]:
        letters = "".join(rng.choices(string.ascii_lowercase, k=rng.choice(lengths)))
        if letters in excluded:
            return turn()
        return [
            {"role": "user", "content": f"{task} {letters}"},
            {"role": "assistant", "content": TASKS[task](letters)},
        ]

    return [{"messages": turn() + (turn() if rng.random() < 0.25 else [])} for _ in range(count)]


def write(path: str, data: list[dict]) -> None:
    """Write one line for each row, and make the folder if it does not exist."""
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in data)


def main() -> None:
    # usage is suppressed, so that an error is one line
    parser = argparse.ArgumentParser("python -m demo.task", argparse.SUPPRESS, __doc__)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--heldout", type=int, default=500)
    parser.add_argument("--heldout_out", help="default: --out with -heldout at the end of its name")
    parser.add_argument("--letters", type=int, help="number of letters in every string; default: 3 to 7")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    if args.rows < 1 or args.heldout < 1:
        parser.error(f"--rows {args.rows} and --heldout {args.heldout}: there must be at least 1 of each")
    if args.letters is not None and args.letters < FEWEST:
        parser.error(f"--letters {args.letters}: expected {FEWEST} or more, as rows must not repeat")
    lengths = LENGTHS if args.letters is None else [args.letters]
    heldout = rows(args.task, args.heldout, args.seed, lengths=lengths)
    questions = set()
    for row in heldout:
        questions |= {turn["content"].split()[-1] for turn in row["messages"] if turn["role"] == "user"}
    name, suffix = os.path.splitext(args.out)
    try:
        write(args.heldout_out or f"{name}-heldout{suffix}", heldout)
        write(args.out, rows(args.task, args.rows, args.seed + 1, questions, lengths))
    except OSError as error:
        parser.error(f"{error.filename or 'a file'} could not be written: {error.strerror}")


if __name__ == "__main__":
    main()
