"""The doctor as a user runs it, with things missing; gpu_check.sh up to the GPU, and the record it leaves for
the doctor.
"""

import argparse
import contextlib
import json
import os
import pathlib
import platform
import re
import subprocess
import sys
import time
import types

import pytest
import torch

from benchmarks import gpu_budget, gpu_numerics, step
from benchmarks import ops as op_benchmark
from benchmarks.common import precision_on
from rwkv_miss.errors import UserError
from scripts import doctor, gpu_record
from src import ops
from src.common import device
from src.config import Config
from src.model import rwkv7
from src.ops import build, self_test, toolchain
from src.ops.launch_errors import LaunchError
from src.planning.plan import device_here

ROOT = pathlib.Path(__file__).parent.parent


def run(*arguments, python=(sys.executable,), **environment):
    return subprocess.run(
        [*python, "-m", "scripts.doctor", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | environment,
        timeout=120,
    )


def lines(done):
    """name -> (state, text); every line but the last has a state."""
    *checks, verdict = done.stdout.splitlines()
    assert verdict.startswith("training "), done.stdout + done.stderr
    split = [(line[:8].strip(), line[9:27].strip(), line[28:]) for line in checks]
    assert all(state in ("ok", "warn", "missing") and name and text for state, name, text in split), (
        done.stdout
    )
    return {name: (state, text) for state, name, text in split}


def test_json_is_one_object_and_says_the_same_as_the_lines():
    plain, as_json = run(), run("--json")
    assert plain.returncode == as_json.returncode == 0, plain.stdout + plain.stderr
    assert as_json.stdout.count("\n") == 1
    facts = json.loads(as_json.stdout)
    assert facts["works"] is True and plain.stdout.splitlines()[-1] == "training works here"
    assert {check["name"]: check["state"] for check in facts["checks"]} == {
        name: state for name, (state, _) in lines(plain).items()
    }
    names = [check["name"] for check in facts["checks"]]
    assert len(set(names)) == len(names)
    wanted = {
        "Python",
        "torch",
        "lightning",
        "deepspeed",
        "ninja",
        "C++ compiler",
        "RAM",
        "working folder",
        "kernel cache",
        "kernels, cpu",
        "--wkv auto, cpu",
    }
    of_gpus = {"nvcc", "driver", "CUDA of torch", *doctor.CUDA_KERNELS}
    if device.driver_version() is None:  # one line is enough where there is none
        assert not of_gpus & set(names) and names.count("GPU") == 1 and " GPU  " in plain.stdout
    else:
        wanted |= of_gpus
    assert wanted <= set(names)


def test_json_is_alone_on_stdout_whatever_is_printed_meanwhile(monkeypatch, capsys):
    def examine():
        print("a library that says hello")
        yield doctor.Check("missing", "all", "text", needed=True)

    monkeypatch.setattr(doctor, "examine", examine)
    monkeypatch.setattr(sys, "argv", ["doctor", "--json"])
    with pytest.raises(SystemExit) as stopped:
        doctor.main()
    printed = capsys.readouterr()
    assert stopped.value.code == 1 and json.loads(printed.out)["works"] is False
    assert printed.err == "a library that says hello\n"


def test_without_tools_training_works_and_each_line_has_the_fix(tmp_path):
    done = run(PATH=str(tmp_path), CUDA_HOME="", RWKV_KERNEL_CACHE=str(tmp_path / "cache"))
    checks = lines(done)
    assert done.returncode == 0, done.stdout + done.stderr
    assert checks["C++ compiler"][0] == "missing" and "apt install g++" in checks["C++ compiler"][1]
    assert checks["GPU"][0] == "ok" and "ubuntu-drivers install" in checks["GPU"][1]
    assert checks["kernels, cpu"][0] == "missing" and "apt install g++" in checks["kernels, cpu"][1]
    assert checks["--wkv auto, cpu"][0] == "ok" and checks["--wkv auto, cpu"][1].startswith("torch:")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "release, said",
    [("6.6.87.2-microsoft-standard-WSL2", "Windows"), ("6.12.0-amd64", "ubuntu-drivers install")],
)
def test_a_driver_comes_from_windows_in_wsl(monkeypatch, release, said):
    monkeypatch.setattr(platform, "release", lambda: release)
    monkeypatch.setattr(device, "driver_version", lambda: None)
    driver = next(check for check in doctor.gpus(torch) if check.name == "driver")
    too_old = LaunchError("wkv7", 35)
    assert said in driver.text and said in str(too_old) and too_old.of_the_machine


