"""Worker process in which reward functions run: python reward_worker.py REQUESTS REPLIES PARENT

The first two are file descriptors of pipes, the third is the calling process. Requests and replies are
lines of JSON: the file with its functions comes first, then one line for each call. Whatever a function does
to this process, the caller goes on (see reward_functions.py).

It imports only the standard library, and the imports of the file. So it starts in 50 ms.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib.util
import inspect
import itertools
import json
import linecache
import os
import reprlib
import signal
import sys
import traceback
from collections.abc import Iterable
from types import ModuleType
from typing import Any

LONGEST = 500  # characters of an exception's message
PR_SET_PDEATHSIG = 1  # an option of prctl(2)
# parameters that a function may have after the prompt, the answers and the reference answer
EXTRAS = ("cut", "tokens")


class RewardMistake(Exception):
    """Mistake without a traceback: a wrong return value, or a missing function.

    `kind` is alike for mistakes that need to be reported once.
    """

    def __init__(self, reason: str, kind: str = ""):
        super().__init__(reason)
        self.kind = kind


def main() -> None:
    requests, replies, parent = map(int, sys.argv[1:])
    end_with(parent)
    # reports its place at a crash, or after a timeout
    faulthandler.enable(all_threads=False)
    faulthandler.register(signal.SIGUSR1, all_threads=False)
    with open(requests, "rb") as lines, open(replies, "w", encoding="ascii") as answers:
        path, module = "", None
        for line in lines:
            request = json.loads(line)
            if request is None:
                break
            try:
                if module:
                    reply = {"values": call(module, **request)}
                else:
                    path = request["path"]
                    module, reply = load(**request), {}
            except RewardMistake as refused:
                reply = {"kind": refused.kind, "refused": str(refused)}
            except BaseException as error:  # SystemExit and KeyboardInterrupt are a function's failures, too
                reply = described(error, path)
            print(json.dumps(reply), file=answers, flush=True)


def end_with(parent: int) -> None:
    """Make the kernel end this process with its parent, also in a function that never returns.

    Other systems than Linux cannot. There it ends when it next waits for a request.
    """
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        # if memory is short, the kernel shall end this process, not the training
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
            file.write("500")
    if os.getppid() != parent:  # the parent ended before the call of prctl
        os._exit(1)


def load(path: str, source: str, names: list[str], reserved: list[str]) -> ModuleType:
    """Load the module of a file, which imports from its folder, as by `python FILE`.

    The source has the file's bytes as latin-1. Raises Refused if a function is missing.
    """
    sys.path[0], sys.argv = os.path.dirname(os.path.realpath(path)), [path]
    code = source.encode("latin-1")
    # the file may change while this runs: a traceback shows the source that was run
    linecache.cache[path] = len(code), None, code.decode("utf-8", "replace").splitlines(True), path
    name = os.path.splitext(os.path.basename(path))[0]
    if name in sys.modules:
        name = f"{name}_of_rewards"  # another module has the name
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    exec(compile(code, path, "exec"), module.__dict__)
    defined = [
        known
        for known, value in vars(module).items()
        if callable(value) and not known.startswith("_") and getattr(value, "__module__", None) == name
    ]
    for wanted in names:
        check_function(wanted, getattr(module, wanted, None), defined)
    if taken := sorted(set(reserved) & set(defined)):
        raise RewardMistake(f"its function {taken[0]} has the name of a built-in reward; rename it")
    return module


def check_function(name: str, function: Any, defined: list[str]) -> None:
    """Raise RewardMistake if a function can't be called with (prompt, answers, right) and some EXTRAS."""
    if not callable(function):
        has = f"it has {', '.join(defined)}" if defined else "it has none"
        why = "it has no function" if function is None else f"{described_value(function)} is no function, as"
        raise RewardMistake(f"{why} {name}; {has}")
    with contextlib.suppress(ValueError):  # a C function may not tell its parameters
        try:
            inspect.signature(function).bind("", [], "", **dict.fromkeys(extras_of(function)))
        except TypeError:
            raise RewardMistake(
                f"{name}{inspect.signature(function)} cannot be called with the prompt, the list of answers"
                f" and the reference answer; expected def {name}(prompt, answers, right), and after these"
                f" {' and '.join(EXTRAS)} if it wants them"
            ) from None


