"""Write RWKV-LM's binidx files from any data that train.py reads, or turn them back into JSONL.

    python -m scripts.binidx OUT DATA...                     # writes OUT.bin and OUT.idx
    python -m scripts.binidx --to_jsonl OUT.jsonl DATA...    # {"text": ...} a line

Every row ends with an end of document. train.py does not need these files: it reads all formats directly.
A binidx file holds tokens but no loss mask, so everything in it is trained.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator

if not __package__:  # started as a file, so that Python does not find src
    raise SystemExit("error: run this from the repository's folder as python -m scripts.binidx")

from src.common.startup import importing, naming_missing_packages

with importing():
    from rwkv_miss.errors import UserError, one_line_errors
    from rwkv_miss.flags import flag, options, parse_flags
    from src.common.option import shared
    from src.config import FIELDS
    from src.data.encode import Encoder
    from src.data.fetch import fetch_data
    from src.data.formats import Reading, Report, read_source, sources
    from src.data.formats.binidx import BinidxWriter
    from src.data.formats.layouts import text
    from src.data.templates import TEMPLATE_FLAG, TOOL_STYLE_FLAG, choose_template
    from src.data.tokenizer import load_tokenizer


@options
class Flags:
    """Flags of this program."""

    out: str = flag(
        help="prefix of the .bin and .idx to write, or with --to_jsonl the JSONL", positional=True
    )
    data: list[str] = flag(
        help="files, folders or names, as for --data_file of train.py", positional=True, nargs="+"
    )
    to_jsonl: bool = flag(False, "write text instead of tokens")
    tokenizer: str = flag("world", "world, bytes, utf16, or a file [world]")
    eod: str = flag("", "text of the end-of-document token, for a tokenizer file that does not name it")
    template: str = flag(**TEMPLATE_FLAG)
    tool_style: str = flag(**TOOL_STYLE_FLAG)
    sft_field: str = shared(FIELDS["sft_field"])
    sft_split: str = shared(FIELDS["sft_split"])
    largest_row: int = shared(FIELDS["largest_row"])


def main(argv: list[str] | None = None) -> None:
    with one_line_errors(), naming_missing_packages():
        args = parse_flags(
            Flags,
            argv,
            prog="python -m scripts.binidx",
            description=__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        count, tokens = convert(args)
        print(
            f"wrote {args.out if args.to_jsonl else args.out + '.bin and .idx'}: {count:,} documents,"
            f" {tokens:,} tokens"
        )


def convert(args: Flags) -> tuple[int, int]:
    """Write the documents: returns (documents, tokens with ends). After a UserError there is no file."""
    tokenizer = load_tokenizer(args.tokenizer, sys.maxsize, args.eod)
    # mask "all", because then a row is always one document
    encoder = Encoder(tokenizer, choose_template(args.template, args.tool_style, None, tokenizer), "all")
    count = tokens = 0
    try:
        writer = (
            JsonlWriter(args.out, tokenizer)
            if args.to_jsonl
            else BinidxWriter(args.out, tokenizer.vocab_size)
        )
        try:
            for where, row in rows(args.data, Reading.of(args), tokenizer.eod):
                try:
                    [(ids, _)] = encoder.encode(without_weights(row))
                    writer.add(ids)
                except UserError as error:
                    raise UserError(f"{where}: {error}") from None
                count, tokens = count + 1, tokens + len(ids)
            writer.close()
        except BaseException:
            writer.discard()
            raise
    except OSError as error:
        raise UserError(f"{args.out} could not be written ({error.strerror})") from None
    return count, tokens


def without_weights(row: dict) -> dict:
    """Drop the weights of a row's answers, which the written files can't hold."""
    if "messages" not in row:
        return row
    messages = [{name: v for name, v in message.items() if name != "weight"} for message in row["messages"]]
    return row | {"messages": messages}


def rows(data: list[str], reading: Reading, eod: tuple[int, ...]) -> Iterator[tuple[str, dict]]:
    """Read the records of several --data_file names.

    Raises UserError for a name with a weight, which says how often a run sees a file and can't be written.
    """
    for name in data:
        for source in sources(fetch_data(name), reading):
            if source.weight != 1:
                raise UserError(
                    f"{name}: a file has every row once; drop the weight here, and give it to --data_file of"
                    " train.py"
                )
            yield from read_source(source, Report(), reading, eod)


class JsonlWriter:
    """Writer of {"text": ...} lines: add() for each document, then close(). Until then the file has a
    temporary name; discard() removes it."""

    def __init__(self, path: str, tokenizer):
        self.path, self.tokenizer = path, tokenizer
        self.file = open(path + ".tmp", "w", encoding="utf-8")

    def add(self, ids) -> None:
        """Add a document without its end. Raises UserError for one that train.py can't read from JSONL."""
        decoded = self.tokenizer.decode(ids[: len(ids) - len(self.tokenizer.eod)].tolist())
        try:
            row = {"text": text(decoded, "as text")}
        except UserError as error:
            raise UserError(f"{error}; give train.py the tokens, which it reads as they are") from None
        self.file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def close(self) -> None:
        with self.file:
            os.fsync(self.file.fileno())
        os.replace(self.path + ".tmp", self.path)

    def discard(self) -> None:
        self.file.close()
        os.remove(self.path + ".tmp")


if __name__ == "__main__":
    main()