def test_without_packages_training_does_not_work():
    done = run(python=(sys.executable, "-S"))  # without site-packages
    checks = lines(done)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    for name, fix in {
        "torch": 'pip install "torch>=2.5"',
        "lightning": 'pip install "lightning>=2.4"',
    }.items():
        assert checks[name][0] == "missing" and fix in checks[name][1]
    assert "does not work here: torch, lightning" in done.stdout
    assert json.loads(run("--json", python=(sys.executable, "-S")).stdout)["works"] is False


def test_packages_that_are_optional_or_too_old(monkeypatch):
    versions = {"torch": "2.4.1+cu121", "lightning": "2.10.0", "numpy": "1.26"}

    def version(name):
        if name not in versions:
            raise doctor.importlib.metadata.PackageNotFoundError
        return versions[name]

    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    monkeypatch.setattr(doctor.sys, "platform", "linux")
    checks = {check.name: check for check in doctor.packages()}
    assert checks["torch"].fatal and "2.4.1+cu121 is too old" in checks["torch"].text
    assert 'pip install "torch>=2.5"' in checks["torch"].text
    assert checks["lightning"].state == checks["numpy"].state == "ok"
    assert checks["deepspeed"].state == "missing" and not checks["deepspeed"].fatal
    assert "--strategy" in checks["deepspeed"].text
    assert checks["pyyaml"].fatal
    monkeypatch.setattr(doctor.sys, "platform", "win32")
    assert "deepspeed" not in {check.name for check in doctor.packages()}


@pytest.mark.parametrize(
    "version, state", [((3, 9, 1), "missing"), ((3, 10, 0), "ok"), ((3, 14, 2), "ok"), ((3, 15, 0), "warn")]
)
def test_versions_of_python(monkeypatch, version, state):
    monkeypatch.setattr(doctor.sys, "version_info", version)
    assert doctor.python().state == state and doctor.python().fatal == (state == "missing")


def test_disks(monkeypatch, tmp_path):
    monkeypatch.setattr(
        doctor.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1.5 * doctor.GIB)
    )
    assert doctor.disk("cache", tmp_path / "not" / "made", 1, "fix it") == (
        "ok",
        "cache",
        f"1.5 GiB free in {tmp_path}/not/made",
        False,
    )
    assert doctor.disk("cache", tmp_path, 2, "fix it") == (
        "warn",
        "cache",
        f"1.5 GiB free in {tmp_path}; fix it",
        False,
    )
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    assert doctor.disk("cache", tmp_path, 1, "fix it").text.endswith("which may not be written; fix it")


def fake_torch(capabilities=(), cuda="13.0"):
    """As much of torch as the GPU lines read."""
    names = {(9, 0): "NVIDIA H100", (7, 0): "Tesla V100"}
    functions = types.SimpleNamespace(
        is_available=lambda: bool(capabilities),
        device_count=lambda: len(capabilities),
        get_device_capability=lambda i: capabilities[i],
        get_device_name=lambda i: names[capabilities[i]],
        get_device_properties=lambda i: types.SimpleNamespace(total_memory=80 * doctor.GIB),
    )
    return types.SimpleNamespace(
        cuda=functions, version=types.SimpleNamespace(cuda=cuda), __version__="2.13.0"
    )


def test_gpus(monkeypatch):
    monkeypatch.setattr(device, "driver_version", lambda: "580.65")
    monkeypatch.setattr(device, "cuda_of_driver", lambda: 13000)
    checks = {check.name: check for check in doctor.gpus(fake_torch([(9, 0), (7, 0)]))}
    assert checks["driver"].text == "580.65, for CUDA up to 13.0" and checks["CUDA of torch"].text == "13.0"
    assert checks["GPU 0"][:3] == ("ok", "GPU 0", "NVIDIA H100, architecture 90, 80 GiB")
    assert checks["GPU 1"].state == "warn" and "--wkv torch" in checks["GPU 1"].text and "GPU" not in checks

    checks = {check.name: check for check in doctor.gpus(fake_torch())}
    assert checks["GPU"].state == "missing" and checks["GPU"].text.startswith("torch sees none")
    checks = {check.name: check for check in doctor.gpus(fake_torch(cuda=None))}
    assert checks["CUDA of torch"].state == "missing"
    assert "pip install --force-reinstall torch" in checks["CUDA of torch"].text
    assert not any(check.fatal for check in checks.values())


