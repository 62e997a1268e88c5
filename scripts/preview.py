"""Show what a run would train on: tokens with the loss mask in colour, and what looks wrong.

    python -m scripts.preview --data_file data.jsonl [--load_model base.pth] [any other flag of train.py]

Without --data_file it shows a small conversation in the form of --template, or in every form:

    python -m scripts.preview [--template NAME] [--tool_style NAME]

Green is trained, yellow with a weight below 1, magenta with one above; neighbouring tokens differ in shade.
Without colours « and » enclose what is trained, and a weight other than 1 follows: «so»×0.1. All rows are
read and checked, and nothing is written.

Exit code 0: done. 1: with --strict, something was found. 2: the settings are wrong.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import sys
import time

from src.common.startup import importing, naming_missing_packages

with importing():
    import numpy as np

    from rwkv_miss.errors import UserError, one_line_errors
    from rwkv_miss.files.checkpoint import Arch
    from scripts.preview_forms import forms
    from src.common.formatting import counted
    from src.config import Config, settle
    from src.config.parse import flag_parser, read_flags
    from src.config.validate import check_data
    from src.data.batches import pack
    from src.data.dataset import Document, Documents, Loaded, fit
    from src.data.encode import Encoder, Tokens, tokens_of
    from src.data.fetch import fetch_inputs
    from src.data.formats import Reading, Report, printable, read_source, sample, sources
    from src.data.leading_token import describe_leading, leading_token
    from src.data.lint import Lint
    from src.data.recorded_tokenizer import recorded_tokenizer
    from src.data.released import modes_note
    from src.data.rwkv_template import RwkvTemplate
    from src.data.templates import recorded_template
    from src.data.tokenizer import Tokenizer, load_tokenizer
    from src.model import read_model_file
    from src.planning.defaults import longest_uncut, row_length
    from src.training import document_text, plan_text

OWN = ("samples", "plain", "json", "strict")
# two shades each, as parameters of the escape sequence
TRAINED, NOT_TRAINED, LIGHT, HEAVY = (
    ("30;42", "30;102"),
    ("90", "37"),
    ("30;43", "30;103"),
    ("30;45", "30;105"),
)
SHOWN_WEIGHTS = 6  # of more different ones only the range is told
SHOWN_TOKENS = 600
PERCENTILES = (0, 50, 90, 99, 100)


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, Config]:
    """(this program's own flags, the run's settings)."""
    parser = flag_parser("python -m scripts.preview", __doc__.partition("\n\n")[0])
    own = parser.add_argument_group("of the preview alone")
    own.add_argument("--samples", type=int, default=3, help="documents to show, from all over the data [3]")
    own.add_argument(
        "--plain",
        action="store_true",
        default=False,
        help="« » instead of colours; so it is too where the output is no terminal, or NO_COLOR is set",
    )
    own.add_argument("--json", action="store_true", default=False, help="JSON alone, for machines")
    own.add_argument(
        "--strict", action="store_true", default=False, help="exit code 1 where something was found"
    )
    given = read_flags(parser, sys.argv[1:] if argv is None else argv)
    ours = argparse.Namespace(**{name: given.pop(name) for name in OWN})
    config, _ = settle(given)
    if config.data_file:
        check_data(config)
    elif ours.json or ours.strict:
        raise UserError("--json and --strict are about data; give --data_file")
    if ours.samples < 0:
        raise UserError(f"--samples {ours.samples}: must not be negative")
    return ours, config


def tokenizer_of(config: Config) -> Tokenizer:
    """The run's tokenizer; World without a model to say otherwise."""
    if config.load_model:
        return recorded_tokenizer(
            config.tokenizer,
            config.eod,
            Arch.detect(read_model_file(config.load_model)).vocab_size,
            config.load_model,
        )
    return load_tokenizer(
        "world" if config.tokenizer == "auto" else config.tokenizer,
        config.vocab_size or sys.maxsize,
        config.eod,
    )


