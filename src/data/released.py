"""Released G1 models, by the names of their files: the modes of RWKV's template in their training."""

from __future__ import annotations

import os
import re
from typing import NamedTuple

from .chat_template import Template
from .rwkv_template import RwkvTemplate

NAME = re.compile(r"rwkv7-g1([a-z]?)\d*-[\d.]+b-(\d{8})-ctx\d+\.pth")
# mode -> its form in the first weights that know it
FIRST_FORMS = {f"think-{length}": f"think-{length}-2025" for length in ("normal", "short", "long")}
FIRST_LENGTHS = "20250922"  # the date of these weights
PARENTHESES, FLOWERS = "c", "h"  # the letters of the first models that know them


class Released(NamedTuple):
    """Released model."""

    file: str
    name: str  # G1, G1a, ...
    modes: tuple[str, ...]  # modes of its training


def released(path: str) -> Released | None:
    """Recognise a model by the name of its file; None for any other name."""
    file = os.path.basename(path)
    match = NAME.fullmatch(file)
    if not match:
        return None
    letter, date = match.groups()
    modes = ["rwkv", "think", "fake-think", "fake-think-compact"]
    if letter >= PARENTHESES:
        modes += FIRST_FORMS
    elif date >= FIRST_LENGTHS:
        modes += FIRST_FORMS.values()
    if letter >= FLOWERS:
        modes += ["flower", "flower-fake-think"]
    return Released(file, f"G1{letter}", tuple(modes))


def modes_note(path: str, template: Template) -> str:
    """Describe the modes of a released model, and the chosen ones, in a sentence; "" for any other file."""
    release = released(path)
    if not release:
        return ""
    note = f"{release.file} is a released {release.name}, trained with --template {', '.join(release.modes)}"
    if not isinstance(template, RwkvTemplate):
        return f"{note}; chosen is Jinja, {template.name}"
    if template.name in release.modes:
        return f"{note}; chosen is {template.name}"
    other = {**FIRST_FORMS, **{first: name for name, first in FIRST_FORMS.items()}}.get(template.name)
    advice = f"; --template {other} is its form" if other in release.modes else ""
    return f"{note}, not with {template.name}, which is chosen{advice}"
