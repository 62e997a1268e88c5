"""Write what scripts/gpu_check.sh found to docs/gpu/CARD-DATE.json.

    python -m scripts.gpu_record FOLDER

FOLDER has two files for each step: its output in NAME, and its exit code in NAME.code.
"""

from __future__ import annotations

import datetime
import json
import pathlib
import re
import sys

from .doctor import RECORDS, driver_version, run


def main(folder: pathlib.Path) -> None:
    import torch

    from src.ops import build, toolchain

    output = {path.stem: (folder / path.stem).read_text(errors="replace") for path in folder.glob("*.code")}
    codes = {path.stem: int(path.read_text()) for path in folder.glob("*.code")}
    numerics = last_json(output["numerics"])
    record = {
        "card": torch.cuda.get_device_name(),
        "architecture": "{}{}".format(*torch.cuda.get_device_capability()),
        "date": datetime.date.today().isoformat(),
        "commit": run("git", "describe", "--always", "--dirty").strip(),
        "sources": build.cuda_sources(),
        "driver": driver_version(),
        "torch": torch.__version__,
        "nvcc": toolchain.ask(toolchain.find_nvcc().path).cuda,
        "tests": last_line(output["tests"]),
        "errors": numerics.get("errors", {}),
        "sanitizer": {tool: last_line(output[tool], "SUMMARY") for tool in ("memcheck", "racecheck")},
        "failures": (
            [f"{name}: exit code {code}" for name, code in codes.items() if code]
            + numerics.get("failures", [])
        ),
        "benchmark": last_json(output["benchmark"]),
        "training": last_json(output["training"]),
    }
    RECORDS.mkdir(parents=True, exist_ok=True)
    card = re.sub(r"[^a-z0-9]+", "-", record["card"].lower()).strip("-")
    path = RECORDS / f"{card}-{record['date']}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {path}: {'; '.join(record['failures']) or 'all passed'}")
    sys.exit(bool(record["failures"]))


def last_line(text: str, having: str = "") -> str:
    """The last line with some word in it, without the === that tools put around."""
    return next(
        (line.strip("= ") for line in reversed(text.splitlines()) if having in line and line.strip()),
        "no verdict",
    )


def last_json(text: str) -> dict:
    return next((json.loads(line) for line in reversed(text.splitlines()) if line.startswith("{")), {})


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