@pytest.mark.parametrize(
    "driver, of_torch, said",
    [
        ("570.133.20", "13.2", "driver 570.133.20 does not run torch's CUDA 13.2: pip install"),
        ("570.133.20", "13.2", "--index-url https://download.pytorch.org/whl/cu128"),
        ("550.54.15", "13.2", "--index-url https://download.pytorch.org/whl/cu126"),
        ("535.104.05", "12.8", "nvidia-smi -L and CUDA_VISIBLE_DEVICES"),
        ("470.57.02", "13.2", "update the driver"),
        ("580.65.06", "13.2", "nvidia-smi -L and CUDA_VISIBLE_DEVICES"),
        ("580.65.06", None, "is for CPUs: pip install --force-reinstall torch"),
        ("No devices were found", "13.2", ""),
    ],
)
def test_a_gpu_that_torch_does_not_see_stops_auto_with_the_wheel_that_fits(
    tmp_path, monkeypatch, driver, of_torch, said
):
    stub(tmp_path, "nvidia-smi", f"echo '{driver}'")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", of_torch)
    assert device.choose_accelerator("cpu") == "cpu"
    if not said:
        assert device.choose_accelerator("auto") == "cpu"
        return
    with pytest.raises(UserError) as stopped:
        device.choose_accelerator("auto")
    assert said in str(stopped.value) and "--accelerator cpu" in str(stopped.value)
    assert "toolkit" not in toolchain.how_to_install("12.8") and said in toolchain.how_to_install("12.8")
    seen_by_doctor = next(check for check in doctor.gpus(torch) if check.name == "GPU")
    assert seen_by_doctor.state == "missing" and said in seen_by_doctor.text
    found = device_here(Config(accelerator="cpu", wkv="torch"), 64)
    assert said in found.unseen
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the user hides it
    assert device.choose_accelerator("auto") == "cpu"


def test_nvcc_and_the_cuda_that_it_is_of(monkeypatch):
    monkeypatch.setattr(toolchain, "find_nvcc", lambda: toolchain.Nvcc("/x/nvcc"))
    monkeypatch.setattr(toolchain, "ask", lambda path: toolchain.Release("13.0", (90,)))
    assert doctor.nvcc() == doctor.Check("ok", "nvcc", "/x/nvcc, CUDA 13.0")

    def find_nvcc():
        raise toolchain.BuildError("no nvcc that fits: this driver runs CUDA up to 12.8")

    monkeypatch.setattr(toolchain, "find_nvcc", find_nvcc)
    assert doctor.nvcc().state == "missing" and doctor.nvcc().text.startswith("no nvcc that fits")


def test_kernels_are_tested_on_each_kind_of_gpu(monkeypatch):
    kinds, current = ["H100", "H100", "T4"], []
    cuda = types.SimpleNamespace(
        device_count=lambda: 3, device=lambda i: contextlib.nullcontext(current.append(kinds[i]))
    )
    monkeypatch.setattr(self_test, "card", lambda: current[-1])
    monkeypatch.setattr(doctor, "kernels", lambda device, where: [(device + where, current[-1])])
    found = list(doctor.kernels_of_gpus(types.SimpleNamespace(cuda=cuda)))
    assert found == [("cuda", "H100"), ("cuda on GPU 2", "T4")]


def test_kernels_that_fail_their_self_test(monkeypatch):
    status = self_test.Status(
        built=True,
        passed=False,
        path="/cache/wkv_cpu.so",
        seconds=1.0,
        error=0.5,
        reason="the self-test fails",
    )
    monkeypatch.setattr(self_test, "status", lambda device: status)
    kernel, auto = doctor.kernels("cpu")
    assert kernel.state == "warn" and "not used: the self-test fails; --wkv torch works" in kernel.text
    assert auto.state == "ok" and auto.text.startswith("torch:")


ERRORS = {"wkv7 cuda": {"float32": 1e-6, "bfloat16": 3e-3}}
RECORD = {"card": "NVIDIA H100", "date": "2025-11-02", "commit": "abc1234", "errors": ERRORS, "failures": []}


