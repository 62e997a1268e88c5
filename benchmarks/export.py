"""Measure bytes, seconds and memory of every export, there and back.

A plain copy of the checkpoint runs beside it.

    python -m benchmarks.export [--version 7] [--layers 12] [--width 768] [--rounds 3]

A random bf16 model of the World vocabulary's size, exported without a tokenizer, of which World's takes 0.25
GB of its own. "tokenizer.json" is what the official Hugging Face folder's tokenizer takes for 1 MB of text,
in English and in Chinese. Seconds are CPU time, the fastest of the rounds, in which the forms alternate;
memory is the highest RssAnon above the start. The last line is JSON.
"""

import functools
import os
import pathlib
import shutil
import tempfile
import time

from src.data.tokenizer import load_tokenizer
from src.export import TextSettings, export
from src.export.fast_tokenizer import tokenizer_json

from .common import add_integers, argument_parser, peak_above_start, release_freed, report, write_random_base

FORMS = [("gguf", kind) for kind in ("F32", "BF16", "Q8_0", "Q4_0")] + [("hf", ""), ("safetensors", "")]
TEXT = 1_000_000  # bytes


def remove(path: pathlib.Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def measured(work) -> tuple[float, int]:
    """(CPU seconds, bytes above the start)."""
    release_freed()
    started = time.process_time()
    peak = peak_above_start(work)
    return time.process_time() - started, peak


class Figures:
    """What was measured, by name: the fastest round, the highest peak."""

    def __init__(self):
        self.rows: dict[str, dict[str, float]] = {}

    def note(self, name: str, seconds: float, peak: int, size: int) -> None:
        before = self.rows.get(name, {"seconds": seconds, "peak_mb": 0.0})
        self.rows[name] = {
            "seconds": round(min(seconds, before["seconds"]), 2),
            "peak_mb": round(max(peak / 1e6, before["peak_mb"]), 1),
            "bytes": size,
        }


def size_of(out: pathlib.Path) -> int:
    """Bytes of a file, or of a folder's files."""
    return sum(path.stat().st_size for path in out.iterdir()) if out.is_dir() else out.stat().st_size


def there_and_back(figures: Figures, base: pathlib.Path, to: str, kind: str) -> None:
    """Export the base, and read it back where the form keeps every bit."""
    out, back = base.with_name(f"out-{to}"), base.with_name("back.pth")
    remove(out)
    settings = TextSettings("none") if to != "safetensors" else None
    there = measured(lambda: export(base, out, to, kind, settings=settings))
    figures.note(f"to {to} {kind}", *there, size_of(out))
    if kind.startswith("Q"):
        return
    remove(back)  # an export does not replace a model
    read = measured(lambda: export(out, back, "pth"))
    figures.note(f"from {to} {kind}", *read, os.path.getsize(back))
    if back.read_bytes() != base.read_bytes():
        raise RuntimeError(f"from {to} {kind} came another file")


def reading_text(figures: Figures) -> None:
    """The time of the fast tokenizer for 1 MB of each text."""
    import tokenizers

    content = tokenizer_json(load_tokenizer("world", 65536))
    tokenizer = tokenizers.Tokenizer.from_str(content.decode())
    for language, name in {"English": "README.md", "Chinese": "README_zh.md"}.items():
        data = pathlib.Path(__file__).parents[1].joinpath(name).read_bytes()
        text = (data * (TEXT // len(data) + 1))[:TEXT].decode(errors="ignore")
        work = functools.partial(tokenizer.encode, text)
        figures.note(f"tokenizer.json {language}", *measured(work), TEXT)


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--version", type=int, default=7, choices=(6, 7))
    add_integers(parser, layers=12, width=768, rounds=3)
    args = parser.parse_args()
    figures = Figures()
    with tempfile.TemporaryDirectory() as folder:
        base, copy = pathlib.Path(folder, "base.pth"), pathlib.Path(folder, "back.pth")
        parameters = write_random_base(base, args.version, args.layers, args.width)
        for _ in range(args.rounds):
            figures.note("plain copy", *measured(lambda: shutil.copyfile(base, copy)), os.path.getsize(base))
            for to, kind in FORMS:
                if (to, args.version) != ("hf", 6):
                    there_and_back(figures, base, to, kind)
            reading_text(figures)
    print(f"{'':<24} {'bytes':>14} {'CPU s':>7} {'peak MB':>8}")
    for name, row in figures.rows.items():
        print(f"{name:<24} {row['bytes']:>14,} {row['seconds']:7.2f} {row['peak_mb']:8.1f}")
    report(
        "export",
        rows=figures.rows,
        version=args.version,
        parameters=parameters,
        shapes={"layers": args.layers, "width": args.width, "vocabulary": 65536},
        rounds=args.rounds,
    )


if __name__ == "__main__":
    main()
