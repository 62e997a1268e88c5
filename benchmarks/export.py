"""Measure bytes, seconds and memory of every export, there and back.

A plain copy of the checkpoint runs beside it.

    python -m benchmarks.export [--version 7] [--layers 12] [--width 768] [--rounds 3]

A random bf16 model of the World vocabulary's size, exported without a tokenizer, of which World's takes 0.25
GB of its own. Seconds are CPU time, the fastest of the rounds, in which the forms alternate; memory is the
highest RssAnon above the start. The last line is JSON.
"""

import argparse
import os
import pathlib
import shutil
import tempfile
import time

from src.export import export

from .common import peak_above_start, release_freed, report, write_random_base

FORMS = [("gguf", kind) for kind in ("F32", "BF16", "Q8_0", "Q4_0")] + [("hf", ""), ("safetensors", "")]


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--version", type=int, default=7, choices=(6, 7))
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    rows: dict[str, dict[str, float]] = {}

    def note(name: str, seconds: float, peak: int, size: int) -> None:
        before = rows.get(name, {"seconds": seconds, "peak_mb": 0.0})
        rows[name] = {
            "seconds": round(min(seconds, before["seconds"]), 2),
            "peak_mb": round(max(peak / 1e6, before["peak_mb"]), 1),
            "bytes": size,
        }

    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        base, back = folder / "base.pth", folder / "back.pth"
        parameters = write_random_base(base, args.version, args.layers, args.width)
        for _ in range(args.rounds):
            note("plain copy", *measured(lambda: shutil.copyfile(base, back)), os.path.getsize(base))
            for to, kind in FORMS:
                if (to, args.version) == ("hf", 6):
                    continue
                out = folder / f"out-{to}"
                remove(out)
                language = {"tokenizer": "none"} if to != "safetensors" else {}
                there = measured(
                    lambda to=to, kind=kind, out=out, language=language: export(
                        base, out, to, kind, **language
                    )
                )
                size = sum(p.stat().st_size for p in out.iterdir()) if out.is_dir() else out.stat().st_size
                note(f"to {to} {kind}", *there, size)
                if not kind.startswith("Q"):
                    remove(back)  # an export does not replace a model
                    note(
                        f"from {to} {kind}",
                        *measured(lambda out=out: export(out, back, "pth")),
                        os.path.getsize(back),
                    )
                    if back.read_bytes() != base.read_bytes():
                        raise RuntimeError(f"from {to} {kind} came another file")
    print(f"{'':<20} {'bytes':>14} {'CPU s':>7} {'peak MB':>8}")
    for name, row in rows.items():
        print(f"{name:<20} {row['bytes']:>14,} {row['seconds']:7.2f} {row['peak_mb']:8.1f}")
    report(
        "export",
        rows=rows,
        version=args.version,
        parameters=parameters,
        shapes={"layers": args.layers, "width": args.width, "vocabulary": 65536},
        rounds=args.rounds,
    )


if __name__ == "__main__":
    main()