def inspect(config: Config, encoder: Encoder) -> tuple[Lint, Report, Tokens, np.ndarray]:
    """Read everything: findings, what the files are, the tokens of all rows that can be used, each once, and
    which of them a pass sees.
    """
    lint, report, reading = Lint(encoder, longest_uncut(config)), Report("skip"), Reading.of(config)
    chosen = []
    for number, source in enumerate(sources(config.data_file, reading, report.notes)):
        before = sum(lint.begins)
        for where, row in read_source(source, report, reading, encoder.tokenizer.eod):
            try:
                lint.look(where, row)
            except UserError as error:
                report.refuse(source.path, where, error)
        chosen.append(before + sample(sum(lint.begins) - before, source.weight, config.random_seed, number))
    if not lint.documents:
        raise UserError(
            f"{config.data_file}: no row can be used, such as"
            f" {next(found.reasons[0] for found in report.files.values())}"
        )
    for found in report.files.values():
        if found.bad:
            lint.note("bad row", found.reasons[0], found.bad)
    for source in sources(config.eval_file, reading) if config.eval_file else ():
        for where, row in read_source(source, Report("skip"), reading, encoder.tokenizer.eod):
            with contextlib.suppress(UserError):
                lint.compare(where, row)
    tokens = tokens_of(lint.documents, lint.texts, lint.begins, lint.labels, lint.places)
    return lint, report, tokens, tokens.documents_of(np.concatenate(chosen))


def statistics(config: Config, tokens: Tokens, documents: Documents) -> dict:
    """Figures about the data, by name."""
    lengths = np.diff(tokens.ends, prepend=0)
    inputs = (documents.lengths - 1).tolist()
    rows = len(pack(inputs, config.ctx_len, config.random_seed)) if config.packing else len(inputs)
    return {
        "rows": tokens.records,
        "tokens": int(lengths.sum()),
        "trained": int(np.count_nonzero(tokens.weights)),
        "weights": weights_of(tokens),
        "lengths": {f"{p}%": int(np.percentile(lengths, p, method="nearest")) for p in PERCENTILES},
        "documents": len(inputs),
        "rewritten": documents.rewritten[0],
        "split": documents.split,
        "cut": documents.cut,
        "cut_tokens": documents.cut_tokens,
        "packed_rows": rows,
        "fill": sum(inputs) / (rows * config.ctx_len),
        "fill_unpacked": sum(inputs) / (len(inputs) * config.ctx_len),
    }


def weights_of(tokens: Tokens) -> dict[str, int]:
    """How many tokens have each weight in the loss; 0 is left out."""
    weights, counts = np.unique(tokens.weights, return_counts=True)
    found: collections.Counter[str] = collections.Counter()
    for weight, count in zip(weights.tolist(), counts.tolist()):
        if weight:
            found[f"{weight:g}"] += count
    return dict(found)


def weights_line(weights: dict[str, int]) -> list[str]:
    """The line about weights_of(), where there are other weights than 1."""
    if weights.keys() <= {"1"}:
        return []
    told = ", ".join(f"{float(weight):g} on {counted(count, 'token')}" for weight, count in weights.items())
    if len(weights) > SHOWN_WEIGHTS:
        told = f"from {min(map(float, weights)):g} to {max(map(float, weights)):g}"
    total = sum(float(weight) * count for weight, count in weights.items())
    return [f"weights    {told}; they add up to {total:,.1f}, by which a loss is divided"]


def overview(
    config: Config, encoder: Encoder, documents: Documents, figures: dict, lint: Lint, report: Report
) -> list[str]:
    """The lines about the data as a whole: what was read, `figures` of statistics(), and what was found."""
    length = figures["lengths"]
    lines = [
        *report.source_lines(),  # lint has the bad rows
        (
            f"template   {encoder.template.name}, loss on {plan_text.mask(encoder)}; tokenizer"
            f" {encoder.tokenizer.name}; {describe_leading(encoder.bos)}"
        ),
        (
            f"tokens     {figures['tokens']:,}, trained {figures['trained'] / figures['tokens']:.1%}; in a"
            f" row: median {length['50%']:,}, 90 % up to {length['90%']:,}, 99 % up to {length['99%']:,}, all"
            f" from {length['0%']:,} to {length['100%']:,}"
        ),
        f"ctx_len    {config.ctx_len}: {counted(figures['packed_rows'], 'row')}, {figures['fill']:.1%} full"
        + (f"; one document a row would be {figures['fill_unpacked']:.1%}" if config.packing else ""),
    ]
    lines[-1:-1] = weights_line(figures["weights"])
    lines += [f"           {text}" for text in plan_text.rewritten(documents)]
    if figures["split"]:
        lines.append(
            f"           {counted(figures['split'], 'text')} of more tokens, cut into several documents"
        )
    if figures["cut"]:
        lines.append(
            f"           {counted(figures['cut'], 'conversation')} of more tokens, cut:"
            f" {counted(figures['cut_tokens'], 'token')} lost"
        )
    lines += [f"finding    {printable(str(finding))}" for finding in lint.findings]
    return [*lines, *([] if lint.findings else ["finding    none"])]


