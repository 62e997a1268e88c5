"""Building native libraries: once, by one process of many, whatever happens to it, and one line when it
cannot be done.
"""

import ctypes
import errno
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
import types

import pytest

from src.ops import build, toolchain

from .conftest import ROOT
from .program import CONTEXT

SOURCE = '#include "answer.h"\nextern "C" int answer() { return ANSWER; }\n'
TITLE = "the test kernels"
pytestmark = pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")


class Project:
    """One source and one header, a cache, and a compiler that keeps a record and waits while `hold`
    exists.
    """

    def __init__(self, folder: pathlib.Path, cache: pathlib.Path):
        self.cache, self.source, self.header = cache, folder / "answer.cpp", folder / "answer.h"
        self.record, self.hold, self.compiler = folder / "record", folder / "hold", folder / "compiler"
        self.source.write_text(SOURCE)
        self.header.write_text("#define ANSWER 42\n")
        self.compiler.write_text(
            f'#!/bin/sh\necho "$@" >> "{self.record}"\nwhile [ -e "{self.hold}" ]; do sleep 0.02; done\nexec'
            ' c++ "$@"\n'
        )
        self.compiler.chmod(0o755)
        self.command = [str(self.compiler), "-fPIC"]

    def build(self, **changes):
        arguments = dict(name="test", title=TITLE, seconds=1, command=self.command)
        arguments |= {"sources": [self.source], "headers": [self.header]}
        return build.build(**arguments | changes)

    def start(self):
        """Make the same call in another process."""
        return Elsewhere(self)

    def runs(self):
        return len(self.record.read_text().splitlines()) if self.record.exists() else 0

    def temporary(self):
        return [path.name for path in self.cache.iterdir() if path.is_dir()]


def build_and_print(project, cache, files):
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY), number)
    os.environ["RWKV_KERNEL_CACHE"] = cache
    try:
        print(project.build())
    except toolchain.BuildError as error:
        print("BuildError", error)


class Elsewhere:
    """A process that builds, with what of subprocess.Popen is used here. It is forked: a start would take
    seconds, in which others wait for it.
    """

    def __init__(self, project):
        files = [tempfile.mkstemp(dir=project.source.parent)[1] for _ in range(2)]
        self.stdout, self.stderr = map(open, files)
        arguments = (project, os.environ["RWKV_KERNEL_CACHE"], files)
        self.process = CONTEXT.Process(target=build_and_print, args=arguments)
        self.process.start()
        self.kill = self.process.kill

    def wait(self, timeout=None):
        self.process.join(timeout)
        assert self.process.exitcode is not None, "it does not end"

    def communicate(self, timeout):
        self.wait(timeout)
        return self.stdout.read(), self.stderr.read()


