"""The WKV kernels for GPUs, executed as PTX (tests/ptx), against float64."""

import pytest

from .ptx.runs import check_run, runs


@pytest.mark.parametrize("architecture, group, quick", runs("wkv6", "wkv7", "wkv6_chunked", "wkv7_chunked"))
def test_rows(nvcc, architecture, group, quick):
    check_run(architecture, group, quick)
