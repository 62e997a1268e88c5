"""table.json: a record for every case, which changes only on purpose."""

import difflib
import json
import pathlib

TABLE = pathlib.Path(__file__).with_name("table.json")


def read(path: pathlib.Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {"torch": "", "cases": {}}


def write(table: dict, path: pathlib.Path) -> None:
    path.write_text("\n".join(_lines(table)) + "\n")


def differences(case: str, record: dict, table: dict) -> list[str]:
    """A unified diff from the table's record of a case to this one; no lines where they are the same."""
    return list(
        difflib.unified_diff(
            _lines(table["cases"].get(case, {})), _lines(record), f"table.json: {case}", "now", lineterm=""
        )
    )


def _lines(value) -> list[str]:
    return json.dumps(value, indent=1, sort_keys=True).splitlines()
