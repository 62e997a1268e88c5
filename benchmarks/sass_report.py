"""Count the machine instructions of the tensor-core WKV, without a GPU.

    python -m benchmarks.sass_report [cuda/wkv7_chunked.cu ...] [--arch 90] [--shape B T H N] [--dtype bf16]

It needs nvcc and nvdisasm: of a CUDA toolkit, or from `pip install nvidia-cuda-nvdisasm`. For each kernel it
prints the instructions in the code, those that the four warps of a chunk of a head run, and the bytes that
their accesses to global memory move. Then, for a shape (B, T, H, N), what a forward and a backward run in
all, and the milliseconds that the schedulers of an H100 need to issue it. The last line is JSON.

How it counts: the code is compiled with line numbers. A backward branch closes a loop, and the line it comes
from says how often the loop runs (LOOPS). What only one warp of four does is the line that asks for it.
Branches that are not taken (chunks without documents' starts) are found in the same way (SKIPPED). Lanes that
a predicate switches off count in full.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import pathlib
import re
import shutil
import subprocess
import tempfile
from typing import NamedTuple

from src.ops import build, toolchain

from .op_counts import segments
from .ptxas_report import demangle

CHUNK, WARPS = 16, 4
# H100 SXM: multiprocessors, schedulers of each (one instruction a clock), clock in Hz
SCHEDULERS, CLOCK = 132 * 4, 1.755e9
FUNCTION = re.compile(r"\.text\.(\S+):")
SUBROUTINE = re.compile(r"\s*(\$__internal\S+):")
LABEL = re.compile(r"(\.L_x_\d+):")
PLACE = re.compile(r'//## File "([^"]+)", line (\d+)')
INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*);")
BRANCH = re.compile(r"BRA.*`\((\.L_x_\d+)\)")
ACCESS = re.compile(r"\b(LDGSTS|LDG|STG)((?:\.\w+)*)")
# in a loop's source line -> how often the loop runs where a segment has so many chunks
LOOPS = {
    r"for \(int step = 0; step < segment\.count": lambda chunks: chunks,
    r"for \(int step = 0; step < STAGES - 1": lambda chunks: 3,
    r"i < 4;|level < LEVELS|levels\(": lambda chunks: 4,
}
ONE_WARP = re.compile(r"\bif \(n == \d")
SKIPPED = re.compile(r"\bif \(resets\)")


class Instruction(NamedTuple):
    text: str
    lines: tuple[
        tuple[str, int], ...
    ]  # (file, line) of the source, from the innermost function to the kernel


class Function(NamedTuple):
    name: str
    code: list[Instruction]
    loops: list[tuple[int, int]]  # (first, last) instruction


def find_nvdisasm() -> str:
    """nvdisasm of PATH, beside nvcc, else of the PyPI packages in this environment. Raises BuildError."""
    folders = [str(pathlib.Path(toolchain.find_nvcc().path).parent)]
    spec = importlib.util.find_spec("nvidia")
    for place in spec.submodule_search_locations if spec else ():
        folders += [str(part / "bin") for part in sorted(pathlib.Path(place).iterdir(), reverse=True)]
    for path in (None, *folders):
        if found := shutil.which("nvdisasm", path=path):
            return found
    raise toolchain.BuildError(
        "no nvdisasm beside nvcc or on PATH; pip install nvidia-cuda-nvdisasm brings one"
    )


def disassemble(source: pathlib.Path, arch: int) -> str:
    """The machine code of a .cu file, with the lines it comes from."""
    nvcc, disassembler = toolchain.find_nvcc(), find_nvdisasm()
    with tempfile.TemporaryDirectory() as folder:
        cubin = f"{folder}/out.cubin"
        flags = [*nvcc.compile_flags, "-O3", "-std=c++17", "-lineinfo", f"-arch=sm_{arch}", "-cubin"]
        for command in (
            [nvcc.path, *flags, str(source), "-o", cubin],
            [disassembler, "-gi", "-c", cubin],
        ):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{source}: {command[0]} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def functions(listing: str) -> list[Function]:
    """The kernels of a listing; subroutines (a division that does not fit in 32 bits) are left out."""
    found: list[Function] = []
    labels: dict[str, int] = {}
    lines: list[tuple[str, int]] = []
    fresh = inside = False
    for line in listing.splitlines():
        if start := FUNCTION.match(line):
            found.append(Function(start[1], [], []))
            labels, lines, fresh, inside = {}, [], False, True
        elif SUBROUTINE.match(line):
            inside = False
        elif not inside:
            continue
        elif label := LABEL.match(line):
            labels[label[1]] = len(found[-1].code)
        elif place := PLACE.search(line):
            lines = [*lines, (place[1], int(place[2]))] if fresh else [(place[1], int(place[2]))]
            fresh = True
        elif instruction := INSTRUCTION.match(line):
            fresh = False
            code = found[-1].code
            branch = BRANCH.search(instruction[2])
            target = labels.get(branch[1]) if branch else None
            if target == len(code):
                inside = False  # a branch to itself, after the end
                continue
            if target is not None:
                found[-1].loops.append((target, len(code)))
            if not instruction[2].startswith("NOP"):
                code.append(Instruction(instruction[2], tuple(lines)))
    return found


class Source:
    """The text of the sources, by file and line, and where they ask for one warp or for resets."""

    def __init__(self):
        self.text: dict[str, list[str]] = {}
        self.guards: dict[str, dict[int, float]] = {}

    def read(self, file: str) -> None:
        if file in self.text:
            return
        path = pathlib.Path(file)
        self.text[file] = lines = path.read_text().splitlines() if path.exists() else []
        self.guards[file] = guards = {}
        for i, line in enumerate(lines):
            weight = 1 / WARPS if ONE_WARP.search(line) else 0 if SKIPPED.search(line) else None
            if weight is None:
                continue
            last, depth = i, line.count("{") - line.count("}")
            while depth > 0 or (last == i and not line.rstrip().endswith(";")):
                last += 1
                depth += lines[last].count("{") - lines[last].count("}")
                if depth == 0 and lines[last].rstrip().endswith((";", "}")):
                    break
            for j in range(i + (weight == 0 and last > i), last + 1):
                guards[j + 1] = guards.get(j + 1, 1) * weight

    def line(self, place: tuple[str, int]) -> str:
        self.read(place[0])
        lines = self.text[place[0]]
        return lines[place[1] - 1] if place[1] <= len(lines) else ""

    def weight(self, lines: tuple[tuple[str, int], ...]) -> float:
        weight = 1.0
        for file, number in dict.fromkeys(lines):
            self.read(file)
            weight *= self.guards[file].get(number, 1)
        return weight


def moved(text: str) -> int:
    """Bytes that an instruction of a warp moves to or from global memory."""
    access = ACCESS.search(text)
    if not access:
        return 0
    for width, size in (("128", 16), ("64", 8), ("U16", 2), ("U8", 1), ("S8", 1)):
        if f".{width}" in access[2]:
            return 32 * size
    return 32 * 4


def count(function: Function, source: Source, chunks: int) -> dict:
    """What a warp runs: instructions, and bytes of global memory."""
    # several branches may close one loop of the source
    bodies: dict[tuple[str, int], set[int]] = {}
    runs: dict[tuple[str, int], float] = {}
    for first, last in function.loops:
        places = [place for i in (last, first) for place in function.code[i].lines]
        for place in places:
            known = [f for sign, f in LOOPS.items() if re.search(sign, source.line(place))]
            if known:
                bodies.setdefault(place, set()).update(range(first, last + 1))
                runs[place] = known[0](chunks)
                break
        else:
            texts = [source.line(place) for place in places]
            raise RuntimeError(f"{function.name}: no entry of LOOPS knows the loop {texts}")
    trips = [
        math.prod(runs[place] for place, body in bodies.items() if i in body)
        for i in range(len(function.code))
    ]
    weights = [t * source.weight(x.lines) for t, x in zip(trips, function.code, strict=True)]
    read = write = 0.0
    for w, x in zip(weights, function.code, strict=True):
        if "STG" in x.text:
            write += w * moved(x.text)
        else:
            read += w * moved(x.text)
    stores = [x.text for x in function.code if "STG" in x.text]
    return {
        "static": len(function.code),
        "instructions": sum(weights),
        "read": read,
        "written": write,
        "stores": {str(size): sum(moved(s) == 32 * size for s in stores) for size in (2, 4, 8, 16)},
    }


def scan_warps(heads: int) -> int:
    """Warps of a block of `scan`, as run_scan chooses them."""
    return 4 if heads >= 128 else 2 if heads >= 64 else 1


def report(path: pathlib.Path, arch: int, shape: tuple[int, ...], dtype: str) -> list[dict]:
    """One row a kernel of a tensor-core source."""
    B, T, H, _ = shape
    chunks = -(-T // CHUNK)
    segment = -(-chunks // segments(B, T, H))
    source, rows = Source(), []
    listed = functions(disassemble(path, arch))
    for function, name in zip(listed, demangle([x.name for x in listed]), strict=True):
        # sum_bonus runs once for a head, not for a chunk
        if {"bf16": "half", "fp16": "bfloat16"}[dtype] in name or name.startswith("sum_bonus"):
            continue
        warps = scan_warps(B * H)
        if "scan" in name and re.search(r", \d+>", name) and f", {warps}>" not in name:
            continue
        counted = count(function, source, segment)
        for key in ("instructions", "read", "written"):  # of all warps, for one chunk of one head
            counted[key] = counted[key] * WARPS / (segment if "scan" in name else 1)
        rows.append({"file": path.name, "arch": arch, "kernel": name} | counted)
    return rows


def total(rows: list[dict], shape: tuple[int, ...]) -> dict:
    """Instructions of the warps of a forward and a backward, and the ms of an H100's schedulers for them."""
    B, T, H, _ = shape
    per_chunk = {"forward": 0.0, "backward": 0.0}
    for row in rows:
        backward = "gradients" in row["kernel"] or "true" in row["kernel"]
        per_chunk["backward" if backward else "forward"] += row["instructions"]
    everything = {part: x * B * H * -(-T // CHUNK) for part, x in per_chunk.items()}
    issue = sum(everything.values()) / (SCHEDULERS * CLOCK) * 1e3
    return {"per_chunk": per_chunk, "instructions": everything, "issue_ms_h100": issue}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument(
        "sources", nargs="*", type=pathlib.Path, default=sorted(build.CUDA.glob("*_chunked.cu"))
    )
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--shape", nargs=4, type=int, default=(8, 4096, 32, 64), metavar=("B", "T", "H", "N"))
    parser.add_argument("--dtype", choices=("bf16", "fp16"), default="bf16")
    args = parser.parse_args()
    try:
        nvcc = toolchain.find_nvcc()
        found = {path: report(path, args.arch, args.shape, args.dtype) for path in args.sources}
    except toolchain.BuildError as error:
        raise SystemExit(f"sass_report: {error}") from None
    print(
        "| kernel | in the code | run for a chunk of a head | KB read | written | stores of 4, 8, 16 bytes |"
    )
    print("|---|---|---|---|---|---|")
    result = {}
    for path, rows in found.items():
        for row in rows:
            stores = ", ".join(str(row["stores"][size]) for size in ("4", "8", "16"))
            print(
                f"| {path.name}: {row['kernel']} | {row['static']} | {row['instructions']:.0f} |"
                f" {row['read'] / 1e3:.1f} | {row['written'] / 1e3:.1f} | {stores} |"
            )
        result[path.name] = total(rows, args.shape) | {"kernels": rows}
    for name, sums in result.items():
        forward, backward = (sums["instructions"][part] / 1e9 for part in ("forward", "backward"))
        print(
            f"{name} {tuple(args.shape)}: {forward:.3f} + {backward:.3f} G warp instructions,"
            f" {sums['issue_ms_h100']:.2f} ms of an H100's schedulers"
        )
    setup = {"arch": args.arch, "shape": args.shape, "dtype": args.dtype}
    found = {"report": "sass", "nvcc": toolchain.ask(nvcc.path).cuda} | setup | {"sources": result}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
