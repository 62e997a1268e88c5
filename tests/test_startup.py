"""Programs that end before they have begun, or when nobody reads them any more."""

import ast
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from demo import task
from rwkv_miss.errors import one_line_errors
from src.common import startup

from . import program
from .conftest import ROOT, slow

MODULES = """
    demo.accuracy demo.chat demo.loop rwkv_miss scripts.binidx scripts.doctor scripts.evaluate scripts.export
    scripts.lm_eval scripts.lr_sweep scripts.memory_table scripts.plan scripts.preview scripts.verify_merge
"""
PROGRAMS = [["train.py"], *(["-m", name] for name in MODULES.split())]


def run(program, **options):
    return subprocess.run(
        [sys.executable, *program], cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=100, **options
    )


def with_torch(folder, code):
    """The environment of a program that finds this torch."""
    (folder / "torch.py").write_text(code)
    return os.environ | {"PYTHONPATH": str(folder)}


@pytest.mark.parametrize("program", PROGRAMS, ids=" ".join)
def test_ctrl_c_while_torch_is_imported(program, tmp_path):
    environment = with_torch(
        tmp_path, "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"
    )
    done = run(program, env=environment, stdout=subprocess.DEVNULL)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


INTERRUPTED = {
    "import": "import lazy",
    "import that catches all": "try: import lazy\n    except BaseException: pass",
    "destructor": "del dying",
    "work": "os.kill(os.getpid(), signal.SIGINT); time.sleep(60)",
}


@pytest.mark.parametrize("where", INTERRUPTED)
def test_ctrl_c_is_not_lost(where, tmp_path):
    """An interrupt that an import catches, or one in a destructor, which Python only prints, went unnoticed.
    Otherwise work may tidy up.
    """
    (tmp_path / "lazy.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(0.01)\n"
    )
    code = f"""
import os, signal, sys, time
from rwkv_miss.errors import one_line_errors
sys.path.insert(0, {str(tmp_path)!r})
class Dying:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
dying = Dying()
with one_line_errors():
  try:
    {INTERRUPTED[where]}
    print("went on")
  finally:
    print("tidied up")
"""
    process = program.CONTEXT.Process(target=program.logged, args=(tmp_path / "log", exec, code, {}))
    process.start()
    process.join(60)
    assert process.exitcode == 130
    assert (tmp_path / "log").read_text() == (
        "tidied up\ninterrupted\n" if where == "work" else "interrupted\n"
    )


BASE = "demo/rwkv7-reverse.pth"
# sitecustomize.py, which Python imports before a program: Ctrl-C when a module is about to be imported
AT_IMPORT = """
import os, signal, sys
def hook(event, args):
    if event == "import" and args[0] == os.environ["INTERRUPTED_AT"]:
        os.killpg(0, signal.SIGINT)
sys.addaudithook(hook)
"""


def training(folder):
    """Arguments of a run that does not end by itself; its data are written to the folder."""
    task.write(str(folder / "data.jsonl"), task.rows("sort", 500, seed=1))
    sizes = "--micro_bsz 2 --ctx_len 64 --epoch_steps 1000000 --resume auto".split()
    files = ["--data_file", str(folder / "data.jsonl"), "--proj_dir", str(folder / "run")]
    return ["train.py", "--load_model", BASE, *sizes, *files]


