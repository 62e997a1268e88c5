"""Flags of scripts.evaluate, and checks of which go together."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from rwkv_miss.errors import UserError
from rwkv_miss.files.output import require_writable
from rwkv_miss.flags import flag, given, options

from ..common.device import PRECISION_FLAG
from ..common.option import shared
from ..config import FIELDS
from ..config.validate import check_bos
from ..data.bos import HELP as BOS_HELP
from ..data.questions import LIMITS, THOUGHTS
from ..data.templates import TEMPLATE_FLAG, TOOL_STYLE_FLAG
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
DESCRIBED = [
    f"{name}: {', '.join(f'{flag} {value}' for flag, value in flags.items())}"
    for name, flags in PRESETS.items()
]
# the other flags that --preferences takes
WITH_PREFERENCES = ("questions", "sft_field", "sft_split", "largest_row", "save", "show")


@options
class ModelFlags:
    """Model, and how it is prompted."""

    model: str | None = flag(
        None,
        "the model that answers: base model or merged .pth, or hf://OWNER/NAME[/FILE][@REVISION]",
        file=True,
    )
    adapter: list[str] = flag(
        [],
        "an adapter .pth of this base model, used without a merge; with --preferences the flag may be"
        " given several times, and each adapter is measured by itself; default: none",
        file=True,
    )
    tokenizer: str = flag(
        "auto",
        "auto (as recorded in the file, else world), world, bytes, utf16, or a tokenizer file; "
        "default %(default)s",
    )
    eod: str = flag(
        "",
        "text of the end-of-document token, for a tokenizer file that does not name it; default: as"
        " the tokenizer says",
    )
    template: str = flag(**TEMPLATE_FLAG)
    tool_style: str = flag(**TOOL_STYLE_FLAG)
    bos: str = flag("recorded", BOS_HELP)
    precision: str = flag(**PRECISION_FLAG)


@options
class AskingFlags:
    """Questions, when an answer is right, and how many answers are drawn and kept."""

    questions: str | None = flag(
        None,
        "questions and reference answers, in any format of train.py's --data_file; with --score code"
        " HumanEval or MBPP",
    )
    limit: int | None = flag(None, "ask the first N questions only; default: all of the file", low=1)
    sft_field: str = shared(FIELDS["sft_field"], f"; default {FIELDS['sft_field'].default!r}")
    sft_split: str = shared(FIELDS["sft_split"], f"; default {FIELDS['sft_split'].default!r}")
    largest_row: int = shared(FIELDS["largest_row"], f"; default {FIELDS['largest_row'].default!r}")
    score: str = flag(
        "exact",
        "when an answer is right. exact: it equals the reference answer. number: it ends in the same"
        " number (GSM8K). boxed: its \\boxed{} result is equal (MATH). math_verify: the package"
        " math-verify finds it equal (MATH-500). code: it is a program that passes the tests"
        " (HumanEval, MBPP); default %(default)s",
        choices=(*SCORES, "code"),
    )
    run_code: bool = flag(
        False,
        "with --score code: run the model's programs on this machine, with limits of time and memory but"
        " in no sandbox; default: only keep the answers",
    )
    max_tokens: int | None = flag(
        None,
        "the longest answer, in tokens. Default: for exact 1.25 times the longest reference answer,"
        f" plus 16; {', '.join(f'{limit} for {score}' for score, limit in LIMITS.items())}; {THOUGHTS} with a"
        " template that begins thoughts",
        low=1,
    )
    batch: int | None = flag(
        None,
        "answers made at once. Default: 32 on a CPU and 256 on a GPU, fewer if the memory is small",
        low=1,
    )
    show: int = flag(
        5,
        "number of answers to print, or with --preferences of wrong pairs, the worst first; default"
        " %(default)s",
        low=0,
    )
    save: str | None = flag(
        None,
        "write prompts and answers to this JSONL file as they come; the same command goes on after a"
        " stop. With --preferences: all pairs with their log p, at the end. Default: they are not kept",
    )
    answers: str | None = flag(
        None, "score the answers of a file that --save wrote, instead of asking a --model"
    )
    samples: int = flag(
        1,
        "answers to each question, for pass@k and the majority; needs a --temperature; default %(default)s",
        low=1,
    )
    temperature: float = flag(
        0.0, "how freely tokens are drawn; default %(default)s, the likeliest token each time"
    )
    top_p: float = flag(
        1.0, "draw among the likeliest tokens whose probabilities add up to this [%(default)s]"
    )
    top_k: int = flag(0, "draw among this many of the likeliest tokens; 0: among all [%(default)s]")
    seed: int = flag(0, "seed of the samples; default %(default)s", low=0)
    preset: str | None = flag(None, f"a published protocol. {'; '.join(DESCRIBED)}", choices=PRESETS)

    @property
    def sampling(self) -> dict[str, float]:
        """Sampling of the answers, by the names of Sampling."""
        return {name: getattr(self, name) for name in ("temperature", "top_p", "top_k")}


@options
class Flags(AskingFlags, ModelFlags):
    """Flags of scripts.evaluate; its own are about pairs of answers instead of questions."""

    preferences: str | None = flag(
        None,
        "instead of --questions: pairs of a chosen and a rejected answer, or answers with a label, as"
        " train.py --loss takes them. The model tells how likely it finds each answer, and writes none",
    )
    reference: str | None = flag(
        None,
        "the reference model for the rewards. Default: with an --adapter the base model without it;"
        " else there are no rewards",
        file=True,
    )
    beta: float | None = flag(
        None,
        f"rewards are beta times the difference of the log p; default {BETA:g}",
        above=0,
    )

    @property
    def only_adapter(self) -> str | None:
        """The adapter that answers questions; check() has seen to it that there is no other."""
        return next(iter(self.adapter), None)


def check(args: Flags) -> None:
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


def check_preferences(args: Flags) -> None:
    """Raise UserError for flags that do not go with --preferences."""
    if not args.model:
        raise UserError("--preferences needs a --model, which says how likely it finds each answer")
    asking = [field.name for field in dataclasses.fields(AskingFlags) if field.name not in WITH_PREFERENCES]
    for name, value in given(args, asking):
        raise UserError(f"--{name} {value} belongs to --questions; with --preferences nothing is answered")
    if args.beta is not None and not (args.reference or args.adapter):
        raise UserError(
            f"--beta {args.beta:g} multiplies rewards, and there are none without a reference: give the"
            " --reference FILE, or the --model as the base and the trained one as its --adapter"
        )
    if len({*args.adapter}) < len(args.adapter):
        raise UserError(f"--adapter is given twice with one file: {' '.join(args.adapter)}")
    check_bos(args.bos)
    if args.save:
        if os.path.exists(args.save):
            raise UserError(f"--save {args.save} is there already; give another name, or delete it")
        require_writable(args.save)


def check_questions(args: Flags) -> None:
    """Raise UserError for flags that do not go with --questions."""
    for name, value in given(args, ("reference", "beta")):
        raise UserError(f"--{name} {value} belongs to --preferences")
    if len(args.adapter) > 1:
        raise UserError("several --adapter need --preferences; --questions takes one adapter at a time")
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


def check_answers(args: Flags) -> None:
    """Raise UserError if --answers is given together with flags that ask a model."""
    if args.model:
        return
    # a preset may tell how to score answers, too
    asking = ("adapter", "bos", "save", *(() if args.preset else ("samples", "temperature")))
    for name, value in given(args, asking):
        shown = value[0] if isinstance(value, list) else value
        raise UserError(f"--{name} {shown} belongs to a --model; --answers has the answers already")


def check_sampling(args: Flags) -> None:
    """Raise UserError for a sampling that is none."""
    sampling = Sampling(**args.sampling)
    sampling.check()
    if not sampling.greedy:
        return
    if args.samples > 1:
        raise UserError(
            f"--samples {args.samples} with --temperature {args.temperature:g}: greedy answers are all alike;"
            " give a --temperature above 0, such as 1"
        )
    for name, value in given(args, ("top_p", "top_k", "seed")):
        raise UserError(
            f"--{name} {value} with --temperature {args.temperature:g}: greedy answers sample nothing;"
            " give a --temperature above 0, such as 1"
        )
