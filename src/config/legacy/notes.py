"""Notes about the command line of another trainer, in two lists: what changes the result, and the rest."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable


@dataclasses.dataclass
class Notes:
    """Notes for the user."""

    differences: list[str] = dataclasses.field(default_factory=list)  # a training that differs
    translations: list[str] = dataclasses.field(default_factory=list)  # equal training

    def explain_there(self, trainer: str) -> None:
        """Say first in a list which trainer its notes call "there"."""
        for notes in (self.differences, self.translations):
            if _say_there(notes):
                notes.insert(0, f'"there" is {trainer}, for which this command was written')
                return


def _say_there(notes: Iterable[str]) -> bool:
    return any(re.search(r"\bthere\b(?! (is|are)\b)", note) for note in notes)
