"""Metrics for /metrics: Prometheus' text format, in its version 0.0.4."""

from __future__ import annotations

import bisect
import time
from collections import Counter
from collections.abc import Sequence

from ..common.available_memory import resident

SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Histogram:
    """Histogram of seconds: how often they were at most each of SECONDS."""

    def __init__(self):
        self.counts, self.total = [0] * (len(SECONDS) + 1), 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect.bisect_left(SECONDS, seconds)] += 1
        self.total += seconds

    def lines(self, name: str) -> list[str]:
        so_far, lines = 0, []
        for bound, count in zip([*map(str, SECONDS), "+Inf"], self.counts, strict=True):
            so_far += count
            lines.append(f'{name}_bucket{{le="{bound}"}} {so_far}')
        return [*lines, f"{name}_sum {self.total:.6f}", f"{name}_count {so_far}"]


class ServerMetrics:
    """Counts of one server. They belong to the event loop."""

    def __init__(self):
        self.started = time.time()
        self.requests: Counter[tuple[str, int]] = Counter()  # (route, status)
        self.prompt_tokens = self.cached_tokens = self.answer_tokens = 0
        self.gone = 0  # clients who left before their answer ended
        self.first_token, self.whole = Histogram(), Histogram()

    def left(self) -> None:
        self.gone += 1

    def refused(self, status: int) -> None:
        self.requests["refused", status] += 1  # whatever the path, which a stranger may have made up

    def text(self, gauges: Sequence[tuple[str, str, float]]) -> str:
        """Write all metrics; `gauges` are (name, help, value) from other parts."""
        lines: list[str] = []

        def say(name: str, kind: str, about: str, values: Sequence[str]) -> None:
            lines.extend([f"# HELP rwkv_{name} {about}", f"# TYPE rwkv_{name} {kind}", *values])

        requests = [
            f'rwkv_requests_total{{route="{route}",status="{status}"}} {count}'
            for (route, status), count in sorted(self.requests.items())
        ]
        say("requests_total", "counter", "Requests by route and status.", requests)
        for name, about, value in (
            ("prompt_tokens_total", "Tokens of prompts.", self.prompt_tokens),
            ("cached_tokens_total", "Tokens of prompts whose state was at hand.", self.cached_tokens),
            ("answer_tokens_total", "Tokens of answers.", self.answer_tokens),
            ("clients_gone_total", "Clients who left before their answer ended.", self.gone),
        ):
            say(name, "counter", about, [f"rwkv_{name} {value}"])
        for name, about, histogram in (
            ("first_token_seconds", "From a request to its first token.", self.first_token),
            ("request_seconds", "From a request to its last token.", self.whole),
        ):
            say(name, "histogram", about, histogram.lines(f"rwkv_{name}"))
        process_gauges = [
            ("start_time_seconds", "When the server started, in seconds since 1970.", self.started),
            ("resident_memory_bytes", "Memory that the process holds.", float(resident())),
        ]
        for name, about, value in [*gauges, *process_gauges]:
            say(name, "gauge", about, [f"rwkv_{name} {value:.15g}"])
        return "\n".join(lines) + "\n"
