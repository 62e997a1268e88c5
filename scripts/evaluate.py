"""Share of greedy answers that are exactly right: python -m scripts.evaluate --model m.pth --questions heldout.jsonl"""

from __future__ import annotations

import json

from src.doorway import importing, naming_missing_packages

with importing():
    from rwkv_miss.errors import Parser, UserError, one_line_errors
    from src.config import FIELDS
    from src.evaluate import exact_accuracy, read_questions
    from src.formats import Reading
    from src.load import load
    from src.template import recorded_template


def main() -> None:
    with one_line_errors(), naming_missing_packages():
        parser = Parser(prog="python -m scripts.evaluate", description=__doc__)
        parser.add_argument("--model", required=True)
        parser.add_argument("--adapter")
        parser.add_argument("--questions", required=True, help="questions and right answers, in any format of train.py's --data_file")
        for name in ("sft_field", "sft_split"):
            parser.add_argument(f"--{name}", default=FIELDS[name].default, help=FIELDS[name].metadata["help"])
        parser.add_argument("--tokenizer", default="auto")
        parser.add_argument("--eod", default="")
        parser.add_argument("--template", default="auto")
        parser.add_argument("--max_tokens", type=int, default=32)
        parser.add_argument("--show", type=int, default=5, help="answers to print")
        args = parser.parse_args()
        if args.max_tokens < 1:
            raise UserError(f"--max_tokens {args.max_tokens}: must be at least 1")
        if args.show < 0:
            raise UserError(f"--show {args.show}: must not be negative")
        model, tokenizer = load(args.model, args.adapter, args.tokenizer, args.eod, precision="fp32")
        template = recorded_template(args.template, tokenizer, args.adapter, args.model)
        questions = read_questions(args.questions, template, Reading.of(args))
        accuracy, answers = exact_accuracy(model, tokenizer, questions, args.max_tokens, template)
        for (question, right), answer in list(zip(questions, answers))[: args.show]:
            print(f"{''.join(question)!r} -> {answer!r}" + ("" if answer == right else f", right is {right!r}"))
        print(json.dumps({"accuracy": accuracy, "questions": len(questions), "model": args.model, "adapter": args.adapter}))


if __name__ == "__main__":
    main()