def coloured(row: Document, tokenizer: Tokenizer) -> str:
    """A document with its tokens told apart: trained ones on green, with a weight below 1 on yellow, above on
    magenta.
    """
    pieces, decoder, shade = [], tokenizer.decoder(), 0
    if document_text.begins_silently(row, tokenizer):
        pieces, shade = [f"\x1b[{NOT_TRAINED[shade]}m␂\x1b[0m"], 1
    ended = len(row.ids) - (
        len(tokenizer.eod) if tuple(row.ids[-len(tokenizer.eod) :].tolist()) == tuple(tokenizer.eod) else 0
    )
    for token, weight in zip(row.ids[: min(ended, SHOWN_TOKENS)].tolist(), row.weights.tolist()):
        # a token that is part of a character is shown with the one that completes it
        if text := decoder.push(token):
            colour, shade = colours_of(weight)[shade], 1 - shade
            # the terminal would fill the rest of a line with the background
            pieces.append(
                "\n".join(f"\x1b[{colour}m{part}\x1b[0m" for part in text.replace("\n", "⏎\n").split("\n"))
            )
    if len(row.ids) > SHOWN_TOKENS:
        pieces.append(f"{decoder.flush()} ... ({len(row.ids)} tokens)")
    elif ended < len(row.ids):
        pieces.append(f"{decoder.flush()}\x1b[{colours_of(row.weights[-1])[shade]}m␃\x1b[0m")
    return "\n".join(f"    | {line}" for line in "".join(pieces).split("\n"))


def colours_of(weight: float) -> tuple[str, str]:
    """The two shades of tokens with this weight in the loss."""
    if weight in (0, 1):
        return TRAINED if weight else NOT_TRAINED
    return LIGHT if weight < 1 else HEAVY


def shown(row: Document, tokenizer: Tokenizer, plain: bool) -> str:
    """A document as text: with what is trained in marks if `plain`, else coloured()."""
    return document_text.sample(row, tokenizer, 2000) if plain else coloured(row, tokenizer)


def show_forms(config: Config, encoder: Encoder, plain: bool) -> None:
    """Print a conversation in the form of the template, or in every form where none is chosen."""
    if known := modes_note(config.load_model, encoder.template):
        print(f"note: {known}")
    every_mode = config.template == "auto" and isinstance(encoder.template, RwkvTemplate)
    for what, documents in forms(encoder, every_mode, config.tool_style == "auto"):
        print(what)
        for row in documents:
            print(shown(row, encoder.tokenizer, plain))
    print("« » is trained" if plain else "green is trained", "; --data_file shows your own rows", sep="")


def main(argv: list[str] | None = None) -> int:
    with one_line_errors(), naming_missing_packages():
        args, config = parse(argv)
        fetch_inputs(config)
        started = time.perf_counter()
        tokenizer = tokenizer_of(config)
        template = recorded_template(
            config.template, tokenizer, config.load_model, tool_style=config.tool_style
        )
        bos = leading_token(config.bos, tokenizer, config.load_model)
        encoder = Encoder(
            tokenizer, template, config.loss_mask, bos, config.think_weight, config.prompt_weight
        )
        plain = args.plain or not sys.stdout.isatty() or bool(os.environ.get("NO_COLOR"))
        if not config.data_file:
            show_forms(config, encoder, plain)
            return 0
        lint, report, tokens, chosen = inspect(config, encoder)
        loaded = Loaded(config.data_file, encoder, [tokens], [chosen], [""])
        config.ctx_len = config.ctx_len or row_length(loaded.longest, config.chunk_ctx, loaded.texts)[0]
        documents = fit([tokens], [chosen], config.ctx_len)
        figures = statistics(config, tokens, documents)
        if args.json:
            print(
                json.dumps(
                    {**figures, "findings": [dataclasses.asdict(finding) for finding in lint.findings]}
                )
            )
        else:
            print("\n".join(overview(config, encoder, documents, figures, lint, report)))
            for i in np.unique(
                np.linspace(0, len(documents) - 1, min(args.samples, len(documents))).astype(int)
            ):
                row = documents[int(i)]
                print(f"document {i + 1} of {len(documents)}, {len(row.ids)} tokens, {row.targets} trained:")
                print(shown(row, tokenizer, plain))
            print(f"looked at everything in {time.perf_counter() - started:.1f} s")
    return int(args.strict and bool(lint.findings))


if __name__ == "__main__":
    sys.exit(main())
