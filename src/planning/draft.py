"""Draft of the settings while they are chosen: the typed ones, overlaid by those filled in."""

from __future__ import annotations

import dataclasses

from ..config import Config
from ..config.schema import CHOSEN
from ..sources import source_of
from ..sources.base import Source


class Draft:
    """The newest settings, `config`; a Config itself never changes."""

    def __init__(self, typed: Config):
        self.config = typed

    @property
    def source(self) -> Source:
        """Source of the examples, with the settings so far."""
        return source_of(self.config)

    def choose(self, name: str, value: object, reason: str) -> None:
        """Fill in a setting that was left to the program; one that was given stays as it is."""
        if self.config.is_automatic(name):
            self.change(name, value, reason)

    def change(self, name: str, value: object, reason: str) -> None:
        """Have another value than the one that was given, or none."""
        self.put(**{name: value}, origins={**self.config.origins, name: f"{CHOSEN}: {reason}"})

    def put(self, **values: object) -> None:
        """Set values whose origins stay: what was typed, in the form that the run needs."""
        self.config = dataclasses.replace(self.config, **values)
