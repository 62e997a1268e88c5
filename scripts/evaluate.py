"""Measure how many answers of a model are right, on a file of questions.

python -m scripts.evaluate --model m.pth --questions heldout.jsonl --score number
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Hashable
from typing import Any, NamedTuple

if not __package__:  # started as a file, so that Python does not find src
    raise SystemExit("error: run this from the repository's folder as python -m scripts.evaluate")

from src.common.startup import importing, naming_missing_packages

with importing():
    from rwkv_miss import Arch
    from rwkv_miss.errors import UserError, one_line_errors
    from rwkv_miss.files.hub import with_local_files
    from rwkv_miss.files.hub_names import recorded
    from rwkv_miss.files.identity import Identity
    from rwkv_miss.files.mapped import naming_changed_files
    from rwkv_miss.flags import parse_flags
    from rwkv_miss.progress import progress
    from scripts.code_scoring import passed, read_problems
    from scripts.many_samples import Scores, scores_of
    from src.common.device import choose_accelerator, choose_precision
    from src.common.files import write_lines
    from src.data.bos import bos_ids, text_of
    from src.data.chat_template import Template
    from src.data.encode import Encoder
    from src.data.fetch import fetch_data
    from src.data.formats import Reading
    from src.data.preferences import Preferences
    from src.data.questions import Question, answer_limit, read_questions
    from src.data.recorded_tokenizer import recorded_tokenizer
    from src.data.templates import choose_template, recorded_template
    from src.data.tokenizer import Tokenizer
    from src.evaluation.answering import Asking, answers_to, engine_for
    from src.evaluation.answers_file import (
        AnswersFile,
        SavedAnswer,
        digest,
        read_answers,
        require_unstarted_or_same,
    )
    from src.evaluation.flags import BETA, PRESETS, Flags, check
    from src.evaluation.guessing import doubt_of_answers
    from src.evaluation.preferences import Compared, read_preferences
    from src.evaluation.scoring import SCORES, require_readable
    from src.inference.load import load, load_with
    from src.inference.sampling import Sampling
    from src.model import RWKV, read_model_file
    from src.planning.base_model import check_reference

DOUBTED = 16  # questions whose reference answers are used to check that the tokenizer is the model's
WARN_CUT = 0.01  # the user is warned if this share of the answers reaches the limit


def main(argv: list[str] | None = None) -> None:
    with one_line_errors(), naming_missing_packages(), naming_changed_files():
        args = prepared(arguments(argv))
        if args.preferences:
            evaluate_preferences(args)
        else:
            evaluate_questions(args)


def evaluate_questions(args: Flags) -> None:
    """Print how many answers are right."""
    asked = ask_model(args) if args.model else read_answered(args)
    flat = [answer for answers in asked.answers for answer in answers]
    cut = None
    if all(answer.cut is not None for answer in flat):
        cut = sum(answer.cut for answer in flat)
    if args.score == "code" and not args.run_code:
        tell_cut(cut, len(flat), asked.limit)
        print(
            f"{len(flat)} answers are in {args.save}, not scored: --answers {args.save} --score code"
            " --run_code runs them"
        )
        return
    right = judged(args.score, asked)
    show(args, asked, right)
    tell_cut(cut, len(flat), asked.limit)
    scores = scores_of(right, results(args.score, asked))
    tell_scores(scores, right)
    summary = {
        "accuracy": scores.accuracy,
        "score": args.score,
        "questions": len(asked.questions),
        "model": recorded(args.model),
        "adapter": recorded(args.only_adapter),
        "precision": None if args.answers else args.precision,
        "answers": args.answers,
        "bos": asked.bos,
        "max_tokens": asked.limit,
        "cut": cut,
    }
    if len(right[0]) > 1:
        summary |= {"samples": len(right[0]), **scores.record()}
    if args.model and args.temperature:
        summary |= {**args.sampling, "seed": args.seed}
    print(json.dumps(summary))


def evaluate_preferences(args: Flags) -> None:
    """Print log probabilities of the answers of pairs by the model, or by each of the adapters."""
    encoder = encoder_for(args)
    data = read_preferences(args.preferences, encoder, Reading.of(args))
    files = {path: path for path in args.adapter}
    adapters, _ = load_with(args.model, files, args.tokenizer, args.eod, precision=args.precision)
    compared = compared_with_reference(args, data, adapters.model)
    rows = []
    for adapter in args.adapter or [None]:
        adapters.use([adapter] if adapter else [])
        measured = compared.measure(adapters.model, args.beta or BETA)
        about = {"model": recorded(args.model), "adapter": recorded(adapter)}
        worst = measured.worst(args.show, encoder.tokenizer)
        print("\n".join([*worst, f"{adapter or args.model}: {measured.counted}", *measured.lines()]))
        rows += [about | row for row in measured.rows(encoder.tokenizer, range(len(data)))]
        summary = {"preferences": args.preferences, **measured.counts, **about, "precision": args.precision}
        summary |= {"bos": list(encoder.bos), "reference": None}
        if compared.data.reference is not None:
            summary |= {"reference": recorded(args.reference or args.model), "beta": args.beta or BETA}
        print(json.dumps(summary | measured.figures))
    if args.save:
        write_lines(args.save, rows)


def encoder_for(args: Flags) -> Encoder:
    """Make the encoder of the rows from the adapters' metadata, else the model's, without reading weights."""
    arch = Arch.detect(read_model_file(args.model))
    if args.reference:
        check_reference(args.reference, args.model, arch.vocab_size)
    chosen = {}
    for adapter in args.adapter or [None]:
        files = [path for path in (adapter, args.model) if path]
        tokenizer = recorded_tokenizer(args.tokenizer, args.eod, arch.vocab_size, *files)
        template = recorded_template(args.template, tokenizer, *files, tool_style=args.tool_style)
        bos = bos_ids(args.bos, tokenizer, *files)
        chosen[tokenizer.name, template.record, bos] = Encoder(tokenizer, template, bos=bos)
    if len(chosen) > 1:
        listed = " and ".join(f"{name}, {template[:40]!r}, {bos}" for name, template, bos in chosen)
        raise UserError(
            f"the adapters record different tokenizers, templates or BOS tokens ({listed}); give"
            " --tokenizer, --template and --bos, or measure them one by one"
        )
    return next(iter(chosen.values()))


def compared_with_reference(args: Flags, data: Preferences, base: RWKV) -> Compared:
    """Add the answers' ln p by a reference: another model, or the base without adapters."""
    if args.reference:
        model, _ = load(args.reference, None, args.tokenizer, args.eod, precision=args.precision)
        return Compared.with_reference(data, model)
    if args.adapter:
        return Compared.with_reference(data, base)
    print("there is no --reference FILE and no --adapter of the model: log p alone, and no rewards")
    return Compared(data)


