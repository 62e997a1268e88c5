"""Show what a run would train on: tokens with the loss mask in colour, and what looks wrong.

    python -m scripts.preview --data_file data.jsonl [--load_model base.pth] [any other flag of train.py]

Without --data_file it shows a small conversation in the form of --template, or in every form:

    python -m scripts.preview [--template NAME] [--tool_style NAME]

Trained tokens are green, yellow with a weight below 1, magenta with a weight above 1; neighbouring tokens
differ in shade. Without colours « and » enclose trained text, and a weight other than 1 follows: «so»×0.1.
All rows are read and checked, and nothing is written.

Exit code 0: done. 1: with --strict, something was found. 2: the settings are wrong.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import sys
import time

if not __package__:  # started as a file, so that Python does not find src
    raise SystemExit("error: run this from the repository's folder as python -m scripts.preview")

from src.common.startup import importing, naming_missing_packages

with importing():
    import numpy as np

    from rwkv_miss.errors import UserError, one_line_errors
    from rwkv_miss.files.checkpoint import Arch
    from rwkv_miss.flags import add_flags, flag, options, options_of
    from scripts.preview_answers import answer_figures, answer_lines
    from scripts.preview_forms import forms
    from scripts.preview_lint import Lint, for_machines
    from scripts.preview_questions import preview_questions
    from scripts.preview_samples import parts_of_example, sample_lines, shown, spread_places
    from src.common.formatting import counted
    from src.config import Config, settle
    from src.config.parse import flag_parser, read_flags
    from src.config.validate import check_data
    from src.data.batches import pack
    from src.data.bos import bos_ids, describe_bos
    from src.data.dataset import Loaded, fit
    from src.data.encode import Encoder, Tokens
    from src.data.examples import Examples
    from src.data.fetch import fetch_inputs
    from src.data.formats import SFT, LeftOut, Reading, Report, encodable, read_source, sample, sources
    from src.data.preferences import Preferences
    from src.data.recorded_tokenizer import recorded_tokenizer
    from src.data.released import modes_note
    from src.data.rwkv_template import RwkvTemplate
    from src.data.templates import recorded_template
    from src.data.tokenizer import Tokenizer, load_tokenizer
    from src.model import read_model_file
    from src.planning.defaults import longest_uncut, row_length
    from src.planning.draft import Draft
    from src.reporting import data_text
    from src.sources.documents import mask_text

SHOWN_WEIGHTS = 6  # if there are more different weights, only their range is shown
PERCENTILES = (0, 50, 90, 99, 100)


@options
class Own:
    """Flags of this program alone."""

    samples: int = flag(3, "documents to show, from all over the data [3]", low=0)
    plain: bool = flag(
        False,
        "mark trained text with « » instead of colours; also chosen if the output is no terminal or"
        " NO_COLOR is set",
    )
    json: bool = flag(False, "print JSON alone, for machines")
    strict: bool = flag(False, "exit code 1 if something was found")


def parse(argv: list[str] | None) -> tuple[Own, Config]:
    """Parse (this program's own flags, the run's settings)."""
    parser = flag_parser("python -m scripts.preview", __doc__.partition("\n\n")[0])
    add_flags(parser.add_argument_group("of the preview alone"), Own)
    given = read_flags(parser, sys.argv[1:] if argv is None else argv)
    ours, config = options_of(Own, given), settle(given)
    if config.data_file:
        check_data(config)
    elif ours.json or ours.strict:
        raise UserError("--json and --strict are about data; give --data_file")
    return ours, config


def tokenizer_of(config: Config) -> Tokenizer:
    """Load the run's tokenizer; World if no model names another."""
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


