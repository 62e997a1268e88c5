"""Parser of HTTP/1.1 by h11, without what h11 leaves to be read in two ways.

A proxy before the server must find the same requests in a connection as the server does. Otherwise a client
can hide a request in the body of another one.
"""

from __future__ import annotations

import re

import h11
from h11._receivebuffer import ReceiveBuffer

LONE_LF = re.compile(rb"(?<!\r)\n")


class WholeLines(ReceiveBuffer):
    """Buffer that refuses a head, or a chunked body's end, whose lines can be read in two ways.

    h11 takes equal lengths as one, and a line that begins with a blank as a part of the line before.
    """

    def maybe_extract_lines(self) -> list[bytearray] | None:
        head, end, _ = bytes(self).partition(b"\r\n\r\n")
        if LONE_LF.search(head + end):
            raise h11.LocalProtocolError("a line ends without CR")
        lines = super().maybe_extract_lines()
        lengths = [line for line in lines or () if line.lower().startswith(b"content-length:")]
        if len(lengths) > 1 or b"," in b"".join(lengths):
            raise h11.LocalProtocolError("Content-Length is given more than once")
        if any(line.startswith((b" ", b"\t")) for line in lines or ()):
            raise h11.LocalProtocolError("a line begins with a blank")
        return lines


class HttpParser(h11.Connection):
    """Parser of a server's connection. next_event() raises RemoteProtocolError for doubtful requests."""

    def __init__(self):
        super().__init__(h11.SERVER)
        self._receive_buffer = WholeLines()

    def next_event(self):
        event = super().next_event()
        if isinstance(event, h11.Request):
            names = {name for name, _ in event.headers}
            if {b"content-length", b"transfer-encoding"} <= names:
                raise h11.RemoteProtocolError("Content-Length and Transfer-Encoding both tell the length")
        return event
