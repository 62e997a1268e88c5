"""Reward functions of the user's file, in a process of their own (src/evaluation/reward_functions.py)."""

import contextlib
import hashlib
import os
import pathlib
import re
import signal
import sys
import time

import pytest

from rwkv_miss import UserError
from src.evaluation import reward_functions
from src.evaluation.reward_functions import CHUNK, LINES, FunctionFailed, Printed, RewardFunctions

ANSWERS = ["7", "eight", ""]
# each returns, raises or does something wrong for three answers
MISBEHAVING = """
import os, signal, subprocess, sys, time
def raises(prompt, answers, right):
    return [float(answer) for answer in answers]
def exits(prompt, answers, right):
    sys.exit("enough")
def interrupts(prompt, answers, right):
    raise KeyboardInterrupt
def is_too_deep(prompt, answers, right):
    return is_too_deep(prompt, answers, right)
class Wordless(Exception):
    def __str__(self):
        raise ValueError
def has_no_words(prompt, answers, right):
    raise Wordless
def gives_nan(prompt, answers, right): return [1, float("nan"), 0]
def gives_inf(prompt, answers, right): return [1, 2, -float("inf")]
def gives_much(prompt, answers, right): return [1, 1e200, 0]
def gives_none(prompt, answers, right): pass
def gives_none_for_one(prompt, answers, right): return [1, 0, None]
def gives_too_few(prompt, answers, right): return [1, 0]
def gives_one(prompt, answers, right): return [1]
def gives_too_many(prompt, answers, right): return [0.0] * 10_000_000
def never_stops_giving(prompt, answers, right):
    while True:
        yield 1.0
def gives_a_text(prompt, answers, right): return "1.0"
def gives_texts(prompt, answers, right): return ["1", "0", "0"]
def gives_a_number(prompt, answers, right): return 0.5
def gives_a_dict(prompt, answers, right): return {"7": 1, "eight": 0, "": 0}
def gives_lists(prompt, answers, right): return [[1], [0], [0]]
def gives_complex(prompt, answers, right): return [1j, 0, 0]
async def is_async(prompt, answers, right): return [1, 0, 0]
def leaves(prompt, answers, right):
    os._exit(3)
def crashes(prompt, answers, right):
    os.kill(os.getpid(), signal.SIGSEGV)
def hangs(prompt, answers, right):
    time.sleep(1000)
def loops(prompt, answers, right):
    while True:
        pass
def closes_all(prompt, answers, right):
    os.closerange(0, 1000)
    time.sleep(1000)
def changes_python(prompt, answers, right):
    import builtins
    builtins.float = str
    return [1, 0, 0]
def writes(text, times=1):
    for descriptor in range(3, 1000):
        try:
            for _ in range(times):
                os.write(descriptor, text)
        except OSError:
            pass
    time.sleep(1000)
def writes_json(prompt, answers, right):
    writes(b"[]\\n")
def writes_words(prompt, answers, right):
    writes(b"words\\n")
def writes_on(prompt, answers, right):
    writes(b"on " * 1000, 10**9)
def prints_on(prompt, answers, right):
    while True:
        print("again " * 20)
def prints_no_line(prompt, answers, right):
    while True:
        print("again", end="")
def leaves_a_child(prompt, answers, right):
    if not os.fork():  # it holds the pipes open
        time.sleep(1000)
    os._exit(4)
def sound(prompt, answers, right):
    return [float(answer == right) for answer in answers]
"""


@pytest.fixture
def functions_of(tmp_path):
    """functions_of(source, names) -> RewardFunctions, which are closed after the test."""
    with contextlib.ExitStack() as stack:

        def made(source, names="f", seconds=10, file="own.py", reserved=()):
            path = tmp_path / file
            path.write_text(source)
            functions = RewardFunctions(str(path), tuple(names.split()), seconds, reserved)
            stack.callback(functions.close)
            return functions

        yield made


@pytest.fixture(scope="module")
def misbehaving(tmp_path_factory):
    """All of MISBEHAVING, in one process."""
    path = tmp_path_factory.mktemp("misbehaving") / "own.py"
    path.write_text(MISBEHAVING)
    functions = RewardFunctions(str(path), (), 10)
    functions.start()
    yield functions
    functions.close()


def failure(functions, name):
    with pytest.raises(FunctionFailed) as caught:
        functions.call(name, "3 + 4?", ANSWERS, "7")
    return caught.value


