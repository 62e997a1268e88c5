"""HumanEval and MBPP: what a model wrote is run against the problem's tests, each in a process with limits of
time and memory.

The limits keep a bad program from stopping the evaluation. They are no sandbox: such a program can do what
its user can.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rwkv_miss.errors import UserError

from .evaluate import Question
from .formats import sources
from .template import DEFAULT, Template

SECONDS, MEMORY = 10, 2 << 30  # of one program, wall clock and address space
PASSED = 77  # an exit code that a program does not get by ending early
FENCE = re.compile(r"```[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)
RUNNER = f"""
import os, resource, runpy, sys
for name, limit in (("AS", int(sys.argv[2])), ("CPU", int(sys.argv[3])), ("FSIZE", 1 << 24), ("CORE", 0)):
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (limit, limit))
runpy.run_path(sys.argv[1], run_name="__main__")
os._exit({PASSED})
"""


@dataclasses.dataclass(frozen=True)
class Problem:
    """`question` is what the model is asked; `name` is the function that `start` begins (HumanEval), "" where
    the answer is all (MBPP).
    """

    question: str
    tests: str
    start: str = ""
    name: str = ""

    def program(self, answer: str) -> str:
        """The answer's code with the problem's tests behind it."""
        code = written(answer)
        if self.name and not re.search(rf"def\s+{re.escape(self.name)}\b", code):  # the rest of the function
            code = self.start + (code if code.startswith((" ", "\t")) else f"    {code}")
        elif self.name:  # with the imports and helpers that were given
            code = f"{self.start[: self.start.rindex(f'def {self.name}')]}\n{code}"
        return f"{code}\n{self.tests}\n"


def written(answer: str) -> str:
    """The first block between ``` of an answer, or all of it."""
    found = FENCE.search(answer)
    return found[1] if found else answer


def read_problems(path: str, template: Template = DEFAULT) -> list[Question]:
    """A question, of which a Problem is what is right, of every row of HumanEval or MBPP. UserError for a row
    that is neither.
    """
    problems = []
    for source in sources(path):
        for where, record in source.records():
            if isinstance(record, UserError):
                raise UserError(f"{where}: {record}")
            problem = _problem(where, record)
            pieces = [
                piece
                for piece, _ in template.segments([{"role": "user", "content": problem.question}], ask=True)
            ]
            problems.append(Question(pieces, problem, template.opening))
    return problems


def _problem(where: str, record: dict[str, Any]) -> Problem:
    if {"prompt", "test", "entry_point"} <= record.keys():
        start, name = record["prompt"], record["entry_point"]
        if f"def {name}" not in start:
            raise UserError(
                f"{where}: the prompt does not begin the function {name!r}, which entry_point names"
            )
        return Problem(
            f"Complete this Python function.\n```python\n{start.strip()}\n```",
            f"{record['test']}\ncheck({name})",
            start,
            name,
        )
    text = record.get("text") or record.get("prompt")  # MBPP, and its sanitized version
    if text and record.get("test_list"):
        setup = record.get("test_setup_code") or "\n".join(record.get("test_imports") or [])
        tests = "\n".join(record["test_list"])
        return Problem(
            f"{text}\nThe function must pass these tests:\n```python\n{tests}\n```", f"{setup}\n{tests}"
        )
    raise UserError(
        f"{where}: expected HumanEval's prompt, test, entry_point, or MBPP's text, test_list; got"
        f" {', '.join(record)}"
    )


def passed(programs: Sequence[str], seconds: int = SECONDS, memory: int = MEMORY) -> list[bool]:
    """Whether each program came to its end without an exception, within `seconds` and `memory` bytes; one
    process a core at a time.
    """
    if importlib.util.find_spec("resource") is None:
        raise UserError(
            "programs are run with a limit of memory, which this system can't set; use Linux or WSL"
        )
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda program: _passes(program, seconds, memory), programs))


def _passes(program: str, seconds: int, memory: int) -> bool:
    with tempfile.TemporaryDirectory(
        ignore_cleanup_errors=True
    ) as folder:  # a killed child may still be writing
        path = pathlib.Path(folder, "program.py")
        path.write_text(program, encoding="utf-8", errors="replace")
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", RUNNER, str(path), str(memory), str(seconds + 1)],
            cwd=folder,
            env={"PATH": os.defpath},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            return process.wait(seconds) == PASSED
        except subprocess.TimeoutExpired:
            return False
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)  # and what it has started
            except ProcessLookupError:
                pass
            process.wait()