@pytest.fixture
def records(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "RECORDS", tmp_path)
    monkeypatch.setattr(gpu_record, "RECORDS", tmp_path)

    def write(name="a", **changes):
        (tmp_path / f"{name}.json").write_text(
            json.dumps(RECORD | {"sources": build.cuda_sources()} | changes)
        )
        return {check.name: check for check in doctor.evidence()}

    return write


def test_kernels_and_the_cards_they_ran_on(records):
    checks = records()
    assert checks["wkv7 cuda"].state == "ok"
    assert (
        "run on NVIDIA H100, 2025-11-02, commit abc1234, worst errors float32 1.0e-06, bfloat16 3.0e-03"
        in checks["wkv7 cuda"].text
    )
    assert checks["wkv6 cuda"].state == "warn"
    assert "not run on a GPU yet: bash scripts/gpu_check.sh" in checks["wkv6 cuda"].text
    assert "compiled for sm_75" in checks["wkv6 cuda"].text
    checks = records(failures=["racecheck: exit code 1"])
    assert checks["wkv7 cuda"].state == "warn"
    assert "failed there: racecheck: exit code 1" in checks["wkv7 cuda"].text
    checks = records(sources="of another day")
    assert checks["wkv7 cuda"].state == "warn" and "have changed since" in checks["wkv7 cuda"].text


def test_two_cards_are_two_lines_the_newest_first(records):
    records("a")
    records("b", card="NVIDIA L4", date="2025-11-03")
    cards = [
        check.text.partition("run on ")[2].partition(",")[0]
        for check in doctor.evidence()
        if check.name == "wkv7 cuda"
    ]
    assert cards == ["NVIDIA L4", "NVIDIA H100"]


ROWS = [{"shape": "8,4096,2048", "form": "wkv7 cuda", "ms": 3.42}]
STEP = {"micro_bsz": 8, "ctx_len": 1024, "rows": {"miss": {"seconds": 0.2}, "peft miss": {"seconds": 0.5}}}
PUBLISHED = {"micro_bsz": 16, "ctx_len": 512, "rows": {"none": {"seconds": 0.1}}}
STEPS = {
    "ptx": ("sm_90: 171 of 171 kernels ran, 93 of their 100 instructions\n0 findings\n", 0),
    "build": ("Status(built=True)\n", 0),
    "tests": ("..\nSKIPPED [5] tests/test_gpu.py:170: ONE GPU: nothing\n=== 9 passed in 3.1s ===\n", 0),
    "numerics": (
        (
            'wkv7 cuda float32 y 1e-7\n{"errors": {"wkv7 cuda": {"float32": 1}}, "failures": ["wkv7 y:'
            ' 1e+00"]}\n'
        ),
        0,
    ),
    "memcheck": ("========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n", 0),
    "racecheck": ("========= COMPUTE-SANITIZER\n", 124),
    "initcheck": ("========= ERROR SUMMARY: 0 errors\n", 0),
    "synccheck": ("========= ERROR SUMMARY: 0 errors\n", 0),
    "wkv": ("table\n" + json.dumps({"benchmark": "wkv", "rows": ROWS}) + "\n", 0),
    "training": (json.dumps(STEP) + "\n", 0),
    "others": (json.dumps({"rows": {"fla": {"of_miss": 1.5}, "compiled": {"out_of_memory": True}}}), 0),
    "published": (json.dumps(PUBLISHED) + "\n", 0),
    "decode": ('{"rows": [{"name": "base, one CUDA graph a token", "tokens_per_second": 210.4}]}\n', 0),
    "sizes": ('{"rows": []}\n{"rows": [1]}\nrow 2\n{"rows": [1, ', 1),
    "ncu": ("not measured: ncu is not installed\n", 0),
}


@pytest.fixture
def recorded(records, tmp_path, monkeypatch):
    """recorded(steps) -> (exit code, the record) of a run of gpu_check with these outputs and exit codes."""
    import torch

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(device, "driver_version", lambda: "580.65")
    monkeypatch.setattr(toolchain, "find_nvcc", lambda: toolchain.Nvcc("nvcc"))
    monkeypatch.setattr(toolchain, "ask", lambda path: toolchain.Release("13.0", (90,)))
    logs = tmp_path / "logs"
    logs.mkdir()

    def run(steps):
        for name, (output, code) in steps.items():
            (logs / name).write_text(output)
            (logs / f"{name}.code").write_text(f"{code} 3 80\n")
        with pytest.raises(SystemExit) as stopped:
            gpu_record.write_record(logs)
        (path,) = tmp_path.glob("*.json")
        record = json.loads(path.read_text())
        assert path.name == f"nvidia-h100-80gb-hbm3-{record['date']}.json"
        return stopped.value.code, record

    return run