def without_line(reason):
    """A reason without the number of the line in MISBEHAVING, which is that of the line it shows."""
    for number, line in re.findall(r"\(own.py, line (\d+): (.*?)\)(?:$|;)", reason):
        assert MISBEHAVING.splitlines()[int(number) - 1].strip() == line
    return re.sub(r"own.py, line \d+", "own.py, line N", reason)


MUTE = "left its process without a way to reply"
EXPECTED = "expected a list of 3 numbers, one for each answer"


@pytest.mark.parametrize(
    "name, reason",
    [
        (
            "raises",
            "raises raised ValueError: could not convert string to float: 'eight' (own.py, line N: return"
            " [float(answer) for answer in answers])",
        ),
        ("exits", 'exits raised SystemExit: enough (own.py, line N: sys.exit("enough"))'),
        ("interrupts", "interrupts raised KeyboardInterrupt (own.py, line N: raise KeyboardInterrupt)"),
        ("is_too_deep", "is_too_deep raised RecursionError: maximum recursion depth exceeded"),
        ("has_no_words", "has_no_words raised Wordless (own.py, line N: raise Wordless)"),
        ("gives_nan", "gives_nan returned nan for answer 2 of 3; expected a number"),
        ("gives_inf", "gives_inf returned -inf for answer 3 of 3; expected a number"),
        ("gives_much", "returned 1e+200 for answer 2 of 3; expected a number between -1e+09 and 1e+09"),
        ("gives_none", f"gives_none returned None; {EXPECTED}"),
        ("gives_none_for_one", "returned None for answer 3 of 3; expected a number"),
        ("gives_too_few", f"gives_too_few returned 2 values; {EXPECTED}"),
        ("gives_too_many", f"returned 10000000 values; {EXPECTED}"),
        ("never_stops_giving", f"returned 4 or more values; {EXPECTED}"),
        ("gives_one", f"gives_one returned 1 value; {EXPECTED}"),
        ("gives_a_text", f"returned the text '1.0'; {EXPECTED}"),
        ("gives_texts", "returned the text '1' for answer 1 of 3; expected a number"),
        ("gives_a_number", f"returned 0.5; {EXPECTED}"),
        ("gives_a_dict", f"returned a value of the type dict; {EXPECTED}"),
        ("gives_lists", "returned a value of the type list for answer 1 of 3; expected a number"),
        ("gives_complex", "returned a value of the type complex for answer 1 of 3; expected a number"),
        ("is_async", f"returned a value of the type coroutine; {EXPECTED}"),
    ],
)
def test_what_a_function_did_wrong_is_told_and_its_process_goes_on(misbehaving, name, reason):
    process = misbehaving.worker.process
    failed = failure(misbehaving, name)
    assert reason in without_line(failed.reason)
    assert failed.kind.startswith(f"{name}: ") and len(failed.kind) > len(f"{name}: ")
    assert misbehaving.call("sound", "3 + 4?", ANSWERS, "7") == [1, 0, 0]
    assert misbehaving.worker.process is process


@pytest.mark.parametrize(
    "name, reason",
    [
        ("leaves", "leaves ended its process: exit code 3"),
        ("crashes", "signal SIGSEGV (own.py, line N: os.kill(os.getpid(), signal.SIGSEGV))"),
        ("hangs", "hangs took more than 0.5 s (own.py, line N: time.sleep(1000)); --reward_timeout N"),
        ("loops", "loops took more than 0.5 s (own.py, line N: "),
        ("closes_all", f"closes_all {MUTE}; does it close or use file descriptors"),
        *(
            (name, f"{name} {MUTE}")
            for name in ("changes_python", "writes_json", "writes_words", "writes_on")
        ),
        ("prints_on", 'prints_on took more than 0.5 s (own.py, line N: print("again " * 20))'),
        ("prints_no_line", "prints_no_line took more than 0.5 s (own.py, line N"),
        ("leaves_a_child", "leaves_a_child ended its process: exit code 4"),
    ],
)
def test_a_function_that_breaks_its_process_is_told_and_the_next_call_has_another(functions_of, name, reason):
    functions = functions_of(MISBEHAVING, f"{name} sound", seconds=0.5)
    functions.start()
    process, before = functions.worker.process, set(os.listdir("/proc/self/fd"))
    failed = failure(functions, name)
    assert reason in without_line(failed.reason)
    assert process.returncode is not None  # the process has been waited for
    functions.seconds = 10
    assert functions.call("sound", "3 + 4?", ANSWERS, "7") == [1, 0, 0]
    assert set(os.listdir("/proc/self/fd")) <= before  # others may have been closed meanwhile


