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
    from rwkv_miss.errors import one_line_errors
    from rwkv_miss.files.hub import with_local_files
    from rwkv_miss.flags import flag, flags_of, options, parse_flags
    from src.export import TARGETS, TextSettings, export
    from src.export.gguf import DEFAULT_TYPE, FILE_TYPES
    from src.export.hugging_face import LAYOUTS


@options
class Flags:
    """Flags of this program."""

    model: str = flag(file=True)
    out: str = flag()
    to: str = flag(
        help="gguf: llama.cpp, also an adapter for its --lora. hf: a folder for transformers, RWKV-7."
        " safetensors: one file. ai00: Ai00 and web-rwkv, also a tuned state. pth: back to a checkpoint",
        choices=TARGETS,
    )
    type: str = flag("", f"type of the large matrices in GGUF [{DEFAULT_TYPE}]", choices=FILE_TYPES)
    layout: str = flag(
        "",
        "form of the Hugging Face folder. official: Rwkv7ForCausalLM. fla: flash-linear-attention and"
        f" rwkv7-hf [{LAYOUTS[0]}]",
        choices=LAYOUTS,
    )
    text: TextSettings = flags_of(TextSettings)
    drop_state: bool = flag(False, "leave out an initial state, for which no other program has a place")


def main(argv: list[str] | None = None) -> None:
    with one_line_errors(), naming_missing_packages():
        about = __doc__.partition("\n\n")[0]
        args = with_local_files(parse_flags(Flags, argv, prog="python -m scripts.export", description=about))
        done = export(args.model, args.out, args.to, args.type, args.layout, args.drop_state, args.text)
        for line in done.lines():
            print(line)


if __name__ == "__main__":
    main()
