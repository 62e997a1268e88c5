"""Watchdog: processes of several machines, or of a launcher, end together.

Each holds a connection to rank 0, which breaks when its process ends. A launcher looks after its own machine
only. gloo reports a lost peer when the next collective begins, NCCL perhaps after half an hour. Before the
process group exists nothing reports it: a rank that fails while it reads its data would leave the others
waiting. Lightning's processes on one machine need none of this: see processes.watching_launcher().
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import secrets
import socket
import sys
import threading
import time
from typing import TextIO

from torch.distributed import DistError, TCPStore

from rwkv_miss.errors import UserError

from ..config.launcher import check_world, launched

BYE = "bye"
MEET_MINUTES = 30  # that a machine waits for the first one, as torch does for a process group
BRIEFLY = 0.5  # seconds in which two ends of a connection hear of each other
# seconds in which a process may end by itself, with its own traceback, once another one has ended
GRACE = 5.0
PATIENCE = 30.0  # seconds before a process says which one it waits for
LATECOMERS = 10.0  # seconds that a failing rank 0 waits for ranks that are still starting


def watchdog(devices: int, num_nodes: int) -> contextlib.AbstractContextManager:
    """Return the context of the whole run in this process.

    It does nothing in a process that Lightning started, and on one machine without a launcher.
    """
    world, launch, env = check_world(devices, num_nodes), launched(), os.environ
    if launch and world > 1:
        if launch.by == "srun":
            # Lightning knows how SLURM writes lists of machines
            from lightning.fabric.plugins.environments import SLURMEnvironment

            slurm = SLURMEnvironment(auto_requeue=False)
            return Watchdog(slurm.global_rank(), world, slurm.main_address, slurm.main_port)
        return Watchdog(int(env["RANK"]), world, env["MASTER_ADDR"], int(env["MASTER_PORT"]))
    if num_nodes > 1 and "LOCAL_RANK" not in env:
        number, address, port = int(env["NODE_RANK"]), env["MASTER_ADDR"], int(env["MASTER_PORT"])
        return Watchdog(number, num_nodes, address, port, "machine")
    return contextlib.nullcontext()


class Watchdog:
    """Connections between the members of a run, which are numbered from 0.

    They all connect to number 0 at `address`. Torch's own store at `port` tells them the port.
    """

    def __init__(self, number: int, members: int, address: str, port: int, kind: str = "rank"):
        self.number, self.members, self.address, self.port = number, members, address, port
        self.name = f"{kind} {number} ({socket.gethostname()})"
        self.lines: list[socket.socket] = []  # to all others from number 0, to number 0 from all others
        self.lock = threading.Lock()
        self.over = False
        self.reason, self.failure = "", ""  # why another process ended, and why this one does

    def __enter__(self) -> Watchdog:
        reminder = threading.Timer(PATIENCE, self._remind)
        reminder.daemon = True
        reminder.start()
        # torchrun has the store already; else the process group will share this one
        is_host = self.number == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        try:
            self.store = TCPStore(
                self.address,
                self.port,
                is_master=is_host,
                wait_for_workers=False,
                multi_tenant=True,
                timeout=datetime.timedelta(minutes=MEET_MINUTES),
            )
            key = self._serve() if self.number == 0 else self._connect()
        except (DistError, OSError) as error:
            problem = f"{self.name} does not reach the first one at {self.address}:{self.port}"
            if is_host:
                problem = f"{self.name} can't open port {self.port}"
            raise UserError(
                f"{problem} ({str(error).splitlines()[0]}); MASTER_ADDR and MASTER_PORT must be the first"
                " machine's address in a network of all machines and a free port there, and no firewall may"
                " be between them"
            ) from None
        self.folder_key, self.commits_key = f"folder {key}", f"commits {key}"
        return self

    def _serve(self) -> str:
        """Open a port for the others, as number 0; returns the key that a caller needs to be a member."""
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        server = socket.create_server(("", 0), family=family, dualstack_ipv6=dual)
        key = secrets.token_hex(16)
        self.store.set("watchdog", f"{server.getsockname()[1]} {key}")
        self._start(self._accept, server, key)
        return key

    def _connect(self) -> str:
        """Connect to number 0, as any other member; returns the key."""
        port, _, key = self.store.get("watchdog").decode().partition(" ")
        line = socket.create_connection((self.address, int(port)), timeout=60)
        line.settimeout(None)
        line.sendall(f"{key} {self.name}\n".encode())
        self._hold(line)
        first = self.name.partition(" ")[0] + " 0"
        self._start(self._listen, line.makefile(encoding="utf-8", errors="replace"), first)
        return key

    def tell_folder_is_held(self) -> None:
        """Let the others look into the run's folder, as number 0."""
        self.store.set(self.folder_key, "held")

    def wait_for_folder(self) -> None:
        """Wait until number 0 holds the run's folder, so that all see the same in it."""
        self._wait_for(self.folder_key, "held --proj_dir")

    def tell_hub_commits(self, names: dict[str, str]) -> None:
        """Tell the others the commits of the hub's files of this run, as number 0."""
        self.store.set(self.commits_key, json.dumps(names))

    def wait_for_hub_commits(self) -> dict[str, str]:
        """Wait for the commits that number 0 has found."""
        return json.loads(self._wait_for(self.commits_key, "knew its files"))

    def _wait_for(self, key: str, what: str) -> bytes:
        """Wait for a value in the store; `what` number 0 did when it set it."""
        try:
            return self.store.get(key)
        except DistError:
            raise UserError(f"the first process ended before it {what}; its own message says why") from None

    def __exit__(self, kind, error, trace) -> None:
        if kind is None or issubclass(kind, SystemExit):
            self._part(BYE)
            return
        self.failure = _one_line(str(error) if isinstance(error, UserError) else f"{kind.__name__}: {error}")
        # a lost connection is a consequence; its cause is about to arrive
        time.sleep(BRIEFLY)
        patience = time.monotonic() + LATECOMERS
        while self.number == 0 and len(self.lines) < self.members - 1 and time.monotonic() < patience:
            time.sleep(0.1)
        self._part(f"{self.name} failed: {self.failure}")
        self._tell()

    def _remind(self) -> None:
        if self.number == 0:
            missing = self.members - 1 - len(self.lines)
            whom = f"{missing} of {self.members - 1} others"
        else:
            missing = not self.lines
            whom = "the first one"
        if missing and not self.over:
            print(
                f"note: {self.name} waits for {whom}, to meet at {self.address}:{self.port}",
                file=sys.stderr,
                flush=True,
            )

    def _start(self, work, *args) -> None:
        threading.Thread(target=work, args=args, daemon=True, name="watchdog").start()

    def _accept(self, server: socket.socket, key: str) -> None:
        while True:
            line, _ = server.accept()
            self._start(self._welcome, line, key)

    def _welcome(self, line: socket.socket, key: str) -> None:
        file = line.makefile(encoding="utf-8", errors="replace")
        sent_key, _, name = file.readline(1000).strip().partition(" ")
        if sent_key == key:
            self._hold(line)
            self._listen(file, name)

    def _hold(self, line: socket.socket) -> None:
        # a machine that lost its power or network closes no connection; keepalive notices it
        line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, seconds in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, option):
                line.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), seconds)
        self.lines.append(line)

    def _listen(self, file: TextIO, name: str) -> None:
        """Wait until the other end says goodbye or why it failed, or the connection breaks."""
        try:
            line = file.readline().strip()
        except OSError:
            line = ""
        if line == BYE:
            return
        unsaid = "it was killed, perhaps for memory, or its machine can't be reached any more"
        reason = line or f"{name} ended without a word: {unsaid}"
        if self._part(reason):
            self.reason = reason
            if line:
                time.sleep(2 * BRIEFLY)  # time for what happens to all of them
            self._tell()
            time.sleep(GRACE)
            os._exit(1)

    def _part(self, word: str) -> bool:
        """Tell the others; returns False if that was done already."""
        with self.lock:
            first, self.over = not self.over, True
        if not first:
            return False
        for line in self.lines:
            with contextlib.suppress(OSError):
                line.sendall(f"{_one_line(word)}\n".encode())
        return True

    def _tell(self) -> None:
        """Print once why another member ended, unless this one ends for the same reason.

        A wrong command ends all of them.
        """
        with self.lock:
            reason, self.reason = self.reason, ""
        if reason and not (self.failure and reason.endswith(self.failure)):
            print(f"error: {reason}", file=sys.stderr, flush=True)


def _one_line(text: str) -> str:
    return " ".join(text.split())