def test_numbers_of_all_kinds_are_taken(functions_of):
    functions = functions_of(
        """
import decimal, fractions
import numpy

class Scalar:  # as torch has them, whose import takes seconds
    def __init__(self, value): self.value = value
    def __float__(self): return self.value

def f(prompt, answers, right):
    return {
        "bool": [True, False], "int": (3, -4), "numpy": numpy.float32([1.5, 2]), "int64": numpy.arange(2),
        "scalars": [Scalar(0.5), numpy.bool_(1)],
        "exact": [fractions.Fraction(1, 4), decimal.Decimal("0.5")], "one by one": (x for x in (1, 2)),
    }[prompt]
"""
    )
    for kind, values in {
        "bool": [1, 0],
        "int": [3, -4],
        "numpy": [1.5, 2],
        "int64": [0, 1],
        "scalars": [0.5, 1],
        "exact": [0.25, 0.5],
        "one by one": [1, 2],
    }.items():
        assert functions.call("f", kind, ["a", "b"], "") == values, kind


def test_texts_come_as_they_are(functions_of):
    strange = ["", "\n\r\x00\x1b[2J", "\ud800 half a pair", "é 数 \U0001f600", '"\\', "x" * 3_000_000]
    functions = functions_of(
        "def f(prompt, answers, right):\n return [sum(map(ord, text)) for text in answers]\n"
        "def g(prompt, answers, right):\n return [prompt == answers[0], right == answers[1]]\n",
        "f g",
    )
    assert functions.call("f", "", strange, "") == [sum(map(ord, text)) for text in strange]
    for first, second in zip(strange, strange[1:], strict=False):
        assert functions.call("g", first, [first, second], second) == [1, 1]


def test_what_functions_print_is_shown_on_stderr_without_control_characters(functions_of, capfd):
    functions = functions_of(
        "import os, sys\nprint('imported')\n"
        "def f(prompt, answers, right):\n"
        " print('\\x1b[2Ja line')\n print('to stderr', file=sys.stderr)\n os.system('echo by a program')\n"
        " print('no end', end='')\n return [1]\n"
        "def many(prompt, answers, right):\n print('\\n'.join(map(str, range(100_000))))\n return [1]\n",
        "f many",
    )
    functions.call("f", "", [""], "")
    out, err = capfd.readouterr()
    assert out == ""
    printed = ["imported", "\\x1b[2Ja line", "to stderr", "by a program", "no end"]
    name = os.path.basename(functions.path)
    assert err.splitlines() == [f"{name}: {line}" for line in printed]
    functions.call("many", "", [""], "")
    *lines, note = capfd.readouterr().err.splitlines()
    assert lines == [f"{name}: {number}" for number in range(LINES)] and "the rest is left out" in note


def test_a_line_without_end_does_not_fill_the_memory(capfd):
    printed = Printed("own.py")
    for _ in range(LINES * 3):
        printed.add(b"x" * CHUNK, hidden=False)
        assert len(printed.partial) + len(printed.tail) <= 4 * CHUNK
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == LINES + 1 and max(map(len, lines)) < 3000


def test_a_file_imports_from_its_folder_and_is_no_main_program(functions_of, tmp_path):
    (tmp_path / "helper.py").write_text("worth = 0.5")
    functions = functions_of(
        "import dataclasses, os, sys\nimport helper\n"
        "@dataclasses.dataclass\nclass Kept:\n  calls: int = 0\n"
        "kept = Kept()\n"
        "def f(prompt, answers, right):\n  kept.calls += 1\n"
        "  return [helper.worth, kept.calls, len(sys.argv)]\n"
        "if __name__ == '__main__':\n  os._exit(9)\n"
    )
    assert functions.call("f", "", ANSWERS, "") == [0.5, 1, 1]
    assert functions.call("f", "", ANSWERS, "") == [0.5, 2, 1]  # the process is kept


