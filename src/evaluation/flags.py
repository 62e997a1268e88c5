"""Flags of scripts.evaluate, and checks of which go together."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from typing import Any

from rwkv_miss.errors import Parser, UserError
from rwkv_miss.files.output import require_writable

from ..common.device import PRECISIONS
from ..config import FIELDS
from ..config.validate import check_bos
from ..data.bos import HELP as BOS_HELP
from ..data.questions import LIMITS, THOUGHTS
from ..data.templates import add_template_flags
from ..inference.sampling import Sampling
from .mathematics import require_math_verify
from .scoring import SCORES

BETA = 0.1  # factor of rewards, as in the papers of DPO, IPO and KTO
# published evaluations: name -> flag -> value; a given flag overrides it
PRESETS: dict[str, dict[str, Any]] = {
    # BlinkDL's scoring of the G1 models; the rows are those of HuggingFaceH4/MATH-500
    "math500": {
        "score": "math_verify",
        "sft_field": "problem,answer",
        "samples": 4,
        "max_tokens": 1500,
        "temperature": 1.0,
        "top_p": 0.28,
        "top_k": 32,
    }
}
# the other flags that --preferences takes
WITH_PREFERENCES = ("questions", "sft_field", "sft_split", "largest_row", "save", "show")


def add_flags(parser: Parser) -> None:
    """Add all flags."""
    add_model(parser)
    add_questions(parser)
    add_answers(parser)
    add_sampling(parser)
    add_preferences(parser)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add flags about the model, and how it is prompted."""
    add = parser.add_argument
    add(
        "--model",
        help="the model that answers: base model or merged .pth, or hf://OWNER/NAME[/FILE][@REVISION]",
    )
    add(
        "--adapter",
        action="append",
        default=[],
        help=(
            "an adapter .pth of this base model, used without a merge; with --preferences the flag may be"
            " given several times, and each adapter is measured by itself; default: none"
        ),
    )
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
            "text of the end-of-document token, for a tokenizer file that does not name it; default: as"
            " the tokenizer says"
        ),
    )
    add_template_flags(add)
    add("--bos", default="recorded", help=BOS_HELP)
    add(
        "--precision",
        default="auto",
        choices=("auto", *PRECISIONS),
        help="dtype of the weights. auto: bf16 on a GPU that has it, else fp16; on a CPU fp32. Default"
        " %(default)s",
    )