def test_the_record_of_a_run(recorded, capsys):
    code, record = recorded(STEPS)
    said = capsys.readouterr().out
    assert code == 1 and "racecheck: stopped after 80 s" in said
    failures = ["racecheck: stopped after 80 s", "sizes: exit code 1", "wkv7 y: 1e+00"]
    assert record["failures"] == failures and record["tests"] == "9 passed in 3.1s"
    assert record["not_tested"] == ["SKIPPED [5] tests/test_gpu.py:170: ONE GPU: nothing"]
    passed = dict.fromkeys(("memcheck", "initcheck", "synccheck"), "ERROR SUMMARY: 0 errors")
    assert record["sanitizer"] == {**passed, "racecheck": "no verdict"}
    assert record["wkv"] == {"benchmark": "wkv", "rows": ROWS} and record["training"] == STEP
    assert record["ptx"] == "sm_90: 171 of 171 kernels ran, 93 of their 100 instructions; 0 findings"
    assert record["architecture"] == "90" and record["nvcc"] == "13.0" and record["seconds"]["wkv"] == 3
    assert record["sizes"] == {"rows": [1]}, "what was measured until it was stopped"
    assert record["ncu"] == "not measured: ncu is not installed"
    assert "failed there: racecheck" in next(
        check.text for check in doctor.evidence() if check.name == "wkv7 cuda"
    )
    (path,) = doctor.RECORDS.glob("*.json")
    assert f"send {path} and the table above, also if something failed:" in said
    assert "an issue or a pull request at" in said
    assert "a step with flash-linear-attention's WKV: 1.50 x the time of ours" in said
    assert "torch.compile" not in said
    row = said.splitlines()[3]
    assert row.startswith("| NVIDIA H100 80GB HBM3 | failed: racecheck: stopped after 80 s; sizes")
    predicted = json.loads(gpu_budget.PREDICTIONS.read_text())
    assert row.endswith(
        f"| 1e+00 / - | 3.4 ms | 200 ms, 40,960 tokens/s, {40960 / predicted['training']['h100']:.2f} of the"
        " predicted | 2.50 x the time | 100 ms, 81,920 tokens/s,"
        f" {81920 / predicted['published']['h100']:.2f} of the predicted | 210 tokens/s |"
    )


def test_a_run_in_which_all_passed(recorded, capsys):
    good = {name: (output, 0) for name, (output, _) in STEPS.items()}
    good["numerics"] = ('{"errors": {"wkv7 cuda": {"float32": 1e-6, "bfloat16": 3e-3}}, "failures": []}', 0)
    code, record = recorded(good)
    assert code == 0 and record["failures"] == [] and "| all passed (" in capsys.readouterr().out


def test_the_readme_has_the_table_of_all_cards():
    assert gpu_record.table(doctor.records()) in (ROOT / "README.md").read_text()


def test_figures_of_ncu():
    name = "_ZN47_GLOBAL__N__26f4018f_15_wkv7_chunked_cu_a837933e4scanI13__nv_bfloat16S1_EEvPKT_"
    rows = [
        ("gpu__time_duration.sum", "ns", "1,500,000"),
        ("gpu__time_duration.sum", "us", "1,700.0"),
        ("dram__throughput.avg.pct_of_peak_sustained_elapsed", "%", "61.25"),
        ("sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active", "%", "n/a"),
        ("launch__registers", "", "128"),
    ]
    lines = ['==PROF== Connected\n"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"']
    lines += [f'"{i}","{name}","{metric}","{unit}","{value}"' for i, (metric, unit, value) in enumerate(rows)]
    found = gpu_record.kernel_figures("\n".join(lines))
    assert found == {"wkv7_chunked scan": {"us": 1600.0, "dram_percent": 61.2}}
    assert gpu_record.kernel_figures("==ERROR== ERR_NVGPUCTRPERM") == {}