def arguments(argv: list[str] | None) -> Flags:
    """Parse the flags. Raises UserError for flags that contradict each other, before a model is loaded."""
    about = {"prog": "python -m scripts.evaluate", "description": __doc__}
    args = parse_flags(Flags, argv, **about)
    if args.preset:  # the preset's values become defaults, which given flags override
        args = parse_flags(Flags, argv, PRESETS[args.preset], **about)
    check(args)
    return args


def show(args: Flags, asked: Answered, right: list[list[bool]]) -> None:
    """Print the first answers to the first questions."""
    rows = zip(asked.questions, asked.answers, right, strict=True)
    for question, (answer, *_), (is_right, *_) in list(rows)[: args.show]:
        expected = ""
        if not is_right:
            expected = ", fails the tests" if args.score == "code" else f", right is {question.answer!r}"
        print(f"{question.prompt!r} -> {answer.text!r}{expected}")


def tell_scores(scores: Scores, right: list[list[bool]]) -> None:
    """Print the score, after the number of questions that rewards could learn from if they have several
    answers."""
    count, samples = sum(map(sum, right)), len(right[0])
    if samples > 1:
        mixed = sum(0 < sum(row) < samples for row in right)
        print(
            f"questions with right and wrong answers: {mixed:,} of {len(right):,}; --loss grpo learns from"
            " such questions alone (docs/rewards.md)"
        )
    told = f"{scores.accuracy:.1%}, {count:,} of {samples * len(right):,} answers are right"
    print(f"score: {told if samples == 1 else f'{scores.text()}; {told}'}")


def prepared(args: Flags) -> Flags:
    """Copy the flags with names of local files, and with the precision that is chosen here."""
    names = [name for name in ("questions", "preferences") if getattr(args, name)]
    chosen = {name: fetch_data(getattr(args, name)) for name in names}
    if args.model:
        chosen["precision"], _ = choose_precision(args.precision, choose_accelerator("auto"))
    return with_local_files(dataclasses.replace(args, **chosen))


