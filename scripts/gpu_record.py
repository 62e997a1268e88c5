"""Write the results of scripts/gpu_check.sh to docs/gpu/CARD-DATE.json, and print a table of all such files.

    python -m scripts.gpu_record FOLDER
    python -m scripts.gpu_record --table

FOLDER has two files for each step: NAME has its output; NAME.code has its exit code, its seconds, and its
time limit in seconds. The table is Markdown, for the README.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import io
import json
import pathlib
import re
import statistics
import sys

if not __package__:  # started as a file, so that Python does not find src
    raise SystemExit("error: run this from the repository's folder as python -m scripts.gpu_record")

from .doctor import RECORDS, ROOT, records, run

BENCHMARKS = ("wkv", "training", "others", "published", "decode", "sizes")
PREDICTIONS = ROOT / "benchmarks" / "gpu_predictions.json"  # made by benchmarks.gpu_budget --predict
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
STOPPED = (124, 137)  # exit codes of `timeout`
# beginning of an ncu metric's name -> its name in the record
METRICS = {
    "gpu__time_duration": "us",
    "dram__throughput": "dram_percent",
    "sm__pipe_tensor": "tensor_percent",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.gpu_record", description=__doc__.partition("\n\n")[0], allow_abbrev=False
    )
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("folder", nargs="?", type=pathlib.Path, help="folder of outputs and exit codes")
    action.add_argument("--table", action="store_true", help="print the table only")
    args = parser.parse_args()
    if args.folder:
        write_record(args.folder)
    else:
        print(table(records()) or "no record yet: bash scripts/gpu_check.sh on a machine with an NVIDIA GPU")


def write_record(folder: pathlib.Path) -> None:
    """Write the file, print the table, and exit with 1 if something failed."""
    import torch

    from src.common.device import driver_version
    from src.ops import build, toolchain

    output = {path.stem: (folder / path.stem).read_text(errors="replace") for path in folder.glob("*.code")}
    ended = {path.stem: [int(word) for word in path.read_text().split()] for path in folder.glob("*.code")}
    numerics = last_json(output["numerics"])
    record = {
        "card": torch.cuda.get_device_name(),
        "cards": torch.cuda.device_count(),
        "architecture": "{}{}".format(*torch.cuda.get_device_capability()),
        "date": datetime.date.today().isoformat(),
        "commit": run("git", "describe", "--always", "--dirty").strip(),
        "sources": build.cuda_sources(),
        "driver": driver_version(),
        "torch": torch.__version__,
        "nvcc": toolchain.ask(toolchain.find_nvcc().path).cuda,
        "seconds": {name: seconds for name, (_, seconds, _) in ended.items()},
        "tests": last_line(output["tests"]),
        "not_tested": re.findall(r"^SKIPPED .*", output["tests"], re.MULTILINE),
        "ptx": f"{last_line(output['ptx'], 'kernels ran')}; {last_line(output['ptx'], 'findings')}",
        "errors": numerics.get("errors", {}),
        "sanitizer": {tool: verdict(output[tool]) for tool in SANITIZERS},
        "failures": [
            *(problem(name, code, limit) for name, (code, _, limit) in sorted(ended.items()) if code),
            *numerics.get("failures", []),
        ],
        **{name: last_json(output[name]) for name in BENCHMARKS},
        "ncu": kernel_figures(output["ncu"]) or last_line(output["ncu"]),
    }
    RECORDS.mkdir(parents=True, exist_ok=True)
    card = re.sub(r"[^a-z0-9]+", "-", record["card"].lower()).strip("-")
    path = RECORDS / f"{card}-{record['date']}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\n{table(records())}\n\nwrote {path}: {'; '.join(record['failures']) or 'all passed'}")
    print("\n".join(ratios(record["others"])))
    # without a user name or password, which the address may contain
    address = re.sub("//[^/]*@", "//", run("git", "remote", "get-url", "origin").strip())
    print(
        f"send {path} and the table above, also if something failed: as an issue or a pull request at"
        f" {address or 'the address that you have this project from'}"
    )
    sys.exit(bool(record["failures"]))


def problem(name: str, code: int, limit: int) -> str:
    if code in STOPPED:
        return f"{name}: stopped after {limit} s"
    return f"{name}: exit code {code}"


def last_line(text: str, having: str = "") -> str:
    """Find the last line that has a letter and contains `having`, without surrounding ===."""
    return next(
        (line.strip("= ") for line in reversed(text.splitlines()) if having in line and line.strip()),
        "no verdict",
    )


def verdict(text: str) -> str:
    """Find a sanitizer's verdict, or the reason why it did not run."""
    return last_line(text, "not run" if text.startswith("not run") else "SUMMARY")


def last_json(text: str) -> dict:
    """Read the last complete line of JSON, as a stopped benchmark may have written half a line."""
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            with contextlib.suppress(json.JSONDecodeError):
                return json.loads(line)
    return {}


