"""How programs end before they have begun, and when nobody reads them any more."""

import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from rwkv_miss.errors import one_line_errors

from .conftest import ROOT

PROGRAMS = [["train.py"], *(["-m", name] for name in (
    "demo.chat", "demo.verify", "scripts.binidx", "scripts.doctor", "scripts.evaluate", "scripts.lm_eval", "scripts.memory_table", "scripts.plan",
    "scripts.preview", "scripts.verify_merge"))]


def run(program, **options):
    return subprocess.run([sys.executable, *program], cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=100, **options)


def with_torch(folder, code):
    """The environment of a program that finds this torch."""
    (folder / "torch.py").write_text(code)
    return os.environ | {"PYTHONPATH": str(folder)}


@pytest.mark.parametrize("program", PROGRAMS, ids=" ".join)
def test_ctrl_c_while_torch_is_imported(program, tmp_path):
    environment = with_torch(tmp_path, "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n")
    done = run(program, env=environment, stdout=subprocess.DEVNULL)
    # a shell's exit code for it is 130
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


@pytest.mark.parametrize("program", [program for program in PROGRAMS if "scripts.doctor" not in program], ids=" ".join)
def test_without_torch(program, tmp_path):
    done = run(program, env=with_torch(tmp_path, "raise ModuleNotFoundError(name='torch')"), stdout=subprocess.DEVNULL)
    assert done.returncode == 2 and done.stderr.startswith("error: the package torch is not installed for ") and done.stderr.count("\n") == 1
    done = run(program, env=with_torch(tmp_path, "import src.absent"), stdout=subprocess.DEVNULL)
    assert "Traceback" in done.stderr  # that would be a mistake of this project


def test_ctrl_c_is_ignored_where_it_was(tmp_path):
    environment = with_torch(tmp_path, "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nraise ModuleNotFoundError(name='torch')")
    done = run(["train.py"], env=environment, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    assert done.returncode == 2 and "not installed" in done.stderr


@pytest.mark.parametrize("program", [["rwkv_miss", "inspect", "demo/rwkv7-reverse.pth"], ["scripts.doctor"], ["scripts.memory_table"]], ids=" ".join)
def test_a_reader_that_has_gone_ends_the_program_without_a_word(program):
    reader, writer = os.pipe()
    os.close(reader)
    done = run(["-m", *program], stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_terminal_without_the_characters_shows_escapes(tmp_path):
    shutil.copy(ROOT / "demo/rwkv7-reverse.pth", tmp_path / "模型 a.pth")
    done = run(["-m", "rwkv_miss", "inspect", str(tmp_path / "模型 a.pth")], env=os.environ | {"PYTHONIOENCODING": "latin-1"}, stdout=subprocess.PIPE)
    assert done.returncode == 0 and "\\u6a21\\u578b a.pth: " in done.stdout and done.stderr == ""


def test_what_the_machine_refuses_is_one_line_and_a_mistake_of_ours_is_not(tmp_path, capsys):
    path = tmp_path / ("x" * 300)
    with pytest.raises(SystemExit) as stop, one_line_errors():
        open(path)
    assert stop.value.code == 2 and capsys.readouterr().err == f"error: {path}: File name too long\n"
    for allocate in (lambda: torch.empty(2**50), lambda: bytearray(2**62)):
        with pytest.raises(SystemExit) as stop, one_line_errors():
            allocate()
        assert stop.value.code == 2 and re.fullmatch(r"error: memory ran out:.*\n", capsys.readouterr().err)
    with pytest.raises(FileNotFoundError), one_line_errors():
        open(tmp_path / "absent")
    with pytest.raises(RuntimeError, match="size mismatch|must match"), one_line_errors():
        torch.ones(2) + torch.ones(3)


def test_torch_keeps_few_prepared_shapes():
    """More than 300 MB were kept for 1024 of them."""
    code = """
import sys
from src.doorway import importing
with importing():
    import torch
    from rwkv_miss import gemm
gemm.SMALL = 1
resident = lambda: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))
weight = torch.randn(96, 96)
gemm.product(torch.randn(200, 96), weight)
before = resident()
for rows in range(201, 701):
    gemm.product(torch.randn(rows, 96), weight)
print(resident() - before)
"""
    grown = run(["-c", code], stdout=subprocess.PIPE).stdout
    assert int(grown) < 120_000, f"{grown} kB"


def test_waiting_threads_sleep_unless_the_user_says_otherwise():
    code = "import os\nfrom src.doorway import importing\nwith importing(): pass\nprint(os.environ['OMP_WAIT_POLICY'])"
    for given, found in (({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active")):
        environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"} | given
        assert run(["-c", code], stdout=subprocess.PIPE, env=environment).stdout.strip() == found