@pytest.fixture
def project(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setenv("RWKV_KERNEL_CACHE", str(cache))
    (tmp_path / "src").mkdir()
    project = Project(tmp_path / "src", cache)
    yield project
    project.hold.unlink(missing_ok=True)  # or the compilers of killed builders would wait for ever


def wait_for(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def first_line(stream):
    """The next line of a file that a process writes."""
    line = ""

    def whole():
        nonlocal line
        line += stream.readline()
        return line.endswith("\n")

    wait_for(whole)
    return line.strip()


def failure(call, *arguments, **keywords):
    """The BuildError of a call, which must be one line."""
    with pytest.raises(toolchain.BuildError) as caught:
        call(*arguments, **keywords)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_library_is_built_once_and_found_again(project, capfd):
    library = project.build()
    assert ctypes.CDLL(str(library)).answer() == 42
    said = capfd.readouterr()
    assert said.out == "" and said.err.startswith(f"building {TITLE} with ninja (once, about 1 s)\nbuilt in ")
    assert said.err.count("\n") == 2
    assert project.runs() == 2 and project.temporary() == []
    assert project.build() == library and project.runs() == 2
    assert capfd.readouterr() == ("", "")


def test_a_warm_call_starts_no_process_and_takes_under_5_ms(project, monkeypatch):
    project.build()
    monkeypatch.setattr(build.subprocess, "run", None)
    monkeypatch.setattr(build, "find_ninja", None)
    best = min(timed(project.build) for _ in range(20))
    assert best < 5e-3, f"{best * 1e3:.1f} ms"


def timed(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def test_four_processes_make_one_build(project):
    project.hold.touch()
    processes = [project.start() for _ in range(4)]
    said = [first_line(process.stderr) for process in processes]
    assert sorted(said) == [f"building {TITLE} with ninja (once, about 1 s)"] + 3 * [
        f"waiting for another process that builds {TITLE}"
    ]
    project.hold.unlink()
    results = [process.communicate(timeout=20) for process in processes]
    assert len({out for out, _ in results}) == 1 and results[0][0].strip().endswith(".so")
    assert sorted(err.startswith("built in") for _, err in results) == [False, False, False, True]
    assert sum(err.count("\n") for _, err in results) == 1, "a process that waits says so once"
    assert project.runs() == 2


def test_a_killed_builder_leaves_no_lock_and_no_folder(project):
    project.hold.touch()
    killed = project.start()
    wait_for(lambda: project.runs() == 1)
    assert len(project.temporary()) == 1
    killed.kill()
    killed.wait()
    # the killed process's compiler still waits; the next call has one of its own
    start = time.monotonic()
    assert ctypes.CDLL(str(project.build(command=[toolchain.find_cxx(), "-fPIC"]))).answer() == 42
    assert time.monotonic() - start < 3
    assert project.temporary() == []


def test_a_killed_builder_hands_over_to_the_one_that_waits(project):
    project.hold.touch()
    killed = project.start()
    wait_for(lambda: project.runs() == 1)
    waiting = project.start()
    assert first_line(waiting.stderr).startswith("waiting")
    killed.kill()
    assert first_line(waiting.stderr).startswith("building")
    project.hold.unlink()
    assert waiting.communicate(timeout=20)[0].strip().endswith(".so")


def test_a_compile_error_is_one_line_and_a_log(project):
    project.source.write_text(
        'extern "C" int answer() { return nothing; }\nint other() { return nothing_either; }\n'
    )
    message = failure(project.build)
    log = pathlib.Path(message.rpartition(" ")[2])
    assert log.parent == project.cache and "nothing_either" in log.read_text()
    assert message.startswith(f"{TITLE} did not compile: {project.source}:1:")
    assert "error: 'nothing'" in message.replace("‘", "'").replace("’", "'")
    assert "--wkv torch" in message and project.temporary() == []
    runs = project.runs()
    failure(project.build)
    assert project.runs() > runs, "a later call tries again: another compiler may be at hand"


def test_an_error_of_the_linker_names_what_is_missing(project):
    assert re.search(
        r"did not compile: .*nothing_of_that_name", failure(project.build, link=["-lnothing_of_that_name"])
    )


def test_processes_that_waited_for_a_failure_do_not_repeat_it(project):
    project.source.write_text("nonsense\n")
    project.hold.touch()
    processes = [project.start() for _ in range(3)]
    for process in processes:
        first_line(process.stderr)
    project.hold.unlink()
    messages = {process.communicate(timeout=20)[0] for process in processes}
    assert len(messages) == 1 and messages.pop().startswith(f"BuildError {TITLE} did not compile")
    assert project.runs() == 1


def test_everything_that_matters_is_in_the_name(project, monkeypatch):
    libraries = [project.build()]
    project.header.write_text("#define ANSWER 43\n")
    libraries.append(project.build())
    assert ctypes.CDLL(str(libraries[-1])).answer() == 43
    project.source.write_text(SOURCE + "// more\n")
    libraries.append(project.build())
    libraries.append(project.build(command=[*project.command, "-O1"]))
    libraries.append(project.build(link=["-pthread"]))
    libraries.append(project.build(machine="another CPU"))
    os.utime(project.compiler, (1, 1))
    libraries.append(project.build())
    project.compiler.write_text(project.compiler.read_text() + "\n")
    os.utime(project.compiler, (1, 1))
    libraries.append(project.build())
    other = shutil.copy2(project.compiler, project.compiler.with_name("other"))
    libraries.append(project.build(command=[str(other), "-fPIC"]))
    assert len(set(libraries)) == len(libraries)
    os.utime(project.source, (1, 1))
    assert project.build() == libraries[-2], "the time of a source is no reason to build again"


def test_a_library_appears_whole_in_one_step(project, monkeypatch):
    renames = []

    def replace(source, target):
        assert ctypes.CDLL(str(source)).answer() == 42 and not os.path.exists(target)
        renames.append(os.rename(source, target))

    monkeypatch.setattr(build.os, "replace", replace)
    project.build()
    assert len(renames) == 1


def test_temporary_files_of_the_compiler_are_swept_with_the_rest(project):
    project.compiler.write_text(f'#!/bin/sh\necho "$TMPDIR" >> "{project.record}"\nexec c++ "$@"\n')
    project.build()
    places = {pathlib.Path(line) for line in project.record.read_text().splitlines()}
    assert {place.parent for place in places} == {project.cache}
    assert not any(place.exists() for place in places)


def test_strange_names_of_folders(tmp_path, monkeypatch):
    folder = tmp_path / "a b $HOME 'c' : é"
    folder.mkdir()
    monkeypatch.setenv("RWKV_KERNEL_CACHE", str(folder / "cache"))
    command = [toolchain.find_cxx(), "-fPIC", f"-I{folder}"]
    library = Project(folder, folder / "cache").build(command=command)
    assert ctypes.CDLL(str(library)).answer() == 42


def test_a_relative_cache(project, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RWKV_KERNEL_CACHE", "here")
    assert project.build().parent == tmp_path / "here"


def test_a_cache_that_cannot_be_written(project, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("RWKV_KERNEL_CACHE", str(tmp_path / "file" / "cache"))
    message = failure(project.build)
    assert str(tmp_path / "file" / "cache") in message and "Not a directory" in message
    assert "set RWKV_KERNEL_CACHE" in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_without_permission(project):
    project.cache.mkdir(0o500)
    message = failure(project.build)
    assert str(project.cache) in message and "Permission denied" in message


def test_a_full_cache(project):
    project.compiler.write_text(
        "#!/bin/sh\necho 'fatal error: error writing to out.o: No space left on device'\nexit 1\n"
    )
    message = failure(project.build)
    assert f"the kernel cache {project.cache} cannot be used" in message and "No space left" in message
    assert project.temporary() == []


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_a_cache_on_a_file_system_without_locks(project, monkeypatch, number):
    """No lock is better than one that outlives its process."""

    def refuse(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    message = failure(project.build)
    assert f"the kernel cache {project.cache} cannot be used" in message
    assert os.strerror(number) in message and project.runs() == 0


def test_without_a_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    message = failure(build.cpu_library)
    assert message.startswith("no C++ compiler") and "apt install g++" in message


def test_ninja_comes_from_the_package_and_else_from_path(monkeypatch, tmp_path):
    package, path = tmp_path / "package", tmp_path / "path"
    for folder in (package, path):
        folder.mkdir()
        (folder / "ninja").touch(0o755)
    monkeypatch.setenv("PATH", str(path))
    monkeypatch.setitem(sys.modules, "ninja", types.SimpleNamespace(BIN_DIR=str(package)))
    assert toolchain.find_ninja() == str(package / "ninja")
    monkeypatch.setitem(sys.modules, "ninja", None)
    assert toolchain.find_ninja() == str(path / "ninja")


def test_without_ninja(project, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "ninja", None)
    message = failure(project.build)
    assert message.startswith("no ninja") and "pip install ninja" in message and not project.cache.exists()


def test_where_the_cache_is(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("RWKV_KERNEL_CACHE", raising=False)
    assert toolchain.cache_folder() == pathlib.Path("/home/someone/.cache/rwkv-miss/kernels")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert toolchain.cache_folder() == pathlib.Path("/x/rwkv-miss/kernels")
    monkeypatch.setenv("RWKV_KERNEL_CACHE", "/mine")
    assert toolchain.cache_folder() == pathlib.Path("/mine")


def test_the_cpu_library_respects_nan_and_is_for_this_cpu(project, monkeypatch):
    folder = project.source.parent
    (folder / "one_cpu.cpp").write_text(
        '#include "answer.h"\nextern "C" int is_nan(float x) { return x != x; }\n'
    )
    (folder / "two_cpu.cpp").write_text(
        '#include <thread>\nextern "C" void run() { std::thread([] {}).join(); }\n'
    )
    monkeypatch.setattr(build, "CUDA", folder)
    monkeypatch.setattr(build, "find_cxx", lambda: str(project.compiler))
    path = build.cpu_library()
    library = ctypes.CDLL(str(path))
    library.run()
    assert library.is_nan(ctypes.c_float(float("nan"))) == 1
    compiled = project.record.read_text().splitlines()[0]
    assert "-O3" in compiled and ("-march=native" in compiled or "-mcpu=native" in compiled)
    monkeypatch.setattr(build, "cpu_features", lambda: "another CPU")
    assert build.cpu_library() != path


def fake_nvcc(folder, record, cuda="13.0", architectures=toolchain.ARCHITECTURES):
    """A compiler for the host that drops what only nvcc understands, and answers as nvcc does."""
    folder.mkdir(parents=True)
    path = folder / "nvcc"
    listed = "".join(f"compute_{arch}\\n" for arch in architectures)
    path.write_text(f"""#!/bin/sh
case "$1" in
    --version)
        echo asked >> {record}.asked
        echo "Cuda compilation tools, release {cuda}, V{cuda}.88"
        exit ;;
    --list-gpu-arch) printf "{listed}"; exit ;;
esac
echo "$@" >> {record}
for word do
    shift
    case "$word" in
        *ccbin|*/c++|-gencode*|-Xcompiler|-cudart|static) ;;
        *.cu) set -- "$@" -x c++ "$word" ;;
        *) set -- "$@" "$word" ;;
    esac
done
exec c++ "$@"
""")
    path.chmod(0o755)
    return path


@pytest.fixture
def cuda(project, monkeypatch):
    """The project's source as two .cu files, and a compiler for them in CUDA_HOME."""
    folder = project.source.parent
    (folder / "answer.cu").write_text(SOURCE)
    (folder / "other.cu").write_text('extern "C" int other() { return 1; }\n')
    fake_nvcc(folder / "toolkit" / "bin", project.record)
    monkeypatch.setattr(build, "CUDA", folder)
    monkeypatch.setenv("CUDA_HOME", str(folder / "toolkit"))
    return project


def test_the_cuda_library_is_for_the_architectures_at_hand(cuda):
    library = build.cuda_library(["90", "80", "90"])
    assert ctypes.CDLL(str(library)).answer() == 42 and ctypes.CDLL(str(library)).other() == 1
    runs = cuda.record.read_text().splitlines()
    assert len(runs) == 3, "one object a source, and the link"
    for line in runs[:2]:
        assert line.count("-gencode") == 2 and "arch=compute_80,code=sm_80" in line
        assert "arch=compute_90,code=sm_90" in line
        assert "fast" not in line and "-O3" in line and "-Xcompiler -fPIC" in line
    assert "-cudart static" in runs[2]
    assert build.cuda_library(["80", "90"]) == library
    assert build.cuda_library(["90"]) != library
    (cuda.source.parent / "shared.cuh").touch()
    assert build.cuda_library(["90", "80"]) != library


def test_a_library_for_all_architectures_serves_any_of_them(cuda):
    alone = build.cuda_library(["90"])
    fat = build.cuda_library([str(arch) for arch in toolchain.ARCHITECTURES])
    assert fat != alone and all(f"sm_{arch}" in cuda.record.read_text() for arch in toolchain.ARCHITECTURES)
    assert build.cuda_library(["90"]) == build.cuda_library(["75", "120"]) == fat
    assert build.cuda_library(["103"]) != fat, "which it has no code for"
    (cuda.source.parent / "shared.cuh").touch()
    assert build.cuda_library(["90"]) != fat


def test_the_compiler_of_the_host_s_part_can_be_chosen(cuda, monkeypatch):
    monkeypatch.setenv("NVCC_CCBIN", toolchain.find_cxx())
    monkeypatch.setattr(build, "find_cxx", None)
    build.cuda_library(["90"])
    calls = cuda.record.read_text().splitlines()
    assert calls and all(f"-ccbin {os.environ['NVCC_CCBIN']} " in line for line in calls)


@pytest.mark.parametrize("architecture", ["70", "61", "gfx90a", "7.5"])
def test_architectures_that_are_not_supported(cuda, architecture):
    message = failure(build.cuda_library, ["90", architecture])
    assert f"architecture {architecture}" in message and "75 (Turing) or newer" in message
    assert cuda.runs() == 0


def test_where_nvcc_is_looked_for(monkeypatch, tmp_path):
    """CUDA_HOME, PATH, the toolkits of the system, the packages of the environment; each is used when those
    before it have none.
    """
    record = tmp_path / "record"
    wheels = tmp_path / "site" / "nvidia" / "cu13"
    places = [
        tmp_path / "home" / "bin",
        tmp_path / "path",
        tmp_path / "local" / "cuda-13.0" / "bin",
        wheels / "bin",
    ]
    found = [str(fake_nvcc(folder, record)) for folder in places]
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setattr(toolchain, "TOOLKITS", str(tmp_path / "local" / "cuda*" / "bin"))
    packages = types.SimpleNamespace(submodule_search_locations=[str(tmp_path / "site" / "nvidia")])
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda name: packages)
    for path in found[:3]:
        assert toolchain.find_nvcc() == toolchain.Nvcc(path)
        os.remove(path)
    assert toolchain.find_nvcc() == toolchain.Nvcc(found[3], (f"-I{wheels}/include",), (f"-L{wheels}/lib",))
    os.remove(found[3])
    message = failure(toolchain.find_nvcc)
    assert message.startswith("no nvcc:")
    assert 'pip install "cuda-toolkit[cccl,crt,cudart,nvcc,nvvm]==' in message


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """machine(driver, torch's CUDA, nvcc's of PATH): a machine with these. It returns the compilers."""
    monkeypatch.setenv("RWKV_KERNEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(toolchain, "TOOLKITS", str(tmp_path / "none" / "*"))
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda name: None)

    def make(driver, of_torch, *releases):
        folders = [tmp_path / f"cuda-{release}" for release in releases]
        found = [str(fake_nvcc(*pair)) for pair in zip(folders, [tmp_path / "record"] * 9, releases)]
        monkeypatch.setattr(toolchain.device, "cuda_of_driver", lambda: driver)
        monkeypatch.setattr(toolchain.torch.version, "cuda", of_torch)
        monkeypatch.setenv("PATH", os.pathsep.join(map(str, folders)))
        return found

    return make


@pytest.mark.parametrize(
    "driver, of_torch, releases, taken",
    [
        (13000, "13.0", ["12.4", "13.0"], 0),  # a driver runs what is older than itself
        (12080, "12.8", ["13.0", "12.4"], 1),
        (13020, "12.8", ["13.5"], 0),  # the driver decides, not torch
        (12040, "12.8", ["12.9"], 0),  # within a major version code for one GPU runs
        (0, "12.8", ["13.0", "12.6"], 1),  # without a driver, as on a login node, torch decides
        (0, None, ["13.0"], 0),
        (13000, "13.0", ["11.5", "13.0"], 1),  # CUDA 11.5 has no movmatrix
        (11080, "11.8", ["11.8"], 0),
    ],
)
def test_the_first_nvcc_that_the_driver_runs_is_taken(machine, driver, of_torch, releases, taken):
    found = machine(driver, of_torch, *releases)
    assert toolchain.find_nvcc().path == found[taken]


@pytest.mark.parametrize(
    "driver, of_torch, releases, said, help",
    [
        (
            12080,
            "12.8",
            ["13.0"],
            "this driver runs CUDA up to 12.8.",
            "toolkit of CUDA 12.8 from",
        ),
        (0, "12.6", ["13.1"], "runs CUDA up to 12.6.", "toolkit of CUDA 12.6 from"),
        (13000, "13.0", ["11.5"], "they need 11.8 or newer", "nvvm]==13.0.*"),
        (12080, "13.0", [], "no nvcc:", "toolkit of CUDA 12.8 from"),
        (13000, "13.2", [], "no nvcc:", "nvvm]==13.2.*"),
        (13000, "12.8", [], "no nvcc:", "nvvm]==13.0.*"),
        (0, None, [], "no nvcc:", "nvvm]==13.0.*"),
    ],
)
def test_no_nvcc_that_fits_is_told_with_what_helps(machine, driver, of_torch, releases, said, help):
    found = machine(driver, of_torch, *releases)
    message = failure(toolchain.find_nvcc)
    assert said in message and help in message and "--wkv torch" in message
    for path, release in zip(found, releases):
        assert f"{path} of CUDA {release} " in message
        assert ("would not start (error 35)" in message) == (release != "11.5")


@pytest.mark.parametrize(
    "gpu, extra, error, installs, says",
    [
        (False, "", None, "", ""),
        (True, "", None, "", ""),
        (False, "test", None, "", ""),
        (
            True,
            "",
            'no nvcc: ... pip install "cuda-toolkit[nvcc]==13.2.*" brings one, or use',
            "==13.2.*",
            "installing",
        ),
        (False, "test", 'no nvcc: pip install "cuda-toolkit[nvcc]==13.0.*"', "==13.0.*", "installing"),
        (True, "", "no nvcc that fits: ... install the toolkit of CUDA 12.8", "", "toolkit of CUDA 12.8"),
    ],
)
def test_setup_installs_nvcc_where_it_is_wanted_and_a_package_fits(
    tmp_path, gpu, extra, error, installs, says
):
    # without its last line, which installs
    source = (ROOT / "scripts" / "setup.sh").read_text().rpartition("\nsetup ")[0].partition("\nsetup() {")[2]
    fails = f"echo 'src.ops.toolchain.BuildError: {error}' >&2; exit 1"
    stubs = {
        "nvidia-smi": "echo 'GPU 0: NVIDIA H100'" if gpu else "exit 9",
        "python": f'case "$1" in -c) {fails if error else "exit 0"} ;; esac; echo "$@" >> {tmp_path}/called',
    }
    for name, script in stubs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f"setup() {{{source}\nfind_nvcc {extra}"],
        capture_output=True,
        text=True,
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )
    called = (tmp_path / "called").read_text() if (tmp_path / "called").exists() else ""
    assert done.returncode == 0 and says in done.stdout + done.stderr and (bool(says) or not done.stderr)
    assert called == (f"-m pip install cuda-toolkit[nvcc]{installs}\n" if installs else "")


@pytest.mark.parametrize(
    "glibc, releases, taken",
    [("2.42", ["12.8", "13.1", "13.2"], 2), ("2.41", ["13.1", "13.2"], 0), ("", ["13.1"], 0)],
)
def test_an_nvcc_whose_headers_do_not_fit_the_glibc_is_passed_over(
    machine, monkeypatch, glibc, releases, taken
):
    """glibc 2.42 declares rsqrt, with noexcept; nvcc up to 13.1 without."""
    found = machine(13020, "13.2", *releases)
    monkeypatch.setattr(toolchain.platform, "libc_ver", lambda: ("glibc", glibc))
    assert toolchain.find_nvcc().path == found[taken]


@pytest.mark.parametrize(
    "driver, of_torch, help",
    [
        (13020, "13.0", "nvvm]>=13.2,<14"),
        (13020, "13.3", "nvvm]==13.3.*"),
        (12080, "12.8", "update the driver to 580"),
    ],
)
def test_the_remedy_for_a_new_glibc_is_an_nvcc_that_fits_it(machine, monkeypatch, driver, of_torch, help):
    machine(driver, of_torch, "12.8")
    monkeypatch.setattr(toolchain.platform, "libc_ver", lambda: ("glibc", "2.43"))
    message = failure(toolchain.find_nvcc)
    assert (
        "glibc 2.43" in message and ("13.2 or newer" in message) and help in message and "CXX" not in message
    )
    assert "cuda-toolkit-archive" not in message


def test_an_nvcc_is_asked_once_in_its_life(machine, tmp_path):
    (path,) = machine(13000, "13.0", "13.0")
    asked = tmp_path / "record.asked"
    for _ in range(3):
        assert toolchain.ask(path) == toolchain.Release("13.0", toolchain.ARCHITECTURES)
    assert asked.read_text() == "asked\n"
    os.utime(path, (1, 1))
    (tmp_path / "cache" / "nvcc.json").write_text('{"cut off')
    assert toolchain.ask(path).cuda == "13.0" and asked.read_text() == 2 * "asked\n"


def test_a_gpu_that_nvcc_does_not_know():
    """Code for an older one of its generation runs on it; else the driver compiles PTX."""
    architectures = (75, 80, 86, 89, 90, 100)
    for arch, flags in {
        "90": "arch=compute_90,code=sm_90",
        "90a": "arch=compute_90a,code=sm_90a",
        "103": "arch=compute_100,code=sm_100",
        "120": "arch=compute_100,code=compute_100",
    }.items():
        assert toolchain.code_for([arch], architectures) == [f"-gencode={flags}"]
        assert toolchain.code_for([arch], ()) == [f"-gencode=arch=compute_{arch},code=sm_{arch}"]
    assert len(toolchain.code_for(["120", "121"], architectures)) == 1


@pytest.mark.parametrize(
    "gpu, known, flags",
    [
        ("89", (80, 86, 87), "arch=compute_86,code=sm_86"),  # CUDA 11.5
        ("103", (90, 100, 101, 120), "arch=compute_100,code=sm_100"),  # CUDA 12.8
        ("121", (100, 101, 110, 120), "arch=compute_120,code=sm_120"),
        ("120", (90, 100, 101, 110), "arch=compute_100,code=compute_100"),
        ("87", (80, 86), "arch=compute_86,code=compute_86"),  # a Jetson itself
        ("110", (90, 100, 101), "arch=compute_100,code=compute_100"),
        ("87", (80, 86, 87), "arch=compute_87,code=sm_87"),
    ],
)
def test_code_for_a_jetson_is_for_jetsons_only(gpu, known, flags):
    assert toolchain.code_for([gpu], known) == [f"-gencode={flags}"]


def test_cxx_names_the_compiler(monkeypatch, tmp_path):
    compiler = tmp_path / "a folder" / "g++-99"
    compiler.parent.mkdir()
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert toolchain.find_cxx() == str(compiler)
    monkeypatch.setenv("CXX", "ccache g++")
    message = failure(toolchain.find_cxx)
    assert "CXX=ccache g++ is no program" in message and "CXX=g++-13" in message


def test_a_host_compiler_that_nvcc_does_not_take(cuda, monkeypatch, tmp_path):
    """A g++ that says it is of version 99, given to the real nvcc."""
    try:
        monkeypatch.delenv("CUDA_HOME")
        toolchain.find_nvcc()
    except toolchain.BuildError as error:
        pytest.skip(str(error))
    too_new = tmp_path / "g++99"
    too_new.write_text('#!/bin/sh\nexec g++ -U__GNUC__ -D__GNUC__=99 "$@"\n')
    too_new.chmod(0o755)
    monkeypatch.setenv("CXX", str(too_new))
    message = failure(build.cuda_library, ["90"])
    newest = re.search(r"gcc versions later than (\d+)", message)[1]
    assert f"apt install g++-{newest}) and set NVCC_CCBIN=g++-{newest}" in message


def test_nvcc_compiles_and_links_without_a_gpu(project, monkeypatch):
    try:
        toolchain.find_nvcc()
    except toolchain.BuildError as error:
        pytest.skip(str(error))
    (project.source.parent / "real.cu").write_text(
        "#include <cuda_bf16.h>\n__global__ void one(__nv_bfloat16* x) { *x = __float2bfloat16_rn(1.0f); }\n"
        'extern "C" int launch(void* x) { one<<<1, 1>>>((__nv_bfloat16*)x); return cudaGetLastError(); }\n'
    )
    monkeypatch.setattr(build, "CUDA", project.source.parent)
    assert ctypes.CDLL(str(build.cuda_library(["75", "90"]))).launch


def test_other_systems(monkeypatch):
    monkeypatch.setattr(build, "os", types.SimpleNamespace(name="nt"))
    for call in (build.cpu_library, lambda: build.cuda_library(["90"])):
        assert failure(call) == "native kernels are built on Linux and macOS only; use --wkv torch"


def test_the_import_does_nothing(tmp_path):
    code = f"import sys; sys.modules['fcntl'] = None; sys.path.insert(0, {str(ROOT)!r}); import src.ops.build"
    environment = {"PATH": "", "RWKV_KERNEL_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "") and not (tmp_path / "cache").exists()
