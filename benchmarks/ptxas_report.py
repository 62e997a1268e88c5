"""Show the registers, spilled bytes and shared memory of the CUDA kernels, as nvcc compiles them.

    python -m benchmarks.ptxas_report [cuda/wkv7.cu ...] [--arch 75 80 ...] [--quick] [--kernels backward]

Every kernel is listed for every architecture. That needs nvcc and no GPU. The last line is JSON.

--quick makes PTX only twice, not for each architecture: for Ampere and newer, and for Blackwell and newer,
whose PTX has pairs of fp32. The figures are the same or nearly so.

The output of ptxas is kept in the kernels' cache, so that the same source is not compiled twice.

    python -m benchmarks.ptxas_report --write

writes cuda/ptxas_record.json, from which the tests read the figures of unchanged sources.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence

from src.common.files import write_text
from src.ops import build, toolchain

ENTRY = re.compile(r"Compiling entry function '(\S+)' for 'sm_(\d+)'")
SPILL = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
# Architectures that the tests compile, one of each generation from Ampere on. sm_89 runs the code of sm_86,
# and the figures of sm_80 and sm_100 are near those of sm_86 and sm_120.
GENERATIONS = (86, 90, 120)
INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)
OPTIONS = ("-std=c++17", "-O3", "-Xptxas", "-v", "-fatbin")
RECORD = build.CUDA / "ptxas_record.json"
USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


def demangle(names: list[str]) -> list[str]:
    """Write C++ names without namespaces and parameters: backward_down<Layout<64, 1>>."""
    if not shutil.which("c++filt"):
        return names
    lines = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    lines = [
        re.sub(r"^void |\(\(anonymous namespace\)::\w+\)|\(anonymous namespace\)::", "", line)
        for line in lines
    ]
    return [line.partition("(")[0].replace("> >", ">>") for line in lines]


def read(log: str) -> list[dict]:
    """Read ptxas -v's output: one {kernel, arch, registers, spill_stores, spill_loads, shared} for each
    kernel and architecture.
    """
    rows: list[dict] = []
    for line in log.splitlines():
        if found := ENTRY.search(line):
            rows.append({"kernel": found[1], "arch": int(found[2])})
        elif found := SPILL.search(line):
            rows[-1] |= {"spill_stores": int(found[2]), "spill_loads": int(found[3])}
        elif found := USED.search(line):
            rows[-1] |= {"registers": int(found[1]), "shared": int(found[2] or 0)}
    for row, name in zip(rows, demangle([row["kernel"] for row in rows])):
        row["kernel"] = name
    return rows


def compile_report(source: pathlib.Path, architectures: Sequence[int], quick: bool = False) -> list[dict]:
    """Call `read` on one .cu file compiled for these architectures. Raises as `compile_source`."""
    log = compile_source(source, report_flags(architectures, quick))
    return [{"file": source.name} | row for row in read(log)]


def report_flags(architectures: Sequence[int], quick: bool) -> list[str]:
    groups = [[arch] for arch in architectures]
    if quick:
        groups = [
            [arch for arch in architectures if low <= arch < high] for low, high in ((0, 100), (100, 1000))
        ]
    targets = [
        f"-gencode=arch=compute_{group[0]},code=[{','.join(f'sm_{arch}' for arch in group)}]"
        for group in groups
        if group
    ]
    return [*OPTIONS, *targets]


def compile_source(source: pathlib.Path, flags: Sequence[str]) -> str:
    """Return nvcc's output while it compiles one .cu file with these flags.

    Raises BuildError without nvcc, RuntimeError if the file does not compile.
    """
    nvcc = toolchain.find_nvcc()
    command = [nvcc.path, *nvcc.compile_flags, *flags]
    name = f"ptxas_{source.stem}"
    key = build.fingerprint(name, [source], build.headers(), command, [], "")
    kept = build.library_path(name, key).with_suffix(".log")
    if not kept.exists():
        with tempfile.TemporaryDirectory() as folder:
            call = [*command, str(source), "-o", f"{folder}/out"]
            done = subprocess.run(call, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{source} does not compile:\n{done.stdout}{done.stderr}")
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_text(str(kept), done.stdout + done.stderr)
    return kept.read_text("utf-8")


def compiler() -> str:
    """Ask the nvcc at hand for its version, "13.0.88". Raises BuildError without one."""
    found = re.search(r"\bV(\d+\.\d+\.\d+)", toolchain.output_of(toolchain.find_nvcc().path, "--version"))
    return found[1] if found else ""


def digest(source: pathlib.Path) -> str:
    """Hash everything of this project that decides a .cu file's record: the file, its includes, the flags."""
    files = [source]
    for file in files:  # the loop appends included files
        names = INCLUDE.findall(file.read_text("utf-8"))
        files += [path for name in names if (path := file.parent / name) not in files]
    hashed = build.hash_files(sorted(files))
    hashed.update(repr(report_flags(GENERATIONS, quick=True)).encode())
    return hashed.hexdigest()[:16]


