"""Plugin of pytest: all cases of a part run where its gate is open, else a tenth of a file's (gates.py).

It has the fixtures of gpu_emulation/, too. The conftest.py at the root names it, so that --draw and the
header are there whatever files are asked for.
"""

import pathlib
import random

import pytest

from rwkv_miss.errors import UserError
from src.ops.toolchain import BuildError, find_nvcc

from . import gates
from .gates import GATES, Draw

HERE = pathlib.Path(__file__).parent


def pytest_addoption(parser):
    parser.addoption(
        "--draw",
        metavar="NUMBER",
        help="which file, and which tenth of its cases, runs where a gate holds (default: random ones);"
        " all: every case",
    )


def pytest_configure(config):
    given = getattr(config, "workerinput", {}).get("draw") or config.getoption("draw")
    chosen = config.option.draw = given or str(random.SystemRandom().randrange(1 << 32))
    if chosen != "all" and not chosen.isdigit():
        raise pytest.UsageError(f"--draw {chosen}: expected a whole number, or all")
    all_run = chosen == "all" or not asks_for_emulation(config)
    try:
        config.gates_that_hold = {} if all_run else gates.unchanged()  # gate -> its record
    except UserError as error:
        raise pytest.UsageError(str(error)) from None


def asks_for_emulation(config):
    """Tell whether the files or folders of this command line have tests of the emulated GPU."""
    given = [(config.invocation_params.dir / arg.partition("::")[0]).resolve() for arg in config.args]
    return any(path in (HERE, *HERE.parents) or HERE in path.parents for path in given)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    """Give a worker of xdist the number of the process that starts it."""
    node.workerinput["draw"] = node.config.getoption("draw")


def pytest_report_header(config):
    lines = []
    for name in GATES if asks_for_emulation(config) else ():
        kept = config.gates_that_hold.get(name)
        why = (
            "as asked" if config.getoption("draw") == "all" else "what it depends on is not as in record.json"
        )
        lines.append(
            f"emulated GPU, {name}: unchanged since {kept['commit']}, where {kept['cases']} cases passed in"
            f" {kept['seconds']} s; a tenth of a file runs: --draw {config.getoption('draw')}"
            if kept
            else f"emulated GPU, {name}: all cases run, {why}"
        )
    return lines


def gate_of(path):
    """Name the gate of a test file; None for the tests of the gates themselves."""
    return next((name for name, gate in GATES.items() if path in gates.files_of(gate.tests)), None)


@pytest.hookimpl(trylast=True)  # after -m and -k
def pytest_collection_modifyitems(config, items):
    """Leave out what was not drawn: a file, then its cases. A test of rows stays: it draws among its rows."""
    of_file = {path: gate_of(path) for path in {item.path for item in items}}
    left_out = set()
    for name in config.gates_that_hold:
        of_gate = [item for item in items if of_file[item.path] == name]
        files = draw_of(config)([item.path.name for item in of_gate])
        cases = {item: case_of(item) for item in of_gate if item.path.name in files}
        chosen = {"", *draw_of(config)([case for case in cases.values() if case])}
        left_out |= {item for item in of_gate if cases.get(item) not in chosen}
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


def case_of(item) -> str:
    """Name the case of a test: what it is parametrized with, so that several tests share it. "" for rows."""
    if "drawn_rows" in item.fixturenames:
        return ""
    return item.callspec.params.get("case", item.nodeid) if hasattr(item, "callspec") else item.nodeid


def draw_of(config):
    return Draw(int(config.getoption("draw")))


@pytest.fixture
def drawn_rows(request):
    """drawn_rows(names of rows) -> those that run."""

    def drawn(rows):
        held = gate_of(request.path) in request.config.gates_that_hold
        chosen = draw_of(request.config)(rows) if held else set(rows)
        request.node.user_properties.append(("rows", len(chosen)))
        return chosen

    return drawn


@pytest.fixture(scope="session")
def nvcc():
    """Skip loudly where no nvcc compiles the CUDA kernels."""
    try:
        return find_nvcc()
    except BuildError as error:
        pytest.skip(f"NVCC ABSENT: the CUDA kernels are not executed; {error}")


@pytest.fixture
def gpu(nvcc):
    """A card of sm_80 in the place of the CPU: its kernels are executed as PTX (ptx/)."""
    from .ptx.runs import device_of

    device = device_of("80")
    device.clear()
    with device.in_place_of_cuda():
        yield device
    device.check()
