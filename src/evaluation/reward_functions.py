"""Reward functions of a Python file, which run in a process of their own (reward_worker.py).

The file is the user's own code: it may print, raise, hang, crash or return nonsense. None of that stops the
caller, who gets a FunctionFailed with the reason. It is no sandbox: a function can do what its user can. So a
file comes only from the command line, never from data or a checkpoint.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import pathlib
import re
import selectors
import signal
import subprocess
import sys
import time
import weakref
from typing import Any

from rwkv_miss.errors import UserError, printable
from rwkv_miss.progress import clear

WORKER = pathlib.Path(__file__).with_name("reward_worker.py")
SIGNATURE = "def NAME(prompt: str, answers: list[str], right: str) -> list[float]"
LOADING = 60.0  # seconds for the import of a file, with its own imports
POLL = 0.1  # seconds between two checks whether the process lives
BRIEFLY = 0.5  # seconds in which a process reports its place, or ends by itself
LINES = 50  # lines of the functions' output in a call that are shown
CHUNK = 1 << 16  # bytes of a read, and of a write: a pipe holds as many
LONGEST_REPLY = 1 << 20  # bytes; the worker's own are shorter
MEDDLED = (
    "left its process without a way to reply; does it close or use file descriptors that are not its own, or"
    " change what Python has built in?"
)
LARGEST = 1e9  # the size of a reward: squares of larger numbers may overflow where answers are compared


class FunctionFailed(Exception):
    """Failure of a function to give rewards; `kind` is alike for reasons that the user needs to read once."""

    def __init__(self, kind: str, reason: str):
        super().__init__(reason)
        self.kind, self.reason = kind, reason


class TimedOut(Exception):
    """Timeout: no reply came in time."""


class Ended(Exception):
    """End of the process, which cannot reply any more."""


class RewardFunctions:
    """Reward functions `names` of a file; a call may take `seconds`.

    The bytes that were read first run to the end, even if the file changes. The process is started again
    after a failure that it did not survive.
    """

    def __init__(self, path: str, names: tuple[str, ...], seconds: float, reserved: tuple[str, ...] = ()):
        self.path, self.names, self.seconds, self.reserved = os.path.abspath(path), names, seconds, reserved
        self.source = read_source(path)
        self.digest = hashlib.sha256(self.source).hexdigest()
        self.worker: RewardProcess | None = None

    def start(self) -> None:
        """Import the file, unless its process is there already. Raises FunctionFailed for one that fails."""
        if self.worker and self.worker.process.poll() is not None:
            self.close()
        if self.worker:
            return
        self.worker = RewardProcess(os.path.basename(self.path))
        file = {"path": self.path, "source": self.source.decode("latin-1")}
        file |= {"names": self.names, "reserved": self.reserved}
        try:
            self._ask(file, max(LOADING, self.seconds), "")
        except FunctionFailed:
            self.close()
            raise

    def call(self, name: str, prompt: str, answers: list[str], right: str, **extras: list) -> list[float]:
        """Return a function's rewards for the answers to a prompt. Raises FunctionFailed without a number
        each.

        `extras` are `cut` and `tokens`, one value for each answer, for functions with such parameters.
        """
        self.start()
        message = {"name": name, "prompt": prompt, "answers": answers, "right": right, "extras": extras}
        reply = self._ask(message, self.seconds, name)
        values = reply.get("values")
        if not (isinstance(values, list) and list(map(type, values)) == [float] * len(answers)):
            self._kill()
            raise FunctionFailed(f"{name}: reply", f"{name} {MEDDLED}")
        for place, value in enumerate(values, 1):
            if not abs(value) <= LARGEST:  # also for NaN
                expected = (
                    f"a number between -{LARGEST:g} and {LARGEST:g}" if math.isfinite(value) else "a number"
                )
                raise FunctionFailed(
                    f"{name}: {value}",
                    f"{name} returned {value} for answer {place} of {len(values)}; expected {expected}",
                )
        return values

    def close(self) -> None:
        """End the process; it is given a moment to end by itself."""
        if self.worker:
            self.worker.close()
            self.worker = None

    def _ask(self, message: dict[str, Any], seconds: float, name: str) -> dict[str, Any]:
        """Return the reply to a message. Raises FunctionFailed after a timeout, or if it reports a
        failure."""
        whose = name or "its import"
        try:
            reply = self.worker.exchange(message, seconds)
        except TimedOut:
            where = self._place(self.worker.whereabouts(self.path))
            self._kill()
            raise FunctionFailed(
                f"{name}: time",
                f"{whose} took more than {seconds:g} s{where}; --reward_timeout N gives it more",
            ) from None
        except Ended:
            how = self.worker.how_it_ended()
            where = self._place(self.worker.place_of_crash(self.path))
            self._kill()
            reason = f"{whose} ended its process: {how}{where}" if how else f"{whose} {MEDDLED}"
            raise FunctionFailed(f"{name}: {how or 'reply'}", reason) from None
        except BaseException:  # Ctrl-C: the reply on its way belongs to no later message
            self._kill()
            raise
        if "refused" in reply:
            raise FunctionFailed(f"{name}: {reply.get('kind')}", reply["refused"])
        if "raised" in reply:
            raise FunctionFailed(f"{name}: {reply.get('kind')}", f"{whose} raised {reply['raised']}")
        return reply

    def _kill(self) -> None:
        self.worker.end()
        self.worker = None

    def _place(self, number: int | None) -> str:
        """Name a line of the file: ` (rewards.py, line 12: while True:)`."""
        if not number or os.path.dirname(self.path) == str(WORKER.parent):  # no business of the user's
            return ""
        lines = self.source.decode("utf-8", "replace").splitlines()
        line = lines[number - 1].strip() if number <= len(lines) else ""
        return f" ({os.path.basename(self.path)}, line {number}{line and f': {line}'})"


class RewardProcess:
    """Worker process, its pipes, and its output, which is shown after the file's name."""

    def __init__(self, name: str):
        self.name = name
        read_requests, self.requests = os.pipe()
        self.replies, write_replies = os.pipe()
        self.output, printed = os.pipe()
        worker_ends, own_ends = (read_requests, write_replies), (self.requests, self.replies, self.output)
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-u", WORKER, *map(str, worker_ends), str(os.getpid())],
                pass_fds=worker_ends,
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=printed,
                start_new_session=True,  # Ctrl-C of the terminal is for the run, which ends after a step
            )
        finally:
            for descriptor in (*worker_ends, printed):
                os.close(descriptor)
        for descriptor in own_ends:
            os.set_blocking(descriptor, False)
        self.printed = Printed(name)
        # also when the interpreter ends
        self.end = weakref.finalize(self, end_process, self.process, own_ends, os.getpid())

    def exchange(self, message: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Send a message and wait for the reply; output is shown meanwhile. Raises TimedOut, Ended."""
        rest, reply = memoryview(json.dumps(message).encode() + b"\n"), b""
        deadline = time.monotonic() + seconds
        self.printed = Printed(self.name)
        with selectors.DefaultSelector() as selector:
            selector.register(self.requests, selectors.EVENT_WRITE)
            selector.register(self.replies, selectors.EVENT_READ)
            selector.register(self.output, selectors.EVENT_READ)
            while not reply.endswith(b"\n"):
                if (left := deadline - time.monotonic()) <= 0:
                    raise TimedOut
                ready = [key.fd for key, _ in selector.select(min(left, POLL))]
                if self.output in ready and not self._show():
                    selector.unregister(self.output)
                if self.requests in ready:
                    rest = rest[self._write(rest[:CHUNK]) :]
                    if not rest:
                        selector.unregister(self.requests)
                if self.replies in ready:
                    reply += self._read_reply(LONGEST_REPLY - len(reply))
                # a child process may hold the pipes open
                if not ready and self.process.poll() is not None:
                    raise Ended
        self._show_the_rest()
        try:
            return dict(json.loads(reply))
        except (TypeError, ValueError):
            raise Ended from None

    def whereabouts(self, path: str) -> int | None:
        """Find the line of a file that is being run: faulthandler prints it when a signal arrives."""
        self.printed.tail.clear()
        with contextlib.suppress(OSError):
            self.process.send_signal(signal.SIGUSR1)
        deadline, place = time.monotonic() + BRIEFLY, None
        with selectors.DefaultSelector() as selector:
            selector.register(self.output, selectors.EVENT_READ)
            while not place and (left := deadline - time.monotonic()) > 0:
                if selector.select(left) and not self._show(hidden=True):
                    break
                place = line_of(path, self.printed.tail)
        return place

    def how_it_ended(self) -> str:
        """Say `exit code 3` or `signal SIGSEGV`; "" while it lives."""
        try:
            code = self.process.wait(BRIEFLY)
        except subprocess.TimeoutExpired:
            return ""
        if code >= 0:
            return f"exit code {code}"
        names = {number.value: number.name for number in signal.Signals}
        return f"signal {names.get(-code, -code)}"

    def place_of_crash(self, path: str) -> int | None:
        """Find the line of a file in which the process has crashed, from faulthandler's output."""
        self._show_the_rest()
        _, crashed, trace = self.printed.tail.rpartition(b"Fatal Python error")
        return line_of(path, trace) if crashed else None

    def close(self) -> None:
        """End the process, which has a moment to do so by itself."""
        with contextlib.suppress(Ended, subprocess.TimeoutExpired):
            self._write(b"null\n")
            self.process.wait(BRIEFLY)
        self._show_the_rest()
        self.end()

    def _write(self, part: memoryview | bytes) -> int:
        try:
            return os.write(self.requests, part)
        except BlockingIOError:
            return 0
        except OSError:
            raise Ended from None

    def _read_reply(self, most: int) -> bytes:
        chunk = os.read(self.replies, max(most, 0))
        if not chunk:
            raise Ended
        return chunk

    def _show(self, hidden: bool = False) -> bool:
        """Show output, or only keep it: as much as one read gives. Returns False if there is no more."""
        try:
            chunk = os.read(self.output, CHUNK)
        except BlockingIOError:
            return False
        self.printed.add(chunk, hidden)
        return bool(chunk)

    def _show_the_rest(self) -> None:
        """Show the output in the pipe, which a thread or another process may go on filling."""
        for _ in range(16):
            if not self._show():
                break
        self.printed.end()


class Printed:
    """Output of a file during a call: its first lines are shown on stderr, its last bytes are kept."""

    def __init__(self, name: str):
        self.name = name
        self.tail, self.partial, self.lines = bytearray(), b"", 0

    def add(self, chunk: bytes, hidden: bool) -> None:
        self.tail += chunk
        del self.tail[: -2 * CHUNK]
        if self.lines <= LINES and not hidden:
            *lines, self.partial = (self.partial + chunk).split(b"\n")
            for line in lines:
                self._line(line)
            if len(self.partial) > CHUNK:
                self.end()

    def end(self) -> None:
        """End a last line without an end."""
        if self.partial:
            self._line(self.partial)
            self.partial = b""

    def _line(self, line: bytes) -> None:
        self.lines += 1
        if self.lines > LINES + 1:
            return
        clear()
        # a model's text may be printed, so it must not control the terminal
        text = f"{self.name}: {printable(line.decode('utf-8', 'replace'))}"
        if self.lines > LINES:
            text = f"note: the reward functions print more than {LINES} lines; the rest is left out"
        print(text, file=sys.stderr, flush=True)


def line_of(path: str, trace: bytes) -> int | None:
    """Return the number of the innermost line of a file in a trace by faulthandler."""
    match = re.search(rb'File "%b", line (\d+)' % re.escape(os.fsencode(path)), trace)
    return int(match[1]) if match else None


def end_process(process: subprocess.Popen, descriptors: tuple[int, ...], owner: int) -> None:
    """Kill a process with its children, and close its pipes. A fork of its owner does nothing."""
    if os.getpid() != owner:
        return
    kill_group(process)
    for descriptor in descriptors:
        os.close(descriptor)


def kill_group(process: subprocess.Popen) -> None:
    """Kill a process that leads a session, with all that it has started."""
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(BRIEFLY)


def read_source(path: str) -> bytes:
    """Read the bytes of a file of functions. Raises UserError if it can't be read."""
    try:
        return pathlib.Path(path).read_bytes()
    except OSError as error:
        fault = (
            "there is no such file" if isinstance(error, FileNotFoundError) else str(error.strerror).lower()
        )
        raise UserError(
            f"--reward_file {path}: {fault}; expected a Python file with the functions that --rewards names:"
            f" {SIGNATURE}"
        ) from None
