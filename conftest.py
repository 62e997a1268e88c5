"""Options of pytest and the order of the tests, for tests/ and gpu_emulation/."""

import pathlib

import pytest

from rwkv_miss.progress import Progress
from src.ops.toolchain import BuildError, find_nvcc
from tests.budgets import Budgets, read_table

ROOT = pathlib.Path(__file__).parent
pytest_plugins = ["gpu_emulation.drawn_cases"]


def pytest_addoption(parser):
    parser.addoption(
        "--data",
        type=pathlib.Path,
        default=ROOT.parent / "shared" / "data",
        help="the folder of the golden files (default: ../shared/data)",
    )
    parser.addoption(
        "--budgets", choices=["check", "write"], help="CPU seconds of files: see tests/budgets.py"
    )
    parser.addoption(
        "--slice",
        type=int,
        choices=range(10),
        help="the tenth of the tests marked rare that runs; without it all of them run",
    )


def pytest_configure(config):
    if config.getoption("budgets"):
        config.pluginmanager.register(Budgets(config))


def pytest_report_header(config):
    data = config.getoption("data")
    files = (
        f"golden files: {data}"
        if data.is_dir()
        else f"GOLDEN FILES ABSENT ({data}): the tests that need them are skipped"
    )
    try:
        compiler = f"nvcc: {find_nvcc().path}"
    except BuildError as error:
        compiler = f"NVCC ABSENT ({error}): the CUDA kernels are not executed"
    lines = [files, compiler]
    all_files = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    if all_files and config.option.markexpr == FAST:
        lines.append(HOW_LONG)
    if (number := config.getoption("slice")) is not None:
        lines.append(f"tests marked rare: slice {number}, of 0 to 9")
    return lines


# the expression of marks of scripts/test.sh without arguments; a slower CPU takes longer
FAST = "not slow and not rare"
HOW_LONG = "the fast tests take 9 minutes on two idle cores of an EPYC (family 25, model 17)"


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config, items):
    """Leave out the other slices, after -m and -k. Put the files that take longest first, so that no worker
    waits for another one's at the end.
    """
    mark_repeated_values(items)
    yield
    seconds = read_table()
    items.sort(key=lambda item: -seconds.get(item.path.stem, 0.0))
    if (number := config.getoption("slice")) is not None:
        left_out = set(outside_of_slice(items, number))
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]


def mark_repeated_values(items):
    """Mark as rare the cases of a test marked product that bring no value which no case before them has."""
    values_of = {}
    for item in items:
        if item.get_closest_marker("product"):
            known = values_of.setdefault((item.path, item.originalname), set())
            values = {(name, repr(value)) for name, value in item.callspec.params.items()}
            if values <= known:
                item.add_marker("rare")
            known |= values


def outside_of_slice(items, number):
    """List the rare tests of the nine other slices."""
    rare = [item for item in items if item.get_closest_marker("rare")]
    return [item for place, item in enumerate(rare) if place % 10 != number]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(config):
    """Workers collect for 22 s without a word."""
    config.collecting = Progress("collecting the tests").start()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node):
    node.config.collecting.close()


def pytest_terminal_summary(terminalreporter):
    """The tables that tests recorded: what a worker prints is not shown."""
    for report in terminalreporter.getreports("passed"):
        for table in (value for name, value in report.user_properties if name == "table"):
            terminalreporter.write_line(f"\n{report.nodeid}\n{table}")


@pytest.fixture(scope="session")
def data_dir(request):
    """The folder of the golden files, or a loud skip."""
    data = request.config.getoption("data").absolute()
    if not data.is_dir():
        pytest.skip(f"GOLDEN FILES ABSENT: no folder {data}")
    return data
