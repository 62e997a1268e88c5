"""Rules for processes: none outlives its launcher, and machines meet on the right network interface."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import sys
import threading
from collections.abc import Iterator

from rwkv_miss.errors import UserError

from ..config.launcher import launched, whole_number

with contextlib.suppress(ImportError):
    import fcntl  # not on Windows


def choose_interface(master: str) -> None:
    """Make gloo use the network interface from which the first machine is reached.

    By itself gloo takes the address of the host's name. On many systems that is the loopback's, 127.0.1.1.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ or sys.platform != "linux":
        return
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            # nothing is sent; the socket now has the address that it would send from
            probe.connect((master, 9))
            own_address = probe.getsockname()[0]
            names = [name for _, name in socket.if_nameindex() if _address_of(name, probe) == own_address]
    except OSError as error:
        raise UserError(
            f"MASTER_ADDR {master} can't be reached from this machine ({error}); give the first machine's"
            " address in a network that all of them share"
        ) from None
    if own_address.startswith("127."):
        raise UserError(
            f"MASTER_ADDR {master} is {own_address} on this machine, where no other one reaches it; give its"
            " address in the network, or name the network's interface in GLOO_SOCKET_IFNAME"
        )
    os.environ["GLOO_SOCKET_IFNAME"] = names[0]


def _address_of(interface: str, probe: socket.socket) -> str:
    """Return the IPv4 address of a network interface; "" without one."""
    get_address = 0x8915  # SIOCGIFADDR of linux/sockios.h: struct ifreq, the address at byte 20
    try:
        request = struct.pack("256s", interface.encode())
        return socket.inet_ntoa(fcntl.ioctl(probe, get_address, request)[20:24])
    except OSError:
        return ""


@contextlib.contextmanager
def watching_launcher() -> Iterator[None]:
    """End this process when its parent is gone, until the block is over or is left by SystemExit.

    After another error the watch goes on: the process may hang while it ends.
    Otherwise it would wait for ranks that never come, and keep its memory. This is for children of torchrun,
    deepspeed and Lightning. A process that was started from a shell may outlive the shell. After a run the
    first process may end before its children: that is no crash.
    """
    launch = launched()
    by_lightning = launch is None and whole_number("LOCAL_RANK") > 0
    by_launcher = launch is not None and launch.by in ("torchrun", "deepspeed")
    if sys.platform == "win32" or not (by_lightning or by_launcher):
        yield
        return
    parent, over = os.getppid(), threading.Event()
    # Lightning starts its children in its own process group. A parent in another group has adopted an orphan.
    if by_lightning and os.getpgid(parent) != os.getpgrp():
        _end_as_orphan()

    def watch() -> None:
        while not over.wait(0.5):
            if os.getppid() != parent and not over.is_set():
                _end_as_orphan()

    threading.Thread(target=watch, daemon=True, name="watch-launcher").start()
    try:
        yield
        over.set()
    except SystemExit:  # the run is stopped
        over.set()
        raise


def _end_as_orphan() -> None:
    rank = os.environ.get("RANK") or os.environ.get("LOCAL_RANK")
    print(
        f"error: rank {rank} ends, because the process that started it is gone: it was killed, perhaps for"
        " memory",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)