def extras_of(function: Any) -> list[str]:
    """Name the EXTRAS that a function has after its first three parameters, without a default."""
    try:
        parameters = list(inspect.signature(function).parameters.values())[3:]
    except ValueError:  # a C function may not tell its parameters
        return []
    return [one.name for one in parameters if one.name in EXTRAS and one.default is one.empty]


def call(
    module: ModuleType, name: str, prompt: str, answers: list[str], right: str, extras: dict[str, list]
) -> list[float]:
    """Call a function, which has to return a number for each answer. Raises RewardMistake for anything else.

    `extras` has, by name, values that the function may have as further arguments: one for each answer.
    """
    count, function = len(answers), getattr(module, name)
    wanted = {extra: extras[extra] for extra in extras_of(function)}
    returned = function(prompt, answers, right, **wanted)
    expected = f"expected a list of {plural(count, 'number')}, one for each answer"
    if isinstance(returned, (str, bytes, dict, set)) or not isinstance(returned, Iterable):
        raise RewardMistake(
            f"{name} returned {described_value(returned)}; {expected}", type(returned).__name__
        )
    values = list(itertools.islice(returned, count + 1))
    if len(values) != count:
        length = len(returned) if hasattr(returned, "__len__") else len(values)
        more = not hasattr(returned, "__len__") and length > count
        counts = f"{length} or more values" if more else plural(length, "value")
        raise RewardMistake(f"{name} returned {counts}; {expected}", "length")
    return [as_number(value, name, f"answer {place} of {count}") for place, value in enumerate(values, 1)]


def plural(count: int, what: str) -> str:
    """Write `1 value`, `2 values`; formatting.counted is not imported here."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def as_number(value: Any, name: str, where: str) -> float:
    """Convert to float, also bool, numpy's numbers and torch's scalars. Raises Refused for all else."""
    with contextlib.suppress(TypeError, ValueError, OverflowError, RuntimeError):
        if not isinstance(value, (str, bytes)):
            return float(value)
    raise RewardMistake(
        f"{name} returned {described_value(value)} for {where}; expected a number",
        f"{type(value).__name__} for an answer",
    )


def described_value(value: Any) -> str:
    """Describe a value: `None`, `the text 'good'`, `a value of the type dict`."""
    if value is None:
        return "None"
    if isinstance(value, (str, int, float)):
        with contextlib.suppress(ValueError):  # for integers of thousands of digits
            return f"{'the text ' if isinstance(value, str) else ''}{reprlib.repr(value)}"
    return f"a value of the type {type(value).__name__}"


def described(error: BaseException, path: str) -> dict[str, str]:
    """Describe an exception, with the line of the user's file that it came from."""
    kind = type(error).__name__
    try:
        message = (error.msg if isinstance(error, SyntaxError) else str(error))[:LONGEST]
    except Exception:
        message = ""
    where = ""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    if isinstance(error, SyntaxError) and error.filename and error.lineno:
        where = place(error.filename, error.lineno, error.text)
    elif frames:
        where = place(path, frames[-1].lineno, frames[-1].line)
    return {
        "kind": f"{kind} {where}",
        "raised": f"{kind}: {message}".rstrip(": ") + (where and f" ({where})"),
    }


def place(path: str, number: int | None, line: str | None) -> str:
    """Name a line: `rewards.py, line 12: return score`."""
    where = f"{os.path.basename(path)}, line {number}"
    return f"{where}: {line.strip()}" if line and line.strip() else where


if __name__ == "__main__":
    main()
