"""The other kernels for GPUs, executed as PTX (tests/ptx), against float64: elementwise functions, loss,
quantised weights, a whole model.
"""

import pytest

from .ptx.runs import check_run, runs


@pytest.mark.parametrize("architecture, group, quick", runs("elementwise", "loss", "quantised", "model"))
def test_rows(nvcc, architecture, group, quick):
    check_run(architecture, group, quick)