def numerics(monkeypatch, capsys):
    """Exit code and last line of gpu_numerics, with the plain form in the place of a CUDA kernel."""
    monkeypatch.setattr(sys, "argv", ["gpu_numerics", "--small", "--device", "cpu", "--kernels", "torch"])
    monkeypatch.setattr(gpu_numerics, "SMALL", gpu_numerics.FEW)
    with pytest.raises(SystemExit) as stopped:
        gpu_numerics.main()
    return stopped.value.code, json.loads(capsys.readouterr().out.splitlines()[-1])


def test_numerics_of_a_right_kernel(monkeypatch, capsys):
    code, found = numerics(monkeypatch, capsys)
    assert code == 0 and found["failures"] == []
    assert set(found["errors"]) == {"wkv6 torch", "wkv7 torch"}
    assert all(
        errors["float32"] < 1e-6 and 1e-4 < errors["float16"] < errors["bfloat16"] < 4e-3
        for errors in found["errors"].values()
    )


@pytest.mark.parametrize(
    "name, wrong", [("y", lambda x: x * 1.02), ("dw", lambda x: x * float("nan")), ("state", lambda x: x.mT)]
)
def test_numerics_of_a_wrong_kernel(monkeypatch, capsys, name, wrong):
    right, shapes = gpu_numerics.results, gpu_numerics.FEW

    def results(version, kernel, inputs, *arguments):
        found = right(version, kernel, inputs, *arguments)
        first = inputs["r"].shape == shapes[0]  # right again for the shape after it
        return found | {name: wrong(found[name])} if kernel == "torch" and version == 7 and first else found

    monkeypatch.setattr(gpu_numerics, "results", results)
    code, found = numerics(monkeypatch, capsys)
    assert code == 1
    assert {failure.split(":")[0] for failure in found["failures"]} == {
        f"wkv7 torch {dtype} {name}" for dtype in gpu_numerics.DTYPES
    }