def kernel_figures(text: str) -> dict[str, dict[str, float]]:
    """Read kernel -> medians of its launches from ncu's CSV.

    Figures are microseconds, and percentages of the memory's bandwidth and of the tensor cores' time.
    """
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return {}
    found: dict[str, dict[str, list[float]]] = {}
    for row in csv.DictReader(io.StringIO("\n".join(lines[start:]))):
        figure = next((METRICS[key] for key in METRICS if (row["Metric Name"] or "").startswith(key)), None)
        try:
            value = float(row["Metric Value"].replace(",", ""))
        except (ValueError, AttributeError):  # "n/a"
            continue
        if figure == "us":
            value *= {"nsecond": 1e-3, "ns": 1e-3, "msecond": 1e3, "ms": 1e3}.get(row["Metric Unit"], 1)
        if figure:
            found.setdefault(short_name(row["Kernel Name"]), {}).setdefault(figure, []).append(value)
    return {
        kernel: {figure: round(statistics.median(values), 1) for figure, values in figures.items()}
        for kernel, figures in found.items()
    }


def short_name(mangled: str) -> str:
    """Return "wkv7_chunked scan" for a mangled name, which holds file name, hash and function name."""
    match = re.search(r"_[0-9a-f]{8}_\d+_(\w+?)_cu_[0-9a-f]{8}(\d+)", mangled)
    if not match:
        return mangled
    return f"{match[1]} {mangled[match.end() :][: int(match[2])]}"


def table(runs: list[dict]) -> str:
    """Write a row for each card and date: failures, the worst errors, and speed. "" without runs."""
    if not runs:
        return ""
    lines = [
        "| card | checked | worst error, fp32 / bf16 | WKV-7, (8, 4096, 32, 64) | step, 24 x 2048, MiSS"
        " | peft's MiSS by comparison | step, 12 x 768, all trained (RWKV-LM on an RTX 5090: 99,500 tokens/s)"
        " | chat, 12 x 2048 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for record in runs:
        passed = "failed: " + "; ".join(record["failures"]) if record["failures"] else "all passed"
        commit = f"{record['date']}, {record['commit']}"
        lines.append(f"| {record['card']} | {passed} ({commit}) | {' | '.join(figures_of(record))} |")
    return "\n".join(lines)


def figures_of(record: dict) -> list[str]:
    """Write the cells of a record's figures; "-" for a missing one."""
    errors = [
        max((found[dtype] for found in record["errors"].values() if dtype in found), default=None)
        for dtype in ("float32", "bfloat16")
    ]
    wkv = [
        row["ms"]
        for row in record.get("wkv", {}).get("rows", [])
        if (row["shape"], row["form"]) == ("8,4096,2048", "wkv7 cuda") and "ms" in row
    ]
    ours, theirs = (seconds_of(record, "training", variant) for variant in ("miss", "peft miss"))
    chat = [row["tokens_per_second"] for row in record.get("decode", {}).get("rows", [])]
    return [
        " / ".join("-" if error is None else f"{error:.0e}" for error in errors),
        f"{wkv[0]:.1f} ms" if wkv else "-",
        speed_of(record, "training", "miss"),
        f"{theirs / ours:.2f} x the time" if ours and theirs else "-",
        speed_of(record, "published", "none"),
        f"{chat[0]:.0f} tokens/s" if chat else "-",
    ]


def ratios(others: dict) -> list[str]:
    """Say how long a step of the same model takes with other kernels, compared with ours."""
    rows = others.get("rows", {})
    named = {"fla": "flash-linear-attention's WKV", "compiled": "plain torch with torch.compile"}
    return [
        f"a step with {text}: {rows[name]['of_miss']:.2f} x the time of ours"
        for name, text in named.items()
        if "of_miss" in rows.get(name, {})
    ]


def seconds_of(record: dict, step: str, variant: str) -> float | None:
    return record.get(step, {}).get("rows", {}).get(variant, {}).get("seconds")


def speed_of(record: dict, step: str, variant: str) -> str:
    """Write a step's time and speed, and the ratio to the speed that gpu_budget predicts for the card."""
    if not (seconds := seconds_of(record, step, variant)):
        return "-"
    speed = record[step]["micro_bsz"] * record[step]["ctx_len"] / seconds
    text = f"{1e3 * seconds:.0f} ms, {speed:,.0f} tokens/s"
    if asked := record[step].get("asked_micro_bsz"):
        text += f", micro batch {record[step]['micro_bsz']} because {asked} did not fit"
    predicted = json.loads(PREDICTIONS.read_text())[step]
    name = record["card"].lower()
    return next(
        (f"{text}, {speed / predicted[card]:.2f} of the predicted" for card in predicted if card in name),
        text,
    )


if __name__ == "__main__":
    main()