def inspect(config: Config, encoder: Encoder) -> tuple[Lint, Report, Loaded]:
    """Read all data: returns the findings, the report on the files, and the rows that can be used."""
    reading, report = Reading.of(config), Report("skip")
    lint = Lint(encoder, longest_uncut(config.settled().ctx_len, config.chunk_ctx), reading.rows)
    loaded = Loaded(config.data_file, encoder, [], [], [], reading.rows)
    used: collections.Counter[str] = collections.Counter()  # rows of each file
    for number, source in enumerate(sources(config.data_file, reading, report.notes)):
        for where, row in read_source(source, report, reading, encoder.tokenizer.eod):
            try:
                lint.look(where, row)
            except LeftOut as reason:
                report.files[source.path].leave_out(where, reason)
                if reading.rows == SFT:
                    lint.note("empty answer", where)
            except UserError as error:
                report.refuse(source.path, where, error)
        if lint.documents:
            tokens = lint.tokens()
            seen = sample(tokens.records, source.weight, config.random_seed, number)
            loaded.files.append(tokens)
            used[source.path] = tokens.records
            loaded.chosen.append(tokens.documents_of(seen))
            loaded.names.append(report.files[source.path].place)
    if not loaded.files:
        raise UserError(f"{config.data_file}: {next(iter(report.files.values())).unusable()}")
    for path, found in report.files.items():
        if found.bad:
            lint.note("bad row", found.reasons[0], found.bad)
        if found.joined:
            lint.note("rows in a cell", found.joined, found.rows_in_cells)
        left_out = sum(count for count, _ in found.left_out.values())
        if left_out and left_out >= used[path]:
            lint.note("left out", next(places[0] for _, places in found.left_out.values()), left_out)
    for source in sources(config.eval_file, reading) if config.eval_file else ():
        for where, row in read_source(source, Report("skip"), reading, encoder.tokenizer.eod):
            with contextlib.suppress(UserError):
                lint.compare(where, row)
    return lint, report, loaded


