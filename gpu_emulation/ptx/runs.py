"""The rows as tests: `runs` for pytest.mark.parametrize, `check_run` for the test."""

from __future__ import annotations

import functools
from collections.abc import Callable

from tests.conftest import slow

from .cases import GROUPS, run_cases
from .device import Device
from .library import kernels

device_of = functools.cache(Device)


def runs(*groups: str) -> list:
    """List (architecture, group, quick): the quick rows on sm_80; marked slow the others, and
    the quick rows of the newest architecture. python -m gpu_emulation.ptx runs all on any.
    """
    return [
        *[("80", group, True) for group in groups],
        *[slow("80", group, False) for group in groups if group != "model"],  # rows of "model" are quick
        *[slow("120", group, True) for group in groups],
    ]


def check_run(architecture: str, group: str, quick: bool, drawn: Callable[[list[str]], set[str]]) -> None:
    """Run the rows that were drawn. All that are not quick have to run every kernel of the group's source by
    themselves.
    """
    rows = [case for case in GROUPS[group]() if case.quick == quick]
    names = drawn([case.name for case in rows])
    chosen = [case for case in rows if case.name in names]
    device = device_of(architecture)
    problems = run_cases(device, chosen)
    assert not problems, "\n".join(problems)
    source = f"_{len(group) + 3}_{group}_cu_"
    idle = [name for name, counts in kernels(device.library).items() if source in name and not counts[0]]
    assert quick or len(chosen) < len(rows) or not idle, f"kernels that no row launches: {idle}"
