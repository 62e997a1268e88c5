"""Progress of a long piece of work, as a user sees it: on a terminal a bar, on a pipe a line now and then."""

import os
import pty
import re
import shutil
import subprocess
import sys

import pytest

from rwkv_miss import progress as module
from rwkv_miss.progress import Progress, progress, say

from .conftest import ROOT

WORK = """
import sys
from rwkv_miss import progress as module
from rwkv_miss.errors import UserError, one_line_errors
module.DELAY, module.REDRAW = 0.0, 0.0
with one_line_errors():
    for i in module.progress(range(3), "counting", unit="things"):
        if i == 2 and sys.argv[1:]:
            raise UserError("two")
    module.say("done")
"""


def on_a_terminal(*args, command=(sys.executable, "-c", WORK), **variables):
    """(exit code, all that the terminal was sent) of a command."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"COLUMNS": "100"} | variables
    command = [*command, *args]
    process = subprocess.Popen(command, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    seen = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # Linux's end of a terminal
            part = b""
        if not part:
            os.close(ours)
            return process.wait(), seen.decode()
        seen += part


def last_lines(seen):
    """Keep what stays on the screen: after a carriage return a text is written over the one before it."""
    lines = []
    for line in seen.replace("\r\n", "\n").split("\n"):
        screen = ""
        for text in line.split("\r"):
            screen = text + screen[len(text) :]
        lines.append(screen.rstrip())
    return [line for line in lines if line]


def test_a_terminal_sees_a_bar_and_keeps_nothing_of_it():
    code, seen = on_a_terminal()
    assert code == 0
    assert re.search(r"counting \[#{6} {14}\]  33%, 1 of 3 things, [\d,.e+]+ things/s, 0.0 s left", seen)
    assert last_lines(seen) == ["done"]


def test_in_a_narrow_terminal_the_bar_makes_room_for_the_numbers(monkeypatch):
    bar = Progress("answering", 3000, "answers")
    bar.terminal, bar.done, bar.note = True, 463, "loss 2, 1,200 tokens/s"
    for columns, begin, end in (
        (200, "answering [###                 ]  15%,", "/s, 77 s left, loss 2, 1,200 tokens/s"),
        (80, "answering [     ]  15%,", "answers, 77 s left, loss 2, 1,200 tokens/s"),
        (72, "answering: 463 of 3,000", "answers, 77 s left, loss 2, 1,200 tokens/s"),
        (56, "answering: 463 of 3,000", "answers, 77 s left, loss 2"),
        (48, "answering: 463 of 3,000", "answers, 77 s left"),
    ):
        monkeypatch.setenv("COLUMNS", str(columns))
        text = bar.text(14)
        assert len(text) < columns and text.startswith(begin) and text.endswith(end), text


def test_an_error_does_not_hang_on_the_end_of_a_bar():
    code, seen = on_a_terminal("fail")
    assert code == 2 and "counting [" in seen and last_lines(seen) == ["error: two"]


WAITING = """
import time
from rwkv_miss import progress as module
module.DELAY, module.TICK = 0.0, 0.01
with module.Progress("outer", 10, "steps", delay=1e9) as outer:
    with module.Progress("thinking") as bar:
        outer.next = 0.0
        while not bar.drawn:
            time.sleep(0.01)
        time.sleep(0.1)
        print("", outer.drawn, flush=True)
    while not outer.drawn:
        time.sleep(0.01)
