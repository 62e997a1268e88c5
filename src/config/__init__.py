"""Settings of a run: their definitions, parsing and rules, and the launcher of the run.

Imports common and losses. Other rooms take the public names below from here; schema.py has the settings.
"""

from ..common.option import AUTO
from .parse import command, parse, recorded_settings, save, settle
from .schema import FIELDS, Config, Settled
from .validate import validate

__all__ = [
    "AUTO",
    "FIELDS",
    "Config",
    "Settled",
    "command",
    "parse",
    "recorded_settings",
    "save",
    "settle",
    "validate",
]
