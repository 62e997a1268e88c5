"""The rows as tests: `runs` for pytest.mark.parametrize, `check_run` for the test."""

from __future__ import annotations

import functools

from tests.conftest import slow

from .cases import run_group
from .device import Device
from .library import kernels

device_of = functools.cache(Device)


def runs(*groups: str) -> list:
    """List (architecture, group, quick): the quick rows on sm_80, in the second tier the others.

    The newest architecture has the quick rows in the second tier. python -m tests.ptx runs all on any.
    """
    return [
        *[("80", group, True) for group in groups],
        *[slow("80", group, False) for group in groups if group != "model"],  # its rows are all quick
        *[slow("120", group, True) for group in groups],
    ]


def check_run(architecture: str, group: str, quick: bool) -> None:
    """Run the rows; those that are not quick have to run every kernel of the group's source by themselves."""
    device = device_of(architecture)
    problems = run_group(device, group, quick)
    assert not problems, "\n".join(problems)
    source = f"_{len(group) + 3}_{group}_cu_"
    idle = [name for name, counts in kernels(device.library).items() if source in name and not counts[0]]
    assert quick or not idle, f"kernels that no row launches: {idle}"