def end_of(arguments):
    """Describe what is wrong with the end of a program that Ctrl-C is about to reach; "" if nothing is."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )
    try:
        _, error = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return "Ctrl-C was not heard in 60 s"
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
        return "processes were left"
    if process.returncode == 130 and len(error.split("\n")) == 2 + error.startswith("\n"):
        return ""
    return f"exit code {process.returncode}, stderr:\n{error}"


@pytest.mark.parametrize(
    "program, module",
    [
        pytest.param("train", "torch.nn", marks=pytest.mark.rare),
        pytest.param("train", "torch._dynamo", marks=pytest.mark.rare),  # in the count of a step's memory
        slow("train", "lightning.pytorch"),
        ("train", "src.training.trainer"),  # all is imported
        ("inspect", "rwkv_miss.methods.lora"),
    ],
)
def test_ctrl_c_at_any_moment_of_a_start(program, module, tmp_path, monkeypatch):
    """Ctrl-C goes to all processes of the program, as a terminal sends it. Signals of later moments are sent
    in test_run_plan and test_crashes.
    """
    arguments = training(tmp_path) if program == "train" else ["-m", "rwkv_miss", "inspect", BASE]
    (tmp_path / "sitecustomize.py").write_text(AT_IMPORT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("INTERRUPTED_AT", module)
    assert end_of(arguments) == ""


@pytest.mark.parametrize(
    "program", [program for program in PROGRAMS if "scripts.doctor" not in program], ids=" ".join
)
def test_without_torch(program, tmp_path):
    done = run(
        program,
        env=with_torch(tmp_path, "raise ModuleNotFoundError(name='torch')"),
        stdout=subprocess.DEVNULL,
    )
    assert done.returncode == 2 and done.stderr.startswith("error: the package torch is not installed for ")
    assert done.stderr.count("\n") == 1
    done = run(program, env=with_torch(tmp_path, "import src.absent"), stdout=subprocess.DEVNULL)
    assert "Traceback" in done.stderr  # that would be a mistake of this project


def test_the_library_without_torch_leaves_the_error_to_its_user(tmp_path):
    environment = with_torch(tmp_path, "raise ModuleNotFoundError(name='torch')")
    code = "try: import rwkv_miss\nexcept ModuleNotFoundError as error: print(error.name)"
    assert run(["-c", code], env=environment, stdout=subprocess.PIPE).stdout == "torch\n"


RUN_AS_MODULES = [
    path.relative_to(ROOT)
    for folder in ("scripts", "demo")
    for path in sorted((ROOT / folder).glob("*.py"))
    if '__name__ == "__main__"' in path.read_text()
    and path.stem not in ("rooms", "task")  # which need no other file
]


@pytest.mark.parametrize("path", RUN_AS_MODULES, ids=lambda path: path.stem)
def test_a_program_that_is_started_by_its_path(path):
    done = run([str(path)])
    assert done.returncode
    assert done.stderr == (
        f"error: run this from the repository's folder as python -m {path.parent}.{path.stem}\n"
    )


def test_ctrl_c_is_ignored_where_it_was(tmp_path):
    environment = with_torch(
        tmp_path,
        "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nraise ModuleNotFoundError(name='torch')",
    )
    done = run(["train.py"], env=environment, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    assert done.returncode == 2 and "not installed" in done.stderr


@pytest.mark.parametrize(
    "program",
    [
        ["rwkv_miss", "inspect", "demo/rwkv7-reverse.pth"],
        slow(["scripts.doctor"]),
        slow(["scripts.memory_table"]),
    ],
    ids=" ".join,
)
def test_a_reader_that_has_gone_ends_the_program_without_a_word(program):
    reader, writer = os.pipe()
    os.close(reader)
    done = run(["-m", *program], stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_terminal_without_the_characters_shows_escapes(tmp_path):
    shutil.copy(ROOT / "demo/rwkv7-reverse.pth", tmp_path / "模型 a.pth")
    done = run(
        ["-m", "rwkv_miss", "inspect", str(tmp_path / "模型 a.pth")],
        env=os.environ | {"PYTHONIOENCODING": "latin-1"},
        stdout=subprocess.PIPE,
    )
    assert done.returncode == 0 and "\\u6a21\\u578b a.pth: " in done.stdout and done.stderr == ""


def test_what_the_machine_refuses_is_one_line_and_a_mistake_of_ours_is_not(tmp_path, capsys):
    path = tmp_path / ("x" * 300)
    with pytest.raises(SystemExit) as stop, one_line_errors():
        open(path)
    assert stop.value.code == 2 and capsys.readouterr().err == f"error: {path}: File name too long\n"
    for allocate in (lambda: torch.empty(2**50), lambda: bytearray(2**62)):
        with pytest.raises(SystemExit) as stop, one_line_errors():
            allocate()
        assert stop.value.code == 2 and re.fullmatch(
            r"error: memory ran out(: .+)?\n", capsys.readouterr().err
        )
    with pytest.raises(FileNotFoundError), one_line_errors():
        open(tmp_path / "absent")
    with pytest.raises(RuntimeError, match="size mismatch|must match"), one_line_errors():
        torch.ones(2) + torch.ones(3)


def test_torch_keeps_few_prepared_shapes():
    """More than 300 MB were kept for 1024 of them."""
    code = """
import sys
from src.common.startup import importing
with importing():
    import torch
    from rwkv_miss import gemm
gemm.SMALL = 1
def resident():
    lines = open("/proc/self/status")
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
weight = torch.randn(96, 96)
gemm.product(torch.randn(200, 96), weight)
before = resident()
for rows in range(201, 701):
    gemm.product(torch.randn(rows, 96), weight)
print(resident() - before)
"""
    grown = run(["-c", code], stdout=subprocess.PIPE).stdout
    assert int(grown) < 120_000, f"{grown} kB"


def test_the_peak_of_memory_is_without_mapped_files(tmp_path):
    """200 MB are mapped, and 300 MB of its own are given back."""
    code = """
import sys, torch
from src.common.device import mapped_files, peak_memory
def measured():
    return peak_memory(torch.device("cpu")), mapped_files()
before = measured()
file = torch.from_file(sys.argv[1], size=200_000_000, dtype=torch.uint8)
file[::4096].sum()
torch.ones(300_000_000, dtype=torch.uint8)
print(*(after - b for after, b in zip(measured(), before)))
"""
    (tmp_path / "file").write_bytes(bytes(200_000_000))
    private, mapped = map(int, run(["-c", code, tmp_path / "file"], stdout=subprocess.PIPE).stdout.split())
    assert 290e6 < private < 360e6 and 190e6 < mapped < 260e6, (private, mapped)


def test_waiting_threads_sleep_unless_the_user_says_otherwise():
    code = (
        "import os\nfrom src.common.startup import importing\nwith importing():"
        " pass\nprint(os.environ['OMP_WAIT_POLICY'])"
    )
    for given, found in (({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active")):
        environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"} | given
        assert run(["-c", code], stdout=subprocess.PIPE, env=environment).stdout.strip() == found


def test_an_old_python_is_named_before_a_package(monkeypatch, capsys):
    monkeypatch.setattr(startup.sys, "version_info", (3, 8, 10))
    with pytest.raises(SystemExit, match="2"), startup.importing():
        raise AssertionError("imports are not tried")
    assert capsys.readouterr().err.startswith(
        "error: Python 3.8 is too old, 3.10 or newer is needed; here it is "
    )


MODULES = [words[-1] for words in PROGRAMS[1:] if words[-1] != "rwkv_miss"]


@pytest.mark.parametrize(
    "path", ["train.py", "src/common/startup.py", *(name.replace(".", "/") + ".py" for name in MODULES)]
)
def test_an_old_python_can_read_a_program_as_far_as_that(path):
    ast.parse((ROOT / path).read_text(), feature_version=(3, 8))
