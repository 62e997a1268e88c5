"""Settings of a run: their definitions, parsing and rules, and the launcher of the run.

Imports common only. Other rooms take the public names below from here; schema.py has the settings.
"""

from .option import AUTO
from .parse import command, parse, recorded_settings, save, settle
from .schema import FIELDS, Config, accumulation, is_automatic, value_or_zero, written
from .validate import validate

__all__ = [
    "AUTO",
    "FIELDS",
    "Config",
    "accumulation",
    "command",
    "is_automatic",
    "parse",
    "recorded_settings",
    "save",
    "settle",
    "validate",
    "value_or_zero",
    "written",
]
