"""benchmarks.sass_report counts what a listing of nvdisasm says, which is written here by hand."""

import pytest

from benchmarks import sass_report

SOURCE = """\
kernel() {
    load();
    if (n == 0) one_warp();
    if (resets) {
        skipped();
    }
    for (int step = 0; step < segment.count; step++)
        if (n == 1) work();
    store();
}
"""
# (line of the source, instruction), or a label
CODE = [
    (2, "LDG.E.64 R4, [R2]"),
    (3, "FMUL R1, R2, R3"),
    (4, "ISETP.NE.AND P0, PT, R1, RZ, PT"),
    (5, "FADD R1, R2, R3"),
    ".L_x_0",
    (8, "HMMA.16816.F32.BF16 R4, R8, R2, R4"),
    (7, "@P0 BRA `(.L_x_0)"),
    (9, "STG.E.EF.64 [R2], R4"),
    (9, "EXIT"),
    ".L_x_1",
    (9, "BRA `(.L_x_1)"),
    (9, "NOP"),
]


def listing(path):
    lines = [".text.kernel:"]
    for i, item in enumerate(CODE):
        if isinstance(item, str):
            lines.append(f"{item}:")
        else:
            lines += [f'\t//## File "{path}", line {item[0]}', f"        /*{16 * i:04x}*/    {item[1]} ;"]
    return "\n".join(lines)


def test_loops_warps_and_branches_have_their_weight(tmp_path):
    path = tmp_path / "kernel.cu"
    path.write_text(SOURCE)
    (kernel,) = sass_report.functions(listing(path))
    assert kernel.loops == [(4, 5)], "the branch to itself after the end is none"
    found = sass_report.count(kernel, sass_report.Source(), chunks=16)
    # LDG, a quarter of FMUL, ISETP, no FADD, 16 times a quarter of HMMA and BRA, STG, EXIT
    assert found["instructions"] == 1 + 0.25 + 1 + 16 * (0.25 + 1) + 1 + 1
    assert found["static"] == 8
    assert (found["read"], found["written"]) == (32 * 8, 32 * 8)
    assert found["stores"] == {"2": 0, "4": 0, "8": 1, "16": 0}


def test_an_unknown_loop_is_an_error(tmp_path):
    path = tmp_path / "kernel.cu"
    path.write_text(SOURCE.replace("step < segment.count", "step < other"))
    (kernel,) = sass_report.functions(listing(path))
    with pytest.raises(RuntimeError, match="step < other"):
        sass_report.count(kernel, sass_report.Source(), chunks=16)
