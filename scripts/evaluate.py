"""Measure how many greedy answers of a model are right, on a file of questions.

python -m scripts.evaluate --model m.pth --questions heldout.jsonl --score number
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import NamedTuple

from src.common.startup import importing, naming_missing_packages

with importing():
    from rwkv_miss.errors import Parser, UserError, one_line_errors
    from rwkv_miss.files.hub import local_path
    from rwkv_miss.files.hub_names import recorded
    from rwkv_miss.files.output import require_writable
    from src.common.device import PRECISIONS, choose_accelerator, choose_precision
    from src.common.files import write_text
    from src.config import FIELDS
    from src.config.validate import check_bos
    from src.data.fetch import fetch_data
    from src.data.formats import Reading
    from src.data.leading_token import HELP as BOS_HELP
    from src.data.leading_token import leading_token, text_of
    from src.data.templates import add_template_flags, choose_template, recorded_template
    from src.evaluation.accuracy import (
        LIMITS,
        THOUGHTS,
        Answer,
        Question,
        answer_limit,
        answers_to,
        read_questions,
    )
    from src.evaluation.code_scoring import passed, read_problems
    from src.evaluation.guessing import doubt_of_answers
    from src.evaluation.mathematics import require_math_verify
    from src.evaluation.scoring import SCORES
    from src.inference.load import load

DOUBTED = 16  # questions whose right answers tell whether the tokenizer is the model's
WARN_CUT = 0.01  # the user is warned if this share of the answers reaches the limit


def main(argv: list[str] | None = None) -> None:
    with one_line_errors(), naming_missing_packages():
        args = arguments(argv)
        name_local_files(args)
        questions, answers, limit, bos = ask_model(args) if args.model else read_answered(args)
        if args.save:
            write_answers(args.save, questions, answers)
        cut = None
        if all(answer.cut is not None for answer in answers):
            cut = sum(answer.cut for answer in answers)
        if args.score == "code" and not args.run_code:
            tell_cut(cut, len(answers), limit)
            print(
                f"{len(answers)} answers are in {args.save}, not scored: --answers {args.save} --score code"
                " --run_code runs them"
            )
            return
        texts = [answer.text for answer in answers]
        right = judged(args.score, texts, questions)
        for question, text, is_right in list(zip(questions, texts, right, strict=True))[: args.show]:
            expected = ""
            if not is_right:
                expected = ", fails the tests" if args.score == "code" else f", right is {question.right!r}"
            print(f"{question.prompt!r} -> {text!r}{expected}")
        tell_cut(cut, len(answers), limit)
        accuracy = sum(right) / len(right)
        print(f"score: {accuracy:.1%}, {sum(right):,} of {len(right):,} answers are right")
        summary = {
            "accuracy": accuracy,
            "score": args.score,
            "questions": len(questions),
            "model": recorded(args.model),
            "adapter": recorded(args.adapter),
            "precision": None if args.answers else args.precision,
            "answers": args.answers,
            "bos": bos,
            "max_tokens": limit,
            "cut": cut,
        }
        print(json.dumps(summary))


def name_local_files(args: argparse.Namespace) -> None:
    """Have the flags name local files."""
    args.questions = fetch_data(args.questions)
    for name in ("model", "adapter"):
        if given := getattr(args, name):
            setattr(args, name, local_path(given))


class Answered(NamedTuple):
    """Questions with their answers, and what these had: a limit of tokens, and leading ids.

    None: it is not known.
    """

    questions: list[Question]
    answers: list[Answer]
    limit: int | None
    bos: list[int] | None


def ask_model(args: argparse.Namespace) -> Answered:
    """The questions, answered by the model."""
    args.precision, _ = choose_precision(args.precision, choose_accelerator("auto"))
    model, tokenizer = load(args.model, args.adapter, args.tokenizer, args.eod, precision=args.precision)
    template = recorded_template(
        args.template, tokenizer, args.adapter, args.model, tool_style=args.tool_style
    )
    bos = leading_token(args.bos, tokenizer, args.adapter, args.model)
    if bos:
        print(f"every question begins with {text_of(bos)}")
    questions = questions_of(args, template)
    pairs = [] if args.score == "code" else first_answers(tokenizer, questions, bos)
    if doubt := doubt_of_answers(model, tokenizer, pairs):
        print(doubt, file=sys.stderr)
    limit = args.max_tokens or answer_limit(args.score, tokenizer, questions)
    answers = answers_to(model, tokenizer, questions, limit, template, args.batch, bos)
    return Answered(questions, answers, limit, list(bos))


def read_answered(args: argparse.Namespace) -> Answered:
    """The questions, with the answers of --answers."""
    questions = questions_of(args, choose_template(args.template, args.tool_style, None, None))
    return Answered(questions, read_answers(args.answers, len(questions)), None, None)


def first_answers(
    tokenizer, questions: list[Question], bos: tuple[int, ...] = ()
) -> list[tuple[list[int], list[int]]]:
    """Ids of the first prompts and their right answers. An empty list where one of them has no tokens."""
    first = questions[:DOUBTED]
    try:
        return [(question.ids(tokenizer, bos), tokenizer.encode(f" {question.right}")) for question in first]
    except UserError:
        return []


def tell_cut(cut: int | None, count: int, limit: int | None) -> None:
    """Say how many of `count` answers reached the limit of tokens, and warn where they are many.

    None: it is not known.
    """
    if cut is None:
        return
    share = cut / count
    tokens = f"{limit:,} tokens" if limit else "tokens"
    print(f"{cut:,} answers ({share:.1%}) reach the limit of {tokens}")
    if cut and share >= WARN_CUT:
        print(
            f"warning: {share:.1%} of the answers were cut, and may be wrong for that alone; "
            "--max_tokens N lets them go on",
            file=sys.stderr,
        )


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The flags. UserError for those that do not go together, before a model is loaded."""
    parser = Parser(prog="python -m scripts.evaluate", description=__doc__)
    add_model(parser)
    add_questions(parser)
    add_answers(parser)
    args = parser.parse_args(argv)
    check(args)
    return args


