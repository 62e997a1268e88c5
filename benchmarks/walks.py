"""Walks through the code: the files and functions that a step, a save, a merge and a chat request enter.

    python -m benchmarks.walks [--files]

The demo's base trains on a few rows, trains on rewards for a few prompts, and answers streamed requests of
the server, under Python's profiler. The step is the third, counted from the end of the second, so that it
includes reading its batch, and its rollouts. The request is the second one. The adapter that is saved and
merged is a new one. --files lists the files. The last line is JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import signal
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable
from types import CodeType

from lightning.pytorch import Callback

import rwkv_miss
from demo import serve
from demo.task import rows as demo_rows
from src.config import Config
from src.model import RWKV
from src.run import prepare, train
from src.serving import program
from src.serving.listener import bound

from .common import argument_parser, report

ROOT = pathlib.Path(__file__).parent.parent
BASE, STEP = str(ROOT / "demo/rwkv7-reverse.pth"), 3
COMMON = dict(load_model=BASE, accelerator="cpu", lr_init=1e-3, epoch_steps=4, eval_samples=0)


class Walk:
    """Functions of this project that are entered while `on` is true."""

    def __init__(self):
        self.on, self.entered = False, set[CodeType]()

    def __call__(self, frame, event, arg) -> None:
        if self.on and event == "call":
            self.entered.add(frame.f_code)

    @property
    def functions(self) -> set[CodeType]:
        """Functions of src and rwkv_miss, without the bodies of modules and classes."""
        own = tuple(f"{ROOT / room}/" for room in ("src", "rwkv_miss"))
        return {code for code in self.entered if code.co_filename.startswith(own) and code.co_flags & 1}

    @property
    def files(self) -> list[str]:
        return sorted({str(pathlib.Path(code.co_filename).relative_to(ROOT)) for code in self.functions})


class OneStep(Callback):
    """Callback that records the walk of step number STEP."""

    def __init__(self, walk: Walk):
        self.walk = walk

    def on_train_batch_end(self, trainer, module, outputs, batch, index) -> None:
        self.walk.on = trainer.global_step == STEP - 1


def walk_of_step(folder: str, data: list[dict], **settings) -> Walk:
    """Train on rows, and return the walk of one step."""
    walk = Walk()
    plan = prepare(Config(proj_dir=folder, **COMMON, **settings), rows=data)
    sys.setprofile(walk)
    try:
        train(plan, callbacks=[OneStep(walk)])
    finally:
        sys.setprofile(None)
    return walk


def walks_of_adapter(folder: str) -> tuple[Walk, Walk]:
    """Return the walks of saving an adapter and of merging it into the demo's base."""
    model = RWKV.load(BASE)
    rwkv_miss.inject(model, "miss", rank=8)
    adapter = f"{folder}/adapter.pth"
    return (
        walk_of(lambda: rwkv_miss.save_adapter(model, adapter)),
        walk_of(lambda: rwkv_miss.merge_file(BASE, adapter, f"{folder}/merged.pth")),
    )


def walk_of(work: Callable[[], object]) -> Walk:
    walk = Walk()
    walk.on = True
    sys.setprofile(walk)
    try:
        work()
    finally:
        sys.setprofile(None)
    return walk


def walk_of_request() -> Walk:
    """Serve the demo's base, and return the walk of the second of two chat requests, each of two tokens."""
    walk = Walk()
    args = serve.parse(["--model", BASE, "--accelerator", "cpu"])
    listener = bound("127.0.0.1", 0)
    listener.listen()  # so that the first request waits until the server runs
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1/chat/completions"
    request = {"messages": [{"role": "user", "content": "reverse abc"}], "max_tokens": 2, "stream": True}

    def ask() -> None:
        try:
            for second in (False, True):
                walk.on = second
                body = json.dumps(request).encode()
                sent = urllib.request.Request(url, body, {"Content-Type": "application/json"})
                urllib.request.urlopen(sent, timeout=60).read()
                walk.on = False
                time.sleep(0.5)  # until the server has finished the request
        finally:
            os.kill(os.getpid(), signal.SIGINT)

    loaded = program.load(args)
    threading.setprofile(walk)
    sys.setprofile(walk)
    threading.Thread(target=ask).start()
    try:
        with contextlib.suppress(KeyboardInterrupt):
            program.serve(args, args.limits, listener, loaded)
    finally:
        threading.setprofile(None)
        sys.setprofile(None)
    return walk


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--files", action="store_true", help="list the files of each walk")
    args = parser.parse_args()
    questions = [{"question": f"{n} + {n}?", "answer": str(2 * n)} for n in range(20)]
    with tempfile.TemporaryDirectory() as folder:
        walks = {
            "a supervised step": walk_of_step(f"{folder}/sft", demo_rows("sort", 40, 1)),
            "a step on rewards": walk_of_step(f"{folder}/grpo", questions, loss="grpo", max_tokens=8),
            "a chat request": walk_of_request(),
        }
        walks["a save"], walks["a merge"] = walks_of_adapter(folder)
    for name, walk in walks.items():
        print(f"{name:20} {len(walk.files):3} files {len(walk.functions):4} functions")
        if args.files:
            print(*walk.files, sep="\n")
    report("walks", walks={name: [len(walk.files), len(walk.functions)] for name, walk in walks.items()})


if __name__ == "__main__":
    main()
