"""What the benchmarks say of the machine."""

from benchmarks.common import cpu, environment, machine_line

X86 = """processor : 0
model name : AMD EPYC 9R14
cpu family : 25
model : 17
flags : fpu avx2 avx512f avx512_bf16 amx_tile

processor : 1
model name : another
"""
ARM = "processor : 0\nFeatures : fp asimd i8mm bf16\nCPU implementer : 0x41\nCPU part : 0xd4f\n"


def test_a_cpu_is_named_by_what_decides_its_speed(tmp_path):
    path = tmp_path / "cpuinfo"
    path.write_text(X86)
    assert cpu(path) == {
        "name": "AMD EPYC 9R14",
        "family": 25,
        "model": 17,
        "instructions": ["avx2", "avx512f", "avx512_bf16", "amx_tile"],
    }
    path.write_text(ARM)
    found = cpu(path)
    assert found.pop("name") and found == {
        "implementer": 0x41,
        "part": 0xD4F,
        "instructions": ["asimd", "bf16", "i8mm"],
    }
    assert set(cpu(tmp_path / "absent")) == {"name"}
    here = environment()
    assert (
        here["cpu"] == cpu()
        and here["machine"] == machine_line()
        and here["machine"].startswith(cpu()["name"])
    )
