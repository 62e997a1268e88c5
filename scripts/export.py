"""Write a merged model for another program, or turn such a file back into a checkpoint.

    python -m scripts.export --model merged.pth --out merged.gguf --to gguf

gguf is for llama.cpp, also for an adapter alone. hf is a folder for Hugging Face's transformers, RWKV-7 only.
safetensors is one file. ai00 is for Ai00 and web-rwkv, also for a tuned state. pth turns one of the first
three into a checkpoint.
"""

from __future__ import annotations

if not __package__:  # started as a file, so that Python does not find src
    raise SystemExit("error: run this from the repository's folder as python -m scripts.export")

from src.common.startup import importing, naming_missing_packages

with importing():
    from rwkv_miss.errors import Parser, one_line_errors
    from rwkv_miss.files.hub import local_path
    from src.data.bos import HELP as BOS_HELP
    from src.data.templates import add_template_flags
    from src.export import TARGETS, TextSettings, export
    from src.export.gguf import DEFAULT_TYPE, FILE_TYPES
    from src.export.hugging_face import LAYOUTS


def main(argv: list[str] | None = None) -> None:
    with one_line_errors(), naming_missing_packages():
        parser = Parser(prog="python -m scripts.export", description=__doc__.partition("\n\n")[0])
        parser.add_argument("--model", required=True)
        parser.add_argument("--out", required=True)
        parser.add_argument(
            "--to",
            required=True,
            choices=TARGETS,
            help=(
                "gguf: llama.cpp, also an adapter for its --lora. hf: a folder for transformers, RWKV-7."
                " safetensors: one file. ai00: Ai00 and web-rwkv, also a tuned state. pth: back to a"
                " checkpoint"
            ),
        )
        parser.add_argument(
            "--type",
            default="",
            choices=FILE_TYPES,
            help=f"type of the large matrices in GGUF [{DEFAULT_TYPE}]",
        )
        parser.add_argument(
            "--layout",
            default="",
            choices=LAYOUTS,
            help=(
                "form of the Hugging Face folder. official: Rwkv7ForCausalLM. fla: flash-linear-attention and"
                f" rwkv7-hf [{LAYOUTS[0]}]"
            ),
        )
        parser.add_argument(
            "--tokenizer",
            default="auto",
            help=(
                "tokenizer for gguf and hf, as in train.py, or none; auto: the model's record, else World"
                " [%(default)s]"
            ),
        )
        parser.add_argument("--eod", default="", help="as in train.py")
        add_template_flags(parser.add_argument)
        parser.add_argument("--bos", default="recorded", help=BOS_HELP)
        parser.add_argument(
            "--drop_state",
            action="store_true",
            help="leave out an initial state, for which no other program has a place",
        )
        args = parser.parse_args(argv)
        args.model = local_path(args.model)
        for line in export(
            args.model,
            args.out,
            args.to,
            args.type,
            args.layout,
            args.drop_state,
            TextSettings(args.tokenizer, args.eod, args.template, args.tool_style, args.bos),
        ).lines():
            print(line)


if __name__ == "__main__":
    main()
