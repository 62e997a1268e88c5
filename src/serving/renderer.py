"""Renderer of answers in a process of its own.

A text that is slow to render, by intent or not, then holds neither the engine nor the event loop, and can be
ended: rendering.py ends itself after two seconds of a CPU.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import pathlib
import subprocess
import sys

from .errors import Refused, wrong

ROOT = pathlib.Path(__file__).parents[2]
COMMAND = (sys.executable, "-m", "src.serving.rendering")
# module -> package that has it
PACKAGES = {
    "markdown_it": "markdown-it-py",
    "mdit_py_plugins": "mdit-py-plugins",
    "nh3": "nh3",
    "pygments": "Pygments",
    "latex2mathml": "latex2mathml",
}
MOST_BYTES = 256 << 10  # bytes of one request
WAIT_SECONDS = 30.0  # the longest wait for one text, including the texts before it
REPLY_BYTES = 64 << 20


def missing_packages() -> list[str]:
    """List the packages that rendering.py needs and that are not installed."""
    return [package for module, package in PACKAGES.items() if not importlib.util.find_spec(module)]


def plain_note() -> str:
    """Say why answers on the page will be plain text; "" if they won't."""
    if missing := missing_packages():
        packages = " ".join(missing)
        return f"the chat page shows answers as plain text; for Markdown and formulas: pip install {packages}"
    return ""


class Renderer:
    """Process that renders one text at a time. It starts with the first one."""

    def __init__(self) -> None:
        self.missing = missing_packages()
        self.lock = asyncio.Lock()
        self.process: asyncio.subprocess.Process | None = None

    async def html(self, markdown: str, unfinished: bool) -> str:
        """Render a text. Raises Refused if that can't be done, or takes too long."""
        if self.missing:
            raise Refused(
                501, f"answers are plain text without {', '.join(self.missing)}", code="no_renderer"
            )
        line = json.dumps([markdown, unfinished]).encode() + b"\n"
        try:
            reply = await asyncio.wait_for(self._ask(line), WAIT_SECONDS)
        except asyncio.TimeoutError:
            reply = b""
        if not reply:
            raise Refused(503, "this text can't be rendered in time", code="render_timeout")
        html = json.loads(reply)
        if html is None:
            raise wrong("text", "can't be rendered: it has broken characters, or is nested too deeply")
        return html

    async def _ask(self, line: bytes) -> bytes:
        """Send a line and return the answer: b"" if the process has ended."""
        async with self.lock:
            reply = b""
            try:
                self.process = self.process or await self._start()
                self.process.stdin.write(line)
                await self.process.stdin.drain()
                reply = await self.process.stdout.readline()
            except ConnectionError:
                pass  # the process has ended
            finally:
                if not reply:  # also if this call was cancelled: the next call must not read its answer
                    await self.close()
            return reply

    async def _start(self) -> asyncio.subprocess.Process:
        pipe = subprocess.PIPE
        # a session of its own: Ctrl-C is for the server
        return await asyncio.create_subprocess_exec(
            *COMMAND, cwd=ROOT, stdin=pipe, stdout=pipe, limit=REPLY_BYTES, start_new_session=True
        )

    async def close(self) -> None:
        process, self.process = self.process, None
        if not process:
            return
        if process.returncode is None:
            process.kill()
        await process.communicate()