def statistics(config: Config, loaded: Loaded, documents: Examples) -> dict:
    """Compute figures about the data: name -> number."""
    lengths = np.concatenate([np.diff(tokens.ends, prepend=0) for tokens in loaded.files])
    weights = weights_of(loaded.files)
    inputs = (documents.lengths - 1).tolist()
    rows = len(pack(inputs, config.ctx_len, config.random_seed)) if config.packing else len(inputs)
    return {
        "rows": sum(tokens.records for tokens in loaded.files),
        "tokens": int(lengths.sum()),
        "trained": sum(weights.values()),
        "weights": weights,
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


def weights_of(files: list[Tokens]) -> dict[str, int]:
    """Count the tokens of each weight in the loss; 0 is left out."""
    tokens_by_weight: collections.Counter[str] = collections.Counter()
    for tokens in files:
        weights, counts = np.unique(tokens.weights, return_counts=True)
        for weight, count in zip(weights.tolist(), counts.tolist()):
            if weight:
                tokens_by_weight[f"{weight:g}"] += count
    return dict(tokens_by_weight)


def weights_line(weights: dict[str, int]) -> list[str]:
    """Write the line about weights_of(), if there are other weights than 1."""
    if weights.keys() <= {"1"}:
        return []
    parts = ", ".join(f"{float(weight):g} on {counted(count, 'token')}" for weight, count in weights.items())
    if len(weights) > SHOWN_WEIGHTS:
        parts = f"from {min(map(float, weights)):g} to {max(map(float, weights)):g}"
    total = sum(float(weight) * count for weight, count in weights.items())
    return [f"weights    {parts}; they add up to {total:,.1f}, by which a loss is divided"]


def overview(
    config: Config, encoder: Encoder, documents: Examples, figures: dict, lint: Lint, report: Report
) -> list[str]:
    """Write the lines about the data as a whole: the files, `figures` of statistics(), and the findings."""
    length = figures["lengths"]
    trained = "the answers"
    if not isinstance(documents, Preferences):
        trained = mask_text(config.loss_mask, config.think_weight, config.prompt_weight)
    lines = [
        *report.source_lines(),  # bad rows are among the findings
        (
            f"template   {encoder.template.name}, loss on {trained}; tokenizer"
            f" {encoder.tokenizer.name}{guessed(config)}; {describe_bos(encoder.bos)}"
        ),
        (
            f"tokens     {figures['tokens']:,}, trained {figures['trained'] / figures['tokens']:.1%}; in a"
            f" row: median {length['50%']:,}, 90 % up to {length['90%']:,}, 99 % up to {length['99%']:,}, all"
            f" from {length['0%']:,} to {length['100%']:,}"
        ),
        f"ctx_len    {config.ctx_len}: {counted(figures['packed_rows'], 'row')}, {figures['fill']:.1%} full"
        + (
            f"; {figures['fill_unpacked']:.1%} with --packing 0, a document in each" if config.packing else ""
        ),
    ]
    lines[-1:-1] = weights_line(figures["weights"])
    lines += [f"           {text}" for text in data_text.rewritten(documents)]
    if figures["split"]:
        lines.append(
            f"           {counted(figures['split'], 'text')} of more tokens, cut into several documents"
        )
    if figures["cut"]:
        lines.append(
            f"           {counted(figures['cut'], 'conversation')} of more tokens, cut:"
            f" {counted(figures['cut_tokens'], 'token')} lost"
        )
    lines += answer_lines(config, figures, documents, report)
    lines += [f"finding    {encodable(str(finding))}" for finding in lint.findings]
    return [*lines, *([] if lint.findings else ["finding    none"])]


def guessed(config: Config) -> str:
    """Name the tokenizer and template that are assumed because no model names them."""
    if config.load_model or config.tokenizer != "auto":
        return ""
    return " (a guess; with --load_model it counts as the run will)"


def show_forms(config: Config, encoder: Encoder, plain: bool) -> None:
    """Print a conversation in the form of the template, or in every form if none is chosen."""
    if note := modes_note(config.load_model, encoder.template):
        print(f"note: {note}")
    every_mode = config.template == "auto" and isinstance(encoder.template, RwkvTemplate)
    for what, documents in forms(encoder, every_mode, config.tool_style == "auto"):
        print(what)
        for row in documents:
            print(shown(row, encoder.tokenizer, plain))
    print("« » is trained" if plain else "green is trained", "; --data_file shows your own rows", sep="")


def main(argv: list[str] | None = None) -> int:
    with one_line_errors(), naming_missing_packages():
        args, config = parse(argv)
        config = fetch_inputs(config)
        started = time.perf_counter()
        tokenizer = tokenizer_of(config)
        template = recorded_template(
            config.template, tokenizer, config.load_model, tool_style=config.tool_style
        )
        bos = bos_ids(config.bos, tokenizer, config.load_model)
        encoder = Encoder(
            tokenizer, template, config.loss_mask, bos, config.think_weight, config.prompt_weight
        )
        plain = args.plain or not sys.stdout.isatty() or bool(os.environ.get("NO_COLOR"))
        if not config.data_file:
            show_forms(config, encoder, plain)
            return 0
        if config.draws_answers:
            found = preview_questions(config, encoder, args, plain)
            return int(args.strict and found)
        lint, report, loaded = inspect(config, encoder)
        draft = Draft(config)
        draft.choose("ctx_len", *row_length(loaded.longest, config.chunk_ctx, loaded.texts))
        config = draft.config
        if loaded.rows == SFT:
            documents = fit(loaded.files, loaded.chosen, config.ctx_len)
        else:
            documents = loaded.preferences(config.ctx_len)
        figures = statistics(config, loaded, documents) | answer_figures(documents, report)
        if args.json:
            found = for_machines(lint.findings)
            samples = [
                parts_of_example(documents[i], tokenizer) for i in spread_places(args.samples, documents)
            ]
            print(json.dumps({**figures, "findings": found, "samples": samples}))
        else:
            print("\n".join(overview(config, encoder, documents, figures, lint, report)))
            for i in spread_places(args.samples, documents):
                print("\n".join(sample_lines(documents, i, tokenizer, plain)))
            print(f"looked at everything in {time.perf_counter() - started:.1f} s")
    return int(args.strict and bool(lint.findings))


if __name__ == "__main__":
    sys.exit(main())
