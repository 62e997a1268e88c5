"""Draft of the settings while they are chosen: the typed ones, overlaid by those filled in."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from ..config import Config, is_automatic

CHOSEN = "chosen"  # beginning of the origin of a setting that the program has chosen


class Draft:
    """Settings with the origin of each. `config` is the newest of them; a Config itself never changes."""

    def __init__(self, typed: Config, origins: Mapping[str, str] | None = None):
        self.config, self.origins = typed, dict(origins or {})

    def choose(self, name: str, value: object, reason: str) -> None:
        """Fill in a setting that was left to the program; one that was given stays as it is."""
        if is_automatic(self.config, name):
            self.put(**{name: value})
            self.origins[name] = f"{CHOSEN}: {reason}"

    def put(self, **values: object) -> None:
        """Set values whose origins stay: what was typed, in the form that the run needs."""
        self.config = dataclasses.replace(self.config, **values)
