"""Share of greedy answers that are exactly right: python -m scripts.evaluate --model m.pth --questions heldout.jsonl"""

from __future__ import annotations

import json

import torch

from rwkv_miss import load_adapter
from rwkv_miss.errors import Parser, one_line_errors
from src.evaluate import exact_accuracy, read_questions
from src.model import RWKV
from src.tokenizer import load_tokenizer, recorded_tokenizer


def main() -> None:
    with one_line_errors():
        parser = Parser(prog="python -m scripts.evaluate", description=__doc__)
        parser.add_argument("--model", required=True)
        parser.add_argument("--adapter")
        parser.add_argument("--questions", required=True, help='JSONL of {"messages": [...]} that end with the right answer')
        parser.add_argument("--tokenizer", default="auto")
        parser.add_argument("--max_tokens", type=int, default=32)
        parser.add_argument("--show", type=int, default=5, help="answers to print")
        args = parser.parse_args()
        model = RWKV.load(args.model, torch.float32)
        if args.adapter:
            load_adapter(model, args.adapter)
        tokenizer = load_tokenizer(recorded_tokenizer(args.tokenizer, args.adapter, args.model), model.arch.vocab_size)
        questions = read_questions(args.questions)
        accuracy, answers = exact_accuracy(model, tokenizer, questions, args.max_tokens)
    for (question, right), answer in list(zip(questions, answers))[: args.show]:
        print(f"{question!r} -> {answer!r}" + ("" if answer == right else f", right is {right!r}"))
    print(json.dumps({"accuracy": accuracy, "questions": len(questions), "model": args.model, "adapter": args.adapter}))


if __name__ == "__main__":
    main()