def add_questions(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--questions",
        required=True,
        help=(
            "questions and right answers, in any format of train.py's --data_file; "
            "with --score code HumanEval or MBPP"
        ),
    )
    for name in ("sft_field", "sft_split"):
        default = FIELDS[name].default
        text = f"{FIELDS[name].metadata['help']}; default {default!r}"
        add(f"--{name}", default=default, help=text.replace("%", "%%"))
    add(
        "--score",
        default="exact",
        choices=(*SCORES, "code"),
        help=(
            "an answer is right if it is, as a whole, the right one (exact), ends in the same number"
            " (number: GSM8K), has an equal \\boxed{} result (boxed: MATH), has equal mathematics by the"
            " package math-verify (math_verify: MATH-500), or is a program that passes the tests (code:"
            " HumanEval, MBPP); default %(default)s"
        ),
    )
    add(
        "--run_code",
        action="store_true",
        help=(
            "with --score code: run the model's programs on this machine, with limits of time and memory but"
            " in no sandbox; default: only keep the answers"
        ),
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", help="the model that answers: base or merged .pth, or hf://OWNER/NAME[/FILE][@REVISION]")
    add("--adapter", help="an adapter .pth of that base, used beside it; default: none")
    add(
        "--tokenizer",
        default="auto",
        help=(
            "auto (as recorded in the file, else world), world, bytes, utf16, or a tokenizer file; "
            "default %(default)s"
        ),
    )
    add(
        "--eod",
        default="",
        help=(
            "text of the end-of-document token, where a tokenizer file does not tell; "
            "default: as the tokenizer says"
        ),
    )
    add_template_flags(add)
    add("--bos", default="recorded", help=BOS_HELP)
    add(
        "--precision",
        default="auto",
        choices=("auto", *PRECISIONS),
        help="of the weights. auto: bf16 on a GPU that has it, or fp16; on a CPU fp32. Default %(default)s",
    )


def add_answers(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    limits = ", ".join(f"{limit} for {score}" for score, limit in LIMITS.items())
    add(
        "--max_tokens",
        type=int,
        help=(
            "the longest answer, in tokens. Default: for exact a quarter more than the longest right answer,"
            f" and 16; {limits}; {THOUGHTS} where a template begins thoughts"
        ),
    )
    add(
        "--batch",
        type=int,
        default=256,
        help="answers made at once; fewer take less memory; default %(default)s",
    )
    add("--show", type=int, default=5, help="answers to print; default %(default)s")
    add("--save", help="write prompts and answers to this JSONL file; default: they are not kept")
    add("--answers", help="score the answers of such a file, in the place of a --model")


def check(args: argparse.Namespace) -> None:
    """UserError for flags that are out of range or do not go together."""
    for name, least in (("max_tokens", 1), ("batch", 1), ("show", 0)):
        given = getattr(args, name)
        if given is not None and given < least:
            expected = "must be at least 1" if least else "must not be negative"
            raise UserError(f"--{name} {given}: {expected}")
    if bool(args.model) == bool(args.answers):
        raise UserError(
            "give --model, which answers the questions, or --answers, a file of answers"
            + (", not both" if args.model else "")
        )
    if args.adapter and not args.model:
        raise UserError("--adapter belongs to a --model; --answers has the answers already")
    check_bos(args.bos)
    if args.bos != "recorded" and not args.model:
        raise UserError(f"--bos {args.bos} belongs to a --model; --answers has the answers already")
    if args.run_code and args.score != "code":
        raise UserError(f"--run_code is for --score code; --score {args.score} runs nothing")
    if args.score == "code" and not args.run_code and (args.answers or not args.save):
        raise UserError(
            "--score code runs what the model wrote, on this machine, with limits of time and memory but in"
            " no sandbox: add --run_code, best in a container. --save FILE without it keeps the answers,"
            " which --answers FILE then scores there"
        )
    if args.score == "math_verify":
        require_math_verify()
    if args.save:
        require_writable(args.save)


def questions_of(args, template) -> list[Question]:
    """The questions of the file. UserError for a right answer that the score can't read."""
    if args.score == "code":
        return read_problems(args.questions, template)
    questions = read_questions(args.questions, template, Reading.of(args))
    score = SCORES[args.score]
    for question in questions:
        if score.result_of_right(question.right) is None:
            raise UserError(
                f"--score {args.score}: a right answer has no {score.wanted.removeprefix('a ')}: "
                f"{question.right[-200:]!r} (of {question.prompt[:80]!r})"
            )
    return questions


def write_answers(path: str, questions: list[Question], answers: list[Answer]) -> None:
    """Write a line {"prompt", "answer", "cut"} for each question."""
    lines = []
    for question, answer in zip(questions, answers, strict=True):
        row = {"prompt": question.prompt, "answer": answer.text, "cut": answer.cut}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_text(path, "".join(lines))


def read_answers(path: str, count: int) -> list[Answer]:
    """The answers in a file that write_answers() wrote. UserError unless there are `count`."""
    try:
        with open(path, encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        answers = [Answer(row["answer"], row.get("cut")) for row in rows]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f'--answers {path} can\'t be read: {error!r}; expected JSONL of {{"answer": text}}, as --save'
            " writes it"
        ) from None
    if len(answers) != count:
        raise UserError(
            f"--answers {path} has {len(answers)} answers, --questions has {count} questions; both must be of"
            " the same file"
        )
    return answers


def judged(score: str, answers: list[str], questions: list[Question]) -> list[bool]:
    """Whether each answer is right."""
    pairs = [(answer, question.right) for answer, question in zip(answers, questions, strict=True)]
    if score == "code":
        return passed([problem.program(answer) for answer, problem in pairs])
    return [SCORES[score].agree(answer, right) for answer, right in pairs]


if __name__ == "__main__":
    main()