def record(sources: Sequence[pathlib.Path]) -> dict:
    """Return {"nvcc": its version, "files": {name: {"digest", "kernels": compile_report's rows}}}."""
    files = {
        source.name: {"digest": digest(source), "kernels": compile_report(source, GENERATIONS, quick=True)}
        for source in sources
    }
    return {"nvcc": compiler(), "files": files}


def write_record(found: dict, path: pathlib.Path = RECORD) -> None:
    """Write one line for each kernel and architecture, so that a diff shows the changed ones."""
    files = []
    for name, of_file in found["files"].items():
        rows = ",\n".join(f"   {json.dumps(row)}" for row in of_file["kernels"])
        files.append(f'  "{name}": {{"digest": "{of_file["digest"]}", "kernels": [\n{rows}\n  ]}}')
    text = f'{{\n "nvcc": "{found["nvcc"]}",\n "files": {{\n' + ",\n".join(files) + "\n }\n}\n"
    write_text(str(path), text)


def table(rows: list[dict]) -> str:
    """Tabulate registers (+ bytes spilled) of each kernel by architecture, and its static shared memory."""
    architectures = sorted({row["arch"] for row in rows})
    lines = [
        "| registers (+ bytes spilled) | "
        + " | ".join(f"sm_{arch}" for arch in architectures)
        + " | shared |",
        "|---" * (len(architectures) + 2) + "|",
    ]
    for name in dict.fromkeys((row["file"], row["kernel"]) for row in rows):
        cells = {row["arch"]: row for row in rows if (row["file"], row["kernel"]) == name}
        texts = [
            f"{row['registers']}" + (f" (+{row['spill_stores']})" if row["spill_stores"] else "")
            for row in map(cells.get, architectures)
        ]
        lines.append(
            f"| {': '.join(name)} | {' | '.join(texts)} | {max(row['shared'] for row in cells.values())} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("sources", nargs="*", type=pathlib.Path, default=sorted(build.CUDA.glob("*.cu")))
    parser.add_argument("--arch", nargs="+", type=int, default=toolchain.ARCHITECTURES)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--kernels", default="", help="only kernels whose name has this in it")
    parser.add_argument(
        "--write", action="store_true", help=f"write {RECORD.name} anew; nothing else is given"
    )
    args = parser.parse_args()
    if args.write and len(sys.argv) > 2:
        parser.error(f"--write makes the record of all sources; expected no other arguments: {sys.argv[1:]}")
    try:
        nvcc = toolchain.find_nvcc()
    except toolchain.BuildError as error:
        raise SystemExit(f"ptxas_report: {error}") from None
    if args.write:
        write_record(record(args.sources))
        return
    rows = []
    for source in args.sources:
        compiled = compile_report(source, args.arch, args.quick)
        rows += [row for row in compiled if args.kernels in row["kernel"]]
    print(table(rows))
    print(json.dumps({"report": "ptxas", "nvcc": toolchain.ask(nvcc.path).cuda, "kernels": rows}))


if __name__ == "__main__":
    main()
