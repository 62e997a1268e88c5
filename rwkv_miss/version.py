"""Version of the project, and in a checkout its commit."""

from __future__ import annotations

import contextlib
import functools
import pathlib
import subprocess

VERSION = "0.2.0"  # pyproject.toml takes it from here


@functools.cache
def commit() -> str:
    """Return the checkout's commit, such as "4ad1e2f", or "4ad1e2f-dirty" with changes; "" outside of one.

    It is looked up once in a process.
    """
    root = pathlib.Path(__file__).parents[1]
    if not (root / ".git").exists():  # git would name the commit of a project around an installed package
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    return ""


def version_line() -> str:
    """Return the version and the commit: "0.2.0, commit 4ad1e2f"."""
    return f"{VERSION}, commit {found}" if (found := commit()) else VERSION
