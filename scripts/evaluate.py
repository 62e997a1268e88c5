"""Share of greedy answers that are right: python -m scripts.evaluate --model m.pth --questions heldout.jsonl --score number"""

from __future__ import annotations

import argparse
import json
from typing import Any

from src.doorway import importing, naming_missing_packages

with importing():
    from rwkv_miss.errors import Parser, UserError, one_line_errors
    from rwkv_miss.output import require_writable
    from src.answers import SCORES
    from src.code_tests import passed, read_problems
    from src.config import FIELDS
    from src.device import DTYPES
    from src.evaluate import answers_to, read_questions
    from src.files import write_text
    from src.formats import Reading
    from src.load import load
    from src.template import load_template, recorded_template

Questions = list[tuple[list[str], Any]]


def main(argv: list[str] | None = None) -> None:
    with one_line_errors(), naming_missing_packages():
        args = arguments(argv)
        if args.model:
            model, tokenizer = load(args.model, args.adapter, args.tokenizer, args.eod, precision=args.precision)
            template = recorded_template(args.template, tokenizer, args.adapter, args.model)
            questions = read(args, template)
            answers = answers_to(model, tokenizer, questions, args.max_tokens, template, args.batch)
        else:
            questions = read(args, load_template(args.template))
            answers = saved(args.answers, len(questions))
        if args.save:
            rows = ({"prompt": "".join(pieces), "answer": answer} for (pieces, _), answer in zip(questions, answers))
            write_text(args.save, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        if args.score == "code" and not args.run_code:
            print(f"{len(answers)} answers are in {args.save}, not scored: --answers {args.save} --score code --run_code runs them")
            return
        right = judged(args.score, answers, questions)
        for (pieces, wanted), answer, is_right in list(zip(questions, answers, right))[: args.show]:
            expected = "" if is_right else f", {'fails the tests' if args.score == 'code' else f'right is {wanted!r}'}"
            print(f"{''.join(pieces)!r} -> {answer!r}{expected}")
        print(json.dumps({"accuracy": sum(right) / len(right), "score": args.score, "questions": len(questions), "model": args.model,
                          "adapter": args.adapter, "answers": args.answers}))


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The flags. UserError for those that do not go together, before a model is loaded."""
    parser = Parser(prog="python -m scripts.evaluate", description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--adapter")
    parser.add_argument("--questions", required=True, help="questions and right answers, in any format of train.py's --data_file; with --score code "
                                                           "HumanEval or MBPP")
    for name in ("sft_field", "sft_split"):
        parser.add_argument(f"--{name}", default=FIELDS[name].default, help=FIELDS[name].metadata["help"])
    parser.add_argument("--score", default="exact", choices=(*SCORES, "code"),
                        help="an answer is right if it is, as a whole, the right one (exact), ends in the same number (number: GSM8K), has an "
                             "equal \\boxed{} result (boxed: MATH), or is a program that passes the tests (code: HumanEval, MBPP)")
    parser.add_argument("--run_code", action="store_true",
                        help="with --score code: run the model's programs on this machine, with limits of time and memory but in no sandbox")
    parser.add_argument("--save", help="write prompts and answers to this JSONL file")
    parser.add_argument("--answers", help="score the answers of such a file, without a model")
    parser.add_argument("--tokenizer", default="auto")
    parser.add_argument("--eod", default="")
    parser.add_argument("--template", default="auto")
    parser.add_argument("--precision", default="fp32", choices=("auto", *DTYPES), help="default %(default)s")
    parser.add_argument("--max_tokens", type=int, default=32)
    parser.add_argument("--batch", type=int, default=256, help="answers made at once")
    parser.add_argument("--show", type=int, default=5, help="answers to print")
    args = parser.parse_args(argv)
    for name, least in (("max_tokens", 1), ("batch", 1), ("show", 0)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} {getattr(args, name)}: " + ("must be at least 1" if least else "must not be negative"))
    if bool(args.model) == bool(args.answers):
        raise UserError("give --model, which answers the questions, or --answers, a file of answers" + (", not both" if args.model else ""))
    if args.adapter and not args.model:
        raise UserError("--adapter belongs to a --model; --answers has the answers already")
    if args.run_code and args.score != "code":
        raise UserError(f"--run_code is for --score code; --score {args.score} runs nothing")
    if args.score == "code" and not args.run_code and (args.answers or not args.save):
        raise UserError("--score code runs what the model wrote, on this machine, with limits of time and memory but in no sandbox: add --run_code, "
                        "best in a container. --save FILE without it keeps the answers, which --answers FILE then scores there")
    if args.save:
        require_writable(args.save)
    return args


def read(args, template) -> Questions:
    """(the pieces of the prompt, what is right) of each row. UserError for a right answer that the score can't read."""
    if args.score == "code":
        return read_problems(args.questions, template)
    questions = read_questions(args.questions, template, Reading.of(args))
    _, find, what = SCORES[args.score]
    for pieces, right in questions:
        if find(right) is None:
            raise UserError(f"--score {args.score}: a right answer has no {what.removeprefix('a ')}: {right[-200:]!r} (of {''.join(pieces)[:80]!r})")
    return questions


def saved(path: str, count: int) -> list[str]:
    """The answers that --save wrote. UserError unless there are `count`."""
    try:
        with open(path, encoding="utf-8") as file:
            answers = [json.loads(line)["answer"] for line in file]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f'--answers {path} can\'t be read: {error!r}; expected JSONL of {{"answer": text}}, as --save writes it') from None
    if len(answers) != count:
        raise UserError(f"--answers {path} has {len(answers)} answers, --questions has {count} questions; both must be of the same file")
    return answers


def judged(score: str, answers: list[str], questions: Questions) -> list[bool]:
    """Whether each answer is right."""
    if score == "code":
        return passed([problem.program(answer) for answer, (_, problem) in zip(answers, questions, strict=True)])
    agree, _, _ = SCORES[score]
    return [agree(answer, right) for answer, (_, right) in zip(answers, questions, strict=True)]


if __name__ == "__main__":
    main()