print("done")
"""


def test_a_bar_goes_on_while_nothing_is_counted():
    """Only the inner one of two bars goes on, until it ends."""
    code, seen = on_a_terminal(command=(sys.executable, "-c", WAITING))
    assert code == 0 and last_lines(seen)[-1] == "done"
    thinking, _, rest = seen.partition("False")
    assert re.search(r"thinking: 0\.\d s", thinking) and "outer" not in thinking
    assert "outer [" in rest


def test_a_terminal_is_told_of_torch_before_it_is_loaded(tmp_path):
    code = "import os, sys\nos.write(2, b'TORCH')\nraise ModuleNotFoundError(name='torch')"
    (tmp_path / "torch.py").write_text(code)
    command = (sys.executable, "train.py")
    code, seen = on_a_terminal(command=command, PYTHONPATH=str(tmp_path))
    assert code == 2 and seen.startswith("loading torch") and seen.index("loading") < seen.index("TORCH")
    assert "\r\x1b[Kerror: the package torch is not installed" in seen


SETUP = """
source <(grep -v '^cd ' "$0" | head --lines -1)
python() { printf 'Collecting torch>=2.5 (from -r x)\nInstalling collected packages: torch\n'; return 3; }
find_nvcc() { echo reached; }
pip_install torch && find_nvcc
echo "code $?"
"""


def test_an_installation_says_what_it_does():
    """And its failure is not lost in the pipe."""
    setup = str(ROOT / "scripts" / "setup.sh")
    code, seen = on_a_terminal(command=("bash", "-c", SETUP, setup))
    assert code == 0 and re.search(r"\rCollecting torch>=2\.5, \d s", seen.replace("\x1b[K", ""))
    assert re.search(r"installing, \d+ packages are there, \d s", seen)
    assert last_lines(seen.replace("\x1b[K", " " * 78 + "\r"))[-1] == "code 3" and "reached" not in seen
    piped = subprocess.run(["bash", "-c", SETUP, setup], capture_output=True, text=True)
    assert (piped.stdout, piped.stderr) == ("code 3\n", "")


@pytest.mark.parametrize(
    "machine, index, said",
    [
        ("Linux x86_64", "pypi.org/simple", True),
        ("Linux x86_64", "x/whl/cpu", False),
        ("Darwin arm64", "", False),
    ],
)
def test_the_download_of_cuda_is_told_where_there_is_one(tmp_path, machine, index, said):
    setup = (ROOT / "scripts" / "setup.sh").read_text().rpartition("\nsetup ")[0]
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/activate").touch()
    (tmp_path / ".venv/bin/python").symlink_to(sys.executable)
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts/setup.sh").write_text(
        f"{setup}\npython() {{ echo \"global.index-url='{index}'\"; }}\nuname() {{ echo {machine}; }}\n"
        "pip_install() { true; }\nfind_nvcc() { true; }\nsetup\n"
    )
    for name in ("requirements.txt", "pyproject.toml"):
        (tmp_path / name).touch()
    done = subprocess.run(["bash", tmp_path / "scripts/setup.sh"], capture_output=True, text=True)
    assert ("about 3 GB" in done.stdout) == said and "installing the requirements" in done.stdout, done


@pytest.fixture
def clock(monkeypatch):
    """A clock that is set by hand, and stderr as a pipe."""
    seconds = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: seconds[0])
    return seconds


def test_a_pipe_gets_a_line_now_and_then(clock, capsys):
    for _ in progress(range(600), "validation", unit="documents"):
        clock[0] += 1.0
    lines = capsys.readouterr().err.splitlines()
    # every ten seconds, later after a tenth of what has passed
    assert lines[0] == "validation:   2%, 10 of 600 documents, 1 documents/s, 10 min left"
    assert 20 < len(lines) < 40 and not any("\r" in line or "[" in line for line in lines)


def test_what_is_short_says_nothing(clock, capsys):
    for _ in progress(range(9), "validation"):
        clock[0] += 1.0
    say("done")
    assert capsys.readouterr() == ("done\n", "")


def test_slow_things_unknown_numbers_and_a_note(clock, capsys):
    with Progress("building", None, "files") as bar:
        clock[0] = 30.0
        bar.update(2, "the second one")
    with Progress("hidden", 3, shown=False) as bar:
        clock[0] = 60.0
        bar.update()
    assert capsys.readouterr().err == "building: 2 files, 15 s each, the second one\n"


def test_a_resumed_run_counts_the_steps_that_it_makes_itself(clock):
    bar = Progress("training", 100, "steps", done=50)
    clock[0] = 10.0
    bar.update(10)
    assert bar.text(10.0) == "training:  60%, 60 of 100 steps, 1 steps/s, 40 s left"


def test_a_merge_and_a_build_are_counted(merging, tmp_path, monkeypatch, capsys):
    from rwkv_miss.__main__ import main
    from src.ops import build, toolchain

    monkeypatch.setattr(module, "LINE", 0.0)
    monkeypatch.setattr(module, "LINE_SHARE", 0.0)
    folder = merging()
    merging.adapter("a.pth")
    main(f"merge --base {folder}/base.pth --adapter {folder}/a.pth --out {folder}/m.pth".split())
    assert "merging: 100%, 0 of 0 MB" in capsys.readouterr().err
    if not shutil.which("c++"):
        pytest.skip("NO C++ COMPILER ON PATH")
    monkeypatch.setenv("RWKV_KERNEL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "one.cpp").write_text("int one() { return 1; }\n")
    build.build("one", "one", 1, [tmp_path / "one.cpp"], [], [toolchain.find_cxx(), "-fPIC"])
    assert "compiling: 100%, 2 of 2 files" in capsys.readouterr().err