class Answered(NamedTuple):
    """Questions with their answers.

    limit: most tokens of an answer. bos: ids before a prompt. None for each of these: not known.
    """

    questions: list[Question]
    answers: list[list[SavedAnswer]]  # each question has equally many
    limit: int | None
    bos: list[int] | None


def ask_model(args: Flags) -> Answered:
    """Let the model answer the questions."""
    about = about_files(args) if args.save else {}
    if args.save:
        require_unstarted_or_same(args.save, about)
    adapter = args.only_adapter
    model, tokenizer = load(args.model, adapter, args.tokenizer, args.eod, precision=args.precision)
    template = recorded_template(args.template, tokenizer, adapter, args.model, tool_style=args.tool_style)
    bos = bos_ids(args.bos, tokenizer, adapter, args.model)
    if bos:
        print(f"every question begins with {text_of(bos)}")
    questions = questions_of(args, template)
    limit = args.max_tokens or answer_limit(args.score, tokenizer, questions)
    asking = Asking(limit, template, bos, Sampling(**args.sampling), args.samples, args.seed)
    kept = None
    if args.save:
        about |= {"questions": digest(questions), "bos": list(bos), "max_tokens": limit}
        about["tokenizer"] = tokenizer.name
        kept = AnswersFile(args.save, about)
        if kept.answers:
            print(f"{len(kept.answers):,} answers are in {args.save} already")
    engine = engine_for(model, tokenizer, len(questions) * args.samples, args.batch)
    pairs = [] if args.score == "code" else first_answers(tokenizer, questions, bos)
    if doubt := doubt_of_answers(model, tokenizer, pairs):
        print(doubt, file=sys.stderr)
    try:
        answers = answers_to(engine, questions, asking, kept)
    except KeyboardInterrupt:
        if kept:
            print(
                f"{len(kept.answers):,} answers are in {args.save}; the same command goes on", file=sys.stderr
            )
        raise
    return Answered(questions, answers, limit, list(bos))


def about_files(args: Flags) -> dict[str, Any]:
    """Return the settings that decide the answers, known before the model is read. A resumed evaluation must
    have the same."""
    return {
        "model": Identity(args.model).fingerprint,
        "adapter": Identity(adapter).fingerprint if (adapter := args.only_adapter) else None,
        "precision": args.precision,
        **args.sampling,
        "seed": args.seed,
    }


def read_answered(args: Flags) -> Answered:
    """Read the questions, and their answers from the file --answers."""
    questions = questions_of(args, choose_template(args.template, args.tool_style, None, None))
    return Answered(questions, read_answers(args.answers, len(questions)), None, None)


def first_answers(
    tokenizer: Tokenizer, questions: list[Question], bos: tuple[int, ...] = ()
) -> list[tuple[list[int], list[int]]]:
    """Encode the first prompts and their reference answers. [] if one of them has no tokens."""
    first = questions[:DOUBTED]
    try:
        return [(question.ids(tokenizer, bos), tokenizer.encode(f" {question.answer}")) for question in first]
    except UserError:
        return []


def tell_cut(cut: int | None, count: int, limit: int | None) -> None:
    """Say how many of `count` answers reached the limit of tokens, and warn if that is a large share.

    cut, limit: None if not known.
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


def questions_of(args: Flags, template: Template) -> list[Question]:
    """Read the first --limit questions of the file. Raises UserError for a reference answer that the score
    can't read."""
    if args.score == "code":
        return read_problems(args.questions, template)[: args.limit]
    questions = read_questions(args.questions, template, Reading.of(args))[: args.limit]
    require_readable(args.score, questions, f"--score {args.score}")
    return questions


def judged(score: str, asked: Answered) -> list[list[bool]]:
    """Tell whether each answer to each question is right."""
    pairs = [
        (answer.text, question.answer)
        for question, answers in zip(asked.questions, asked.answers, strict=True)
        for answer in answers
    ]
    if score == "code":
        right = passed([problem.program(text) for text, problem in pairs])
    else:
        agree = SCORES[score].agree
        right = [agree(*pair) for pair in progress(pairs, "scoring", unit="answers")]
    samples = len(asked.answers[0])
    return [right[first : first + samples] for first in range(0, len(right), samples)]


def results(score: str, asked: Answered) -> list[list[Hashable | None]] | None:
    """Return the result of each answer to each question; None if the score has no majority."""
    if score == "code" or len(asked.answers[0]) == 1:
        return None
    return [[SCORES[score].result(answer.text) for answer in answers] for answers in asked.answers]


if __name__ == "__main__":
    main()