@pytest.mark.parametrize("file", ["json.py", "os.path.py", "two words.py"])
def test_a_file_may_have_any_name(functions_of, file):
    source = "import json\ndef f(prompt, answers, right):\n return [json.loads('1')]\n"
    functions = functions_of(source, file=file)
    assert functions.call("f", "", [""], "") == functions.call("f", "", [""], "") == [1]


def test_what_was_read_at_first_runs_to_the_end(functions_of, tmp_path):
    functions = functions_of("def f(prompt, answers, right):\n return [1]\n", "f")
    read = hashlib.sha256((tmp_path / "own.py").read_bytes()).hexdigest()
    (tmp_path / "own.py").write_text("def f(prompt, answers, right):\n return [2]\n")
    assert functions.call("f", "", [""], "") == [1]
    functions.worker.process.kill()  # between two calls: the next one notices
    functions.worker.process.wait()
    assert functions.call("f", "", [""], "") == [1]
    assert functions.digest == read


@pytest.mark.parametrize(
    "source, reason",
    [
        ("import os\ndef f(:\n", "its import raised SyntaxError: invalid syntax (own.py, line 2: def f(:)"),
        ("x = 1\n1 / 0\n", "its import raised ZeroDivisionError: division by zero (own.py, line 2: 1 / 0)"),
        ("import no_such_module_of_ours", "ModuleNotFoundError: No module named 'no_such_module_of_ours'"),
        ("raise SystemExit(3)", "its import raised SystemExit: 3 (own.py, line 1"),
        ("import os; os._exit(5)", "its import ended its process: exit code 5"),
        ("\0", "its import raised"),
        ("", "it has no function f; it has none"),
        ("import os\ndef g(p, a, r): 0\ndef h(p, a, r): 0\ndef _i(): 0", "it has no function f; it has g, h"),
        ("f = 3", "3 is no function, as f; it has none"),
        (
            "def f(completions, **kwargs): 0",
            "f(completions, **kwargs) cannot be called with the prompt, the list of answers and the reference"
            " answer; expected def f(prompt, answers, right)",
        ),
        ("def f(p, a, r, more): 0", "f(p, a, r, more) cannot be called"),
        ("def f(p, a, r, cut, more): 0", "and after these cut and tokens if it wants them"),
        ("def f(p, a, r): 0\ndef exact(p, a, r): 0", "its function exact has the name of a built-in reward"),
        ("import time\ntime.sleep(100)", "its import took more than 2 s (own.py, line 2: time.sleep(100))"),
    ],
)
def test_a_file_that_cannot_be_used(functions_of, monkeypatch, source, reason):
    monkeypatch.setattr(reward_functions, "LOADING", 2 if "sleep" in source else 60)
    functions = functions_of(source, seconds=1, reserved=("exact", "number"))
    with pytest.raises(FunctionFailed) as caught:
        functions.start()
    assert reason in caught.value.reason
    assert functions.worker is None


def test_a_file_that_cannot_be_used_stays_so(functions_of):
    functions = functions_of("")
    for start in (functions.start, functions.start, lambda: functions.call("f", "", [""], "")):
        with pytest.raises(FunctionFailed, match="it has no function f"):
            start()


def test_functions_get_what_they_ask_for(functions_of):
    """A parameter with a default is the function's own, whatever its name."""
    functions = functions_of(
        "def both(p, a, r, cut, tokens): return [len(ids) - 10 * end for ids, end in zip(tokens, cut)]\n"
        "def named(p, a, r, *, tokens): return [ids[0] for ids in tokens]\n"
        "def own(p, a, r, cut=0.5, tokens=None): return [cut] * len(a)\n"
        "def first(cut, a, r): return [len(cut)] * len(a)\n",
        "both named own first",
    )
    extras = {"cut": [True, False], "tokens": [[5, 6], [7]]}
    found = [functions.call(name, "p", ["a", "b"], "", **extras) for name in functions.names]
    assert found == [[-8, 1], [5, 7], [0.5, 0.5], [1, 1]]


def test_what_may_be_called_may_be_a_reward(functions_of):
    functions = functions_of(
        "import functools\n"
        "class Rule:\n"
        " def __call__(self, prompt, answers, right, worth=2):\n  return [worth] * len(answers)\n"
        "rule = Rule()\nhalf = functools.partial(rule, worth=0.5)\n"
        "always = lambda *given: [1] * len(given[1])\n",
        "rule half always",
    )
    assert [functions.call(name, "", ["", ""], "") for name in functions.names] == [[2, 2], [0.5] * 2, [1, 1]]