def add_questions(parser: argparse.ArgumentParser) -> None:
    """Add flags about the questions, and when an answer is right."""
    add = parser.add_argument
    add(
        "--questions",
        help=(
            "questions and reference answers, in any format of train.py's --data_file; with --score code"
            " HumanEval or MBPP"
        ),
    )
    add("--limit", type=int, help="ask the first N questions only; default: all of the file")
    for name in ("sft_field", "sft_split", "largest_row"):
        default = FIELDS[name].default
        text = f"{FIELDS[name].metadata['help']}; default {default!r}"
        add(f"--{name}", default=default, type=type(default), help=text.replace("%", "%%"))
    add(
        "--score",
        default="exact",
        choices=(*SCORES, "code"),
        help=(
            "when an answer is right. exact: it equals the reference answer. number: it ends in the same"
            " number (GSM8K). boxed: its \\boxed{} result is equal (MATH). math_verify: the package"
            " math-verify finds it equal (MATH-500). code: it is a program that passes the tests"
            " (HumanEval, MBPP); default %(default)s"
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


def add_answers(parser: argparse.ArgumentParser) -> None:
    """Add flags about the length of answers, how many are made at once, and where they are kept."""
    add = parser.add_argument
    limits = ", ".join(f"{limit} for {score}" for score, limit in LIMITS.items())
    add(
        "--max_tokens",
        type=int,
        help=(
            "the longest answer, in tokens. Default: for exact 1.25 times the longest reference answer,"
            f" plus 16; {limits}; {THOUGHTS} with a template that begins thoughts"
        ),
    )
    add(
        "--batch",
        type=int,
        help="answers made at once. Default: 32 on a CPU and 256 on a GPU, fewer if the memory is small",
    )
    add(
        "--show",
        type=int,
        default=5,
        help="number of answers to print, or with --preferences of wrong pairs, the worst first; default"
        " %(default)s",
    )
    add(
        "--save",
        help=(
            "write prompts and answers to this JSONL file as they come; the same command goes on after a"
            " stop. With --preferences: all pairs with their log p, at the end. Default: they are not kept"
        ),
    )
    add("--answers", help="score the answers of a file that --save wrote, instead of asking a --model")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Add flags about the number of answers to each question, and how they are drawn."""
    add = parser.add_argument
    add(
        "--samples",
        type=int,
        default=1,
        help=(
            "answers to each question, for pass@k and the majority; needs a --temperature; default"
            " %(default)s"
        ),
    )
    add(
        "--temperature",
        type=float,
        default=0.0,
        help="how freely tokens are drawn; default %(default)s, the likeliest token each time",
    )
    add(
        "--top_p",
        type=float,
        default=1.0,
        help="draw among the likeliest tokens whose probabilities add up to this [%(default)s]",
    )
    add(
        "--top_k",
        type=int,
        default=0,
        help="draw among this many of the likeliest tokens; 0: among all [%(default)s]",
    )
    add("--seed", type=int, default=0, help="seed of the samples; default %(default)s")
    described = [
        f"{name}: {', '.join(f'{flag} {value}' for flag, value in flags.items())}"
        for name, flags in PRESETS.items()
    ]
    add("--preset", choices=PRESETS, help=f"a published protocol. {'; '.join(described)}")


def add_preferences(parser: argparse.ArgumentParser) -> None:
    """Add flags about pairs of answers instead of questions, and about the reference."""
    add = parser.add_argument
    add(
        "--preferences",
        help=(
            "instead of --questions: pairs of a chosen and a rejected answer, or answers with a label, as"
            " train.py --loss takes them. The model tells how likely it finds each answer, and writes none"
        ),
    )
    add(
        "--reference",
        help=(
            "the reference model for the rewards. Default: with an --adapter the base model without it;"
            " else there are no rewards"
        ),
    )
    add("--beta", type=float, help=f"rewards are beta times the difference of the log p; default {BETA:g}")


def check(args: argparse.Namespace) -> None:
    """Raise UserError for flags that are out of range or do not go together."""
    if bool(args.questions) == bool(args.preferences):
        raise UserError(
            "give --questions, which the model answers, or --preferences, pairs of answers"
            + (", not both" if args.questions else "")
        )
    if args.preferences:
        check_preferences(args)
    else:
        check_questions(args)


def check_preferences(args: argparse.Namespace) -> None:
    """Raise UserError for flags that do not go with --preferences."""
    if not args.model:
        raise UserError("--preferences needs a --model, which says how likely it finds each answer")
    for name, unused in without(add_questions, add_answers, add_sampling).items():
        if name not in WITH_PREFERENCES and (given := getattr(args, name)) != unused:
            raise UserError(
                f"--{name} {given} belongs to --questions; with --preferences nothing is answered"
            )
    if args.beta is not None and not 0 < args.beta < math.inf:
        raise UserError(f"--beta {args.beta:g}: expected a number above 0, such as {BETA:g}")
    if args.beta is not None and not (args.reference or args.adapter):
        raise UserError(
            f"--beta {args.beta:g} multiplies rewards, and there are none without a reference: give the"
            " --reference FILE, or the --model as the base and the trained one as its --adapter"
        )
    if len({*args.adapter}) < len(args.adapter):
        raise UserError(f"--adapter is given twice with one file: {' '.join(args.adapter)}")
    check_bos(args.bos)
    check_number("show", args.show, 0)
    if args.save:
        if os.path.exists(args.save):
            raise UserError(f"--save {args.save} is there already; give another name, or delete it")
        require_writable(args.save)


def without(*add_flags: Callable[[Parser], None]) -> dict[str, Any]:
    """Return the values of flags that are not given, by name."""
    parser = Parser()
    for add_some in add_flags:
        add_some(parser)
    return vars(parser.parse_args([]))


def check_questions(args: argparse.Namespace) -> None:
    """Raise UserError for flags that do not go with --questions."""
    for name in ("reference", "beta"):
        if (given := getattr(args, name)) is not None:
            raise UserError(f"--{name} {given} belongs to --preferences")
    if len(args.adapter) > 1:
        raise UserError("several --adapter need --preferences; --questions takes one adapter at a time")
    for name, least in (
        ("max_tokens", 1),
        ("batch", 1),
        ("show", 0),
        ("samples", 1),
        ("seed", 0),
        ("limit", 1),
    ):
        check_number(name, getattr(args, name), least)
    if bool(args.model) == bool(args.answers):
        raise UserError(
            "give --model, which answers the questions, or --answers, a file of answers"
            + (", not both" if args.model else "")
        )
    check_bos(args.bos)
    check_answers(args)
    check_sampling(args)
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


def check_number(name: str, given: int | None, least: int) -> None:
    """Raise UserError for a number below the least."""
    if given is not None and given < least:
        expected = "must be at least 1" if least else "must not be negative"
        raise UserError(f"--{name} {given}: {expected}")


def check_answers(args: argparse.Namespace) -> None:
    """Raise UserError if --answers is given together with flags that ask a model."""
    if args.model:
        return
    asking = {"adapter": [], "bos": "recorded", "save": None}
    if not args.preset:  # which may tell how to score answers, too
        asking |= {"samples": 1, "temperature": 0.0}
    for name, without in asking.items():
        if (given := getattr(args, name)) != without:
            shown = given[0] if isinstance(given, list) else given
            raise UserError(f"--{name} {shown} belongs to a --model; --answers has the answers already")


def check_sampling(args: argparse.Namespace) -> None:
    """Raise UserError for a sampling that is none."""
    sampling = Sampling(**sampling_of(args))
    sampling.check()
    if not sampling.greedy:
        return
    if args.samples > 1:
        raise UserError(
            f"--samples {args.samples} with --temperature {args.temperature:g}: greedy answers are all alike;"
            " give a --temperature above 0, such as 1"
        )
    for name, without in (("top_p", 1.0), ("top_k", 0), ("seed", 0)):
        if (given := getattr(args, name)) != without:
            raise UserError(
                f"--{name} {given} with --temperature {args.temperature:g}: greedy answers sample nothing;"
                " give a --temperature above 0, such as 1"
            )


def sampling_of(args: argparse.Namespace) -> dict[str, float]:
    """Return the sampling of the flags, by the names of Sampling."""
    return {name: getattr(args, name) for name in ("temperature", "top_p", "top_k")}
