"""Count the held-out questions that the base and the merged file answer exactly right. The last line is JSON.

python -m scripts.verify_merge tells whether the merged file equals the trained model.
"""

from __future__ import annotations

import json

if not __package__:  # started as a file, so that Python does not find src
    raise SystemExit("error: run this from the repository's folder as python -m demo.accuracy")

from src.common.startup import importing

with importing():
    from rwkv_miss.errors import Parser, one_line_errors
    from src.data.bos import bos_ids
    from src.data.questions import read_questions
    from src.data.templates import recorded_template
    from src.evaluation.answering import Asking, exact_accuracy
    from src.inference.load import load


def short(prompt: str) -> str:
    """Strip the template's words from a prompt, and put it on one line."""
    return prompt.removeprefix("User: ").removesuffix("Assistant:").strip().replace("\n\n", " / ")


def main() -> None:
    with one_line_errors():
        parser = Parser(prog="python -m demo.accuracy", description=__doc__)
        for name in ("base", "merged", "questions", "summary"):
            parser.add_argument(f"--{name}", required=True)
        parser.add_argument("--max_tokens", type=int, default=64, help="longest answer")
        args = parser.parse_args()
        merged, tokenizer = load(args.merged, precision="fp32")
        template = recorded_template("auto", tokenizer, args.merged)
        bos = bos_ids("recorded", tokenizer, args.merged)
        questions = read_questions(args.questions, template)
        asking = Asking(args.max_tokens, template, bos)
        after, answers = exact_accuracy(merged, tokenizer, questions, asking)
        base, tokenizer = load(args.base, precision="fp32")
        before, wrong = exact_accuracy(base, tokenizer, questions, asking)
        with open(args.summary, encoding="utf-8") as file:
            seconds = json.load(file)["train_seconds"]
        print(f"\n{'question':<60} {'base':<12} {'merged':<12}")
        for question, first, second in list(zip(questions, wrong, answers, strict=True))[:8]:
            print(f"{short(question.prompt):<60.60} {first:<12.12} {second:<12.12}")
        print(
            f"\nwhole answers exactly right on {len(questions)} held-out questions: {before:.1%} before,"
            f" {after:.1%} after"
        )
        print(f"next: chat with it, python -m demo.chat --model {args.merged}")
        print('      train on your own data, README.md, "Your model in four commands"; figures for programs:')
        result = {
            "accuracy_before": before,
            "accuracy_after": after,
            "base": args.base,
            "merged": args.merged,
            "train_seconds": round(seconds, 1),
        }
        print(json.dumps(result))


if __name__ == "__main__":
    main()
