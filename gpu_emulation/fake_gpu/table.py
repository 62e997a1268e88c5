"""table.json: a record for every case, which changes only on purpose."""

import difflib
import json
import pathlib

TABLE = pathlib.Path(__file__).with_name("table.json")


def read(path: pathlib.Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {"torch": "", "cases": {}}


def write(table: dict, path: pathlib.Path) -> None:
    """Write a line for each part of a record."""
    records = []
    for case, record in sorted(table["cases"].items()):
        parts = [
            f"  {json.dumps(part)}: {json.dumps(record[part], sort_keys=True)}" for part in sorted(record)
        ]
        records.append(f"{json.dumps(case)}: {{\n" + ",\n".join(parts) + "}")
    path.write_text(
        f'{{"torch": {json.dumps(table["torch"])}, "cases": {{\n' + ",\n".join(records) + "\n}}\n"
    )


def differences(case: str, record: dict, table: dict) -> list[str]:
    """A unified diff from the table's record of a case to this one; no lines where they are the same."""
    return list(
        difflib.unified_diff(
            _lines(table["cases"].get(case, {})), _lines(record), f"table.json: {case}", "now", lineterm=""
        )
    )


def launches(cases: dict) -> str:
    """docs/gpu.md's lines: the launches and waits of a micro-batch and of a token."""
    names = {"MiSS": "miss", "LoRA": "lora", "DoRA": "dora", "`--peft none`": "none"}
    shown = {name: f"step {method}" for name, method in names.items()} | {"one token of a chat": "decode"}
    lines = [
        "| | launches, RWKV-6 | launches, RWKV-7 | waits, RWKV-6 | waits, RWKV-7 |",
        "|---|---|---|---|---|",
    ]
    for name, case in shown.items():
        records = [cases[f"{case} v{version}"] for version in (6, 7)]
        counts = [record["launches"]["total"] for record in records]
        waits = [sum(record["waits"].values()) for record in records]
        lines.append(f"| {' | '.join(map(str, (name, *counts, *waits)))} |")
    return "\n".join(lines)


def _lines(value) -> list[str]:
    return json.dumps(value, indent=1, sort_keys=True).splitlines()
