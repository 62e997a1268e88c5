"""A merged model for other programs: python -m scripts.export --model merged.pth --out merged.gguf --to gguf"""

from __future__ import annotations

from src.doorway import importing, naming_missing_packages

with importing():
    from rwkv_miss.errors import Parser, one_line_errors
    from src.export import TARGETS, export
    from src.export.gguf import FILE_TYPES


def main(argv: list[str] | None = None) -> None:
    with one_line_errors(), naming_missing_packages():
        parser = Parser(prog="python -m scripts.export", description=__doc__)
        parser.add_argument("--model", required=True)
        parser.add_argument("--out", required=True)
        parser.add_argument("--to", required=True, choices=TARGETS)
        parser.add_argument("--type", default="BF16", choices=FILE_TYPES, help="of the large matrices in GGUF [%(default)s]")
        parser.add_argument("--tokenizer", default="auto", help="the one to put into GGUF, as in train.py, or none; auto: the one that the model "
                            "records, else World [%(default)s]")
        parser.add_argument("--eod", default="", help="as in train.py")
        parser.add_argument("--template", default="auto", help="chat template, as in train.py [%(default)s]")
        parser.add_argument("--drop_state", action="store_true", help="leave out an initial state, for which no other program has a place")
        args = parser.parse_args(argv)
        for line in export(args.model, args.out, args.to, args.type, args.tokenizer, args.eod, args.template, args.drop_state).lines():
            print(line)


if __name__ == "__main__":
    main()