def test_a_file_that_is_not_there(tmp_path):
    for path, what in ((tmp_path / "none.py", "there is no such file"), (tmp_path, "is a directory")):
        with pytest.raises(UserError, match=f"--reward_file .*{what}; expected a Python file"):
            RewardFunctions(str(path), ("f",), 1)


def test_ctrl_c_in_the_middle_of_a_call_leaves_no_reply_for_the_next(functions_of):
    functions = functions_of(
        "import os, signal\n"
        "def f(prompt, answers, right):\n os.kill(os.getppid(), signal.SIGINT)\n return [1]\n"
        "def g(prompt, answers, right):\n return [2]\n",
        "f g",
    )
    with pytest.raises(KeyboardInterrupt):
        functions.call("f", "", [""], "")
        time.sleep(1)
    assert functions.call("g", "", [""], "") == [2]


def gone(process, seconds=10):
    """Tell whether a process ends in time. One that nobody has waited for is gone, too."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            stat = pathlib.Path(f"/proc/{process}/stat").read_text()
        except OSError:
            return True
        if stat.rpartition(")")[2].split()[0] == "Z":
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)


@pytest.mark.skipif(sys.platform != "linux", reason="ONLY LINUX ends a process with its parent")
def test_the_process_ends_with_the_one_that_asks(functions_of):
    """Even in the middle of a regular expression, which lets no other Python run for hours."""
    functions = functions_of(
        "import re\ndef f(prompt, answers, right):\n return [re.search('(a+)+$', 'a' * 60 + 'b')]\n"
    )
    reads, writes = os.pipe()
    asks = os.fork()
    if not asks:
        with contextlib.suppress(BaseException):
            functions.start()
            os.write(writes, b"%d\n" % functions.worker.process.pid)
            functions.call("f", "", [""], "")
        os._exit(1)
    with open(reads) as lines:
        worker = int(lines.readline())
    time.sleep(0.1)
    assert not gone(worker, 0)
    os.kill(asks, signal.SIGKILL)
    os.waitpid(asks, 0)
    os.close(writes)
    try:
        assert gone(worker)
    finally:
        with contextlib.suppress(OSError):
            os.kill(worker, signal.SIGKILL)


def test_a_fork_of_the_one_that_asks_leaves_the_process_alone(functions_of):
    """As the workers of a loader are, which end before."""
    functions = functions_of("def f(prompt, answers, right):\n return [1]\n", "f")
    functions.start()
    fork = os.fork()
    if not fork:
        functions.worker.end()  # as the end of an interpreter does
        os._exit(0)
    os.waitpid(fork, 0)
    process = functions.worker.process
    assert functions.call("f", "", [""], "") == [1] and functions.worker.process is process


def test_what_a_function_has_started_ends_with_its_process(functions_of, capfd):
    functions = functions_of(
        "import subprocess\n"
        "def f(prompt, answers, right):\n"
        " print(subprocess.Popen(['sleep', '1000']).pid)\n return [1]\n"
    )
    functions.call("f", "", [""], "")
    started = int(capfd.readouterr().err.split()[-1])
    assert not gone(started, 0)
    functions.close()
    assert gone(started)


def test_close_lets_a_file_tidy_up(functions_of, tmp_path):
    functions = functions_of(
        "import atexit, pathlib\n"
        f"atexit.register(pathlib.Path({str(tmp_path / 'tidy')!r}).touch)\n"
        "def f(prompt, answers, right):\n return [1]\n"
    )
    functions.call("f", "", [""], "")
    process = functions.worker.process
    functions.close()
    assert process.returncode == 0 and (tmp_path / "tidy").exists()
    functions.close()


def test_large_numbers_of_descriptors_do_no_harm(functions_of):
    """select() takes none above 1023."""
    functions = functions_of("def f(prompt, answers, right):\n return [1]\n", "f")
    with contextlib.ExitStack() as stack:
        try:
            files = [stack.enter_context(open(os.devnull)) for _ in range(1100)]
        except OSError:
            pytest.skip("NO 1,100 OPEN FILES are allowed here")
        assert files[-1].fileno() > 1023
        assert functions.call("f", "", [""], "") == [1]