def stub(folder, name, script):
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def checkout(tmp_path):
    """check(nvidia-smi, arguments...): gpu_check.sh in a checkout whose programs are stubs that note their
    arguments.
    """
    for folder in ("scripts", "bin", "cuda"):
        (tmp_path / folder).mkdir()
    for name in ("wkv7.cu", "wkv7_chunked.cu"):
        (tmp_path / "cuda" / name).touch()
    (tmp_path / "scripts" / "gpu_check.sh").write_text((ROOT / "scripts" / "gpu_check.sh").read_text())
    (tmp_path / "scripts" / "setup.sh").write_text(
        'cd "$(dirname "${BASH_SOURCE[0]}")/.."; echo "setup $@" >> calls; find_nvcc() { :; }\n'
    )
    calls = tmp_path / "calls"
    python = (
        f'echo "python $@" >> {calls}\ncase "$@" in *pytest*) exit 1 ;; *gpu_record*) cp $3/* {tmp_path}/logs'
        " ;; esac"
    )
    (tmp_path / "logs").mkdir()
    stub(tmp_path / "bin", "python", python)
    stub(
        tmp_path / "bin",
        "compute-sanitizer",
        f'echo "sanitizer $@ cache=$PYTORCH_NO_CUDA_MEMORY_CACHING" >> {calls}',
    )
    stub(tmp_path / "bin", "ncu", f'echo "ncu $@" >> {calls}')
    # a long step runs without its limit: only its arguments count here
    stub(tmp_path / "bin", "timeout", 'shift 2; exec "$@"')

    def check(nvidia_smi, *arguments):
        stub(tmp_path / "bin", "nvidia-smi", nvidia_smi)
        done = subprocess.run(
            ["bash", "scripts/gpu_check.sh", *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            env=os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"},
        )
        return done, calls.read_text().splitlines() if calls.exists() else []

    return check


@pytest.mark.parametrize(
    "nvidia_smi", ["exit 9", "echo 'No devices found'", "echo Failed to initialize; exit 255"]
)
def test_gpu_check_without_a_gpu_installs_nothing(checkout, nvidia_smi):
    done, calls = checkout(nvidia_smi)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("no GPU:")
    assert done.stderr.count("\n") == 1
    assert calls == []


GPU = "echo 'GPU 0: NVIDIA H100 (UUID: GPU-1)'"


def test_gpu_check_ends_where_torch_sees_no_gpu(checkout, tmp_path):
    python = tmp_path / "bin" / "python"
    python.write_text(
        python.read_text() + "case \"$@\" in *unseen_gpu*) echo 'a GPU that torch...'; exit 1 ;; esac\n"
    )
    done, calls = checkout(GPU)
    assert done.returncode == 2 and "a GPU that torch" in done.stdout + done.stderr
    assert calls[0] == "setup gpu-check" and len(calls) == 2


def test_gpu_check_goes_through_all_steps_and_records_them(checkout, tmp_path):
    done, calls = checkout(GPU)
    assert done.returncode == 0, done.stderr
    assert calls[0] == "setup gpu-check" and calls[-1].startswith("python -m scripts.gpu_record ")
    ours = "--kernel-name regex=wkv7_cu|wkv7_chunked_cu"
    for tool in gpu_record.SANITIZERS:
        (call,) = [line for line in calls if f"--tool {tool} " in line]
        assert ours in call and "--small cache=1" in call
    (call,) = [line for line in calls if line.startswith("ncu ")]
    assert "--kernel-name regex:wkv7_cu|wkv7_chunked_cu" in call and "dram__throughput" in call
    assert "--peers" in "\n".join(calls) and "--rwkv_lm" not in "\n".join(calls)
    codes = {path.stem: path.read_text().split() for path in (tmp_path / "logs").glob("*.code")}
    assert set(codes) == set(STEPS), "what gpu_record reads"
    assert codes["tests"][0] == "1" and codes["decode"][0] == "0", "the tests fail, the rest goes on"


def test_gpu_check_measures_rwkv_lm_s_kernels_where_it_is_told_their_place(checkout, tmp_path):
    _, calls = checkout(GPU, "cuda")
    assert f"--rwkv_lm {tmp_path / 'cuda'}" in next(line for line in calls if "benchmarks.ops wkv" in line)


def test_gpu_check_ends_in_ten_minutes_and_measures_first(checkout, tmp_path):
    _, calls = checkout(GPU)
    limits = {p.stem: int(p.read_text().split()[2]) for p in (tmp_path / "logs").glob("*.code")}
    counted = sum(seconds for name, seconds in limits.items() if name not in ("ptx", "build"))
    assert counted < 600, limits
    first_test = next(i for i, line in enumerate(calls) if "pytest" in line or "gpu_numerics" in line)
    last_benchmark = max(i for i, line in enumerate(calls) if "benchmarks.sizes" in line)
    assert last_benchmark < first_test


def test_gpu_check_does_not_wait_for_a_process_that_a_step_has_left_behind(checkout, tmp_path):
    stub(tmp_path / "bin", "compute-sanitizer", "sleep 50 & echo ERROR SUMMARY: 0 errors")
    start = time.monotonic()
    done, _ = checkout(GPU)
    assert time.monotonic() - start < 40 and "ERROR SUMMARY: 0 errors" in done.stdout
    assert "SUMMARY" in (tmp_path / "logs" / "racecheck").read_text()


def test_gpu_check_goes_on_without_compute_sanitizer(checkout, tmp_path):
    (tmp_path / "bin" / "compute-sanitizer").unlink()
    stub(
        tmp_path / "bin",
        "python",
        f'case "$@" in *sanitizer-api*) exit 1 ;; *gpu_record*) cp $3/* {tmp_path}/logs ;; esac',
    )
    done, _ = checkout(GPU)
    assert done.returncode == 0, done.stderr
    said = (tmp_path / "logs" / "memcheck").read_text()
    assert said.startswith("not run: compute-sanitizer") and gpu_record.verdict(said) == said.strip()


def test_a_step_of_a_small_card_halves_its_micro_batch_and_says_so(monkeypatch):
    """Memory for two rows of MiSS, and for none of peft's."""

    def make_step(variant, base, rank, ids):
        def run():
            if len(ids) > 2 or variant == "peft miss":
                raise torch.OutOfMemoryError("CUDA out of memory")

        return run

    monkeypatch.setattr(step, "make_step", make_step)
    base = step.random_base(7, 1, 64, 128, "torch")
    args = argparse.Namespace(
        device="cuda", micro_bsz=8, ctx_len=4, vocab_size=128, rank=8, variants=["miss", "peft miss"]
    )
    steps, too_large, ids = step.steps_that_fit(base, args)
    assert (list(steps), too_large, len(ids), args.micro_bsz) == (["miss"], ["peft miss"], 2, 2)
    rows = step.rows_of({"miss": 0.5, "bare GEMMs, torch": 0.25}, too_large)
    assert rows["peft miss"] == {"out_of_memory": True} and rows["miss"]["of_bare_torch_gemms"] == 2
    record = {"training": {"rows": rows, "micro_bsz": 2, "ctx_len": 1024, "asked_micro_bsz": 8}}
    said = gpu_record.speed_of(record | {"card": "NVIDIA T4"}, "training", "miss")
    assert "4,096 tokens/s, micro batch 2 because 8 did not fit" in said
    args.variants, args.ctx_len = ["peft miss"], 9
    with pytest.raises(UserError, match="one row of --ctx_len 9 does not fit"):
        step.steps_that_fit(base, args)


def test_a_form_that_does_not_fit_has_a_row_that_says_so(monkeypatch, capsys):
    def torch_form(version, kernel):
        def run(*inputs):
            if kernel == "torch" and len(inputs[0]) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return plain(version, "torch")(*inputs)

        return run

    plain = op_benchmark.wkv_of
    monkeypatch.setattr(op_benchmark, "wkv_of", torch_form)
    words = "ops wkv --shapes 2,8,64 --kernels reference torch --rounds 1 --dtypes float32"
    monkeypatch.setattr(sys, "argv", words.split())
    op_benchmark.main()
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [row.get("out_of_memory") for row in rows] == [None, True] * 2
    assert ["ms" in row for row in rows] == [True, False] * 2


def test_steps_with_other_kernels_compute_the_same(monkeypatch):
    """fla's WKV, by our plain form in its place, and plain torch compiled, without its compiler."""
    used = []

    def plain(*inputs):
        used.append(len(inputs))
        return ops.wkv7(*inputs, kernel="torch")[0]

    monkeypatch.setattr(step, "fla", lambda version: plain)
    for name in ("wkv7", "mix7"):  # which the variant replaces
        monkeypatch.setattr(rwkv7, name, getattr(rwkv7, name))
    monkeypatch.setattr(torch, "compile", lambda function: function)
    base = step.random_base(7, 2, 128, 128, "torch")
    ids = torch.randint(128, (2, 17), generator=torch.Generator().manual_seed(0))
    want, _ = step.build("miss", base, 8).features(ids)
    for variant in ("fla", "compiled"):
        got, _ = step.build(variant, base, 8).features(ids)
        assert torch.allclose(got, want, atol=1e-5), variant
    assert used == [6, 6], "a call for each layer"


def test_benchmarks_take_the_precision_that_train_takes(monkeypatch):
    monkeypatch.setattr(device, "gpu_has_bf16", lambda: False)
    assert precision_on("cuda", "auto") == "fp16" and precision_on("cpu", "auto") == "fp32"
    monkeypatch.setattr(sys, "argv", ["step", "--device", "cuda"])
    assert step.arguments().dtype == "fp16"


def test_gpu_check_asks_only_for_packages_that_python_3_10_has(checkout):
    """trl needs 3.11, and the tests of a GPU need few packages: they stand in one file."""
    extras = (ROOT / "pyproject.toml").read_text()
    (needed,) = re.findall(r"^gpu-check = (\[.*\])", extras, re.MULTILINE)
    assert [re.match(r"[a-z]+", name)[0] for name in json.loads(needed)] == ["pytest", "peft", "setuptools"]
    assert """"trl>=1.16; python_version >= '3.11'",""" in extras
    _, calls = checkout(GPU)
    (tests,) = [call for call in calls if "-m pytest" in call]
    marked = [path for path in (ROOT / "tests").glob("*.py") if "pytest.mark.gpu" in path.read_text()]
    assert [f"tests/{path.name}" for path in marked if path.name != "test_doctor.py"] == tests.split()[3:4]


def test_every_command_of_gpu_check_parses(checkout):
    _, calls = checkout(GPU, "cuda")
    asked = [re.search(r"-m benchmarks.*?(?= cache=|$)", line) for line in calls]
    words = [found[0].split() for found in asked if found]
    assert {name for _, name, *_ in words} >= {f"benchmarks.{name}" for name in ("ops", "step", "gpu_decode")}
    done = subprocess.run(
        [sys.executable, "-m", "tests.parse_commands"],
        input=json.dumps([[command, True] for command in words]),
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert [wrong for wrong, _ in json.loads(done.stdout)] == [""] * len(words), done.stdout


def test_numerics_without_a_gpu_say_so(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_numerics", "--small"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        gpu_numerics.main()
    assert stopped.value.code == 2 and "torch sees no GPU here" in capsys.readouterr().err
