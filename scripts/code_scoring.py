"""Code scoring for HumanEval and MBPP: whether a program of the model passes the problem's tests.

read_problems() makes the questions, CodeProblem.program() makes a program of an answer, and passed() runs the
programs.

Each program runs in a process of its own. A program that never ends, fills the memory, writes a large file or
starts others cannot stop the evaluation. There is no sandbox: a program can read and delete its user's files,
and use the network. Run the evaluation in a container.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rwkv_miss.errors import UserError
from src.data.chat_template import Template
from src.data.formats import sources
from src.data.questions import Question
from src.data.rwkv_template import DEFAULT
from src.evaluation.reward_functions import kill_group

SECONDS = 10  # most seconds of a program, by the clock
MEMORY = 2 << 30  # most bytes of a program's address space
FILE_SIZE = 1 << 24  # most bytes of a file that a program writes
PASSED = 77  # exit code after the tests; a program that exits early has another code
CODE_BLOCK = re.compile(r"```[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)
RUNNER = f"""
import os, resource, runpy, sys
path, memory, seconds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
resource.setrlimit(resource.RLIMIT_FSIZE, ({FILE_SIZE}, {FILE_SIZE}))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
runpy.run_path(path, run_name="__main__")
os._exit({PASSED})
"""


@dataclasses.dataclass(frozen=True)
class CodeProblem:
    """Problem for the model, and the tests of an answer.

    HumanEval gives the beginning of a function: `start` is this text, `name` the function's name. In MBPP
    both are empty, because the answer is the whole program.
    """

    question: str
    tests: str
    start: str = ""
    name: str = ""

    def program(self, answer: str) -> str:
        """Write the answer's code with the problem's tests after it."""
        return f"{self._completed(code_of(answer))}\n{self.tests}\n"

    def _completed(self, code: str) -> str:
        """Put HumanEval's beginning of the function before the code."""
        if not self.name:
            return code
        if re.search(rf"def\s+{re.escape(self.name)}\b", code):
            imports_and_helpers = self.start[: self.start.rindex(f"def {self.name}")]
            return f"{imports_and_helpers}\n{code}"
        # the answer continues inside the function
        indent = "" if code.startswith((" ", "\t")) else "    "
        return f"{self.start}{indent}{code}"


def code_of(answer: str) -> str:
    """Return the first block between ``` of an answer, or all of it."""
    block = CODE_BLOCK.search(answer)
    return block[1] if block else answer


def read_problems(path: str, template: Template = DEFAULT) -> list[Question]:
    """Read a question from every row of HumanEval or MBPP; its reference answer is a CodeProblem.

    Raises UserError for a row that is neither.
    """
    questions = []
    for source in sources(path):
        for where, record in source.records():
            if isinstance(record, UserError):
                raise UserError(f"{where}: {record}")
            problem = _problem(where, record)
            segments = template.segments([{"role": "user", "content": problem.question}], ask=True)
            questions.append(Question([text for text, _ in segments], problem, template.opening))
    return questions


def _problem(where: str, row: dict[str, Any]) -> CodeProblem:
    if {"prompt", "test", "entry_point"} <= row.keys():
        return _of_humaneval(where, row)
    if (row.get("text") or row.get("prompt")) and row.get("test_list"):
        return _of_mbpp(row)
    raise UserError(
        f"{where}: expected HumanEval's prompt, test, entry_point, or MBPP's text, test_list; got"
        f" {', '.join(row)}"
    )


def _of_humaneval(where: str, row: dict[str, Any]) -> CodeProblem:
    start, name = row["prompt"], row["entry_point"]
    if f"def {name}" not in start:
        raise UserError(f"{where}: the prompt does not begin the function {name!r}, which entry_point names")
    question = f"Complete this Python function.\n```python\n{start.strip()}\n```"
    return CodeProblem(question, f"{row['test']}\ncheck({name})", start, name)


def _of_mbpp(row: dict[str, Any]) -> CodeProblem:
    """Read a row of MBPP, or of its sanitized version, which has `prompt` and `test_imports`.

    MBPP itself has `text` and `test_setup_code` instead.
    """
    text = row.get("text") or row["prompt"]
    setup = row.get("test_setup_code") or "\n".join(row.get("test_imports") or [])
    tests = "\n".join(row["test_list"])
    question = f"{text}\nThe function must pass these tests:\n```python\n{tests}\n```"
    return CodeProblem(question, f"{setup}\n{tests}")


def passed(programs: Sequence[str], seconds: int = SECONDS, memory: int = MEMORY) -> list[bool]:
    """Tell whether each program ended without an exception, within `seconds` and `memory` bytes.

    As many run at once as there are cores.
    """
    if importlib.util.find_spec("resource") is None:
        raise UserError(
            "programs are run with a limit of memory, which this system can't set; use Linux or WSL"
        )
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda program: _passes(program, seconds, memory), programs))


def _passes(program: str, seconds: int, memory: int) -> bool:
    # ignore errors, because a child that was just killed may still be writing
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
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
            kill_group(process)
