"""Runs of the project on the device with numbers, each in a process forked from one that has the stub.

`Gpu` starts that process and asks it; gpu_emulation/test_cuda_runs.py has the runs.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

from . import stub

FINDING = "FOUND IN THE KERNELS:"


class Gpu:
    """The process, to whose functions (on_cuda.py) calls go: gpu("train", flags) -> (exit code, output).

    Raises stub.Unavailable.
    """

    def __init__(self, log: pathlib.Path):
        self.log = log
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gpu_emulation.fake_gpu.serve"],
            cwd=pathlib.Path(__file__).parent.parent.parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
        )
        if (answer := self.process.stdout.readline()) != "ready\n":
            raise stub.Unavailable(answer) if answer else RuntimeError(log.read_text()[-2000:])

    def __call__(self, function: str, *arguments) -> tuple[int, str]:
        print(json.dumps([function, arguments], default=str), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        assert answer, self.log.read_text()[-2000:]
        code, output = json.loads(answer)
        assert FINDING not in output, output
        return code, output

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # an imported module may print
    try:
        stub.load()
    except stub.Unavailable as reason:
        print(reason, file=answers, flush=True)
        sys.exit(1)
    from . import on_cuda  # imports torch, which has to come after the stub

    on_cuda.install()
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        function, arguments = json.loads(line)
        print(json.dumps(getattr(on_cuda, function)(*arguments)), file=answers, flush=True)


if __name__ == "__main__":
    main()
