"""Settings of a run: their definitions, parsing and rules, and the launcher of the run.

Imports common only. Other rooms take the public names below from here; schema.py has the settings.
"""

from .parse import command, parse, save, settle, written_settings
from .schema import FIELDS, Config, accumulation, is_automatic
from .validate import validate

__all__ = [
    "FIELDS",
    "Config",
    "accumulation",
    "command",
    "is_automatic",
    "parse",
    "save",
    "settle",
    "validate",
    "written_settings",
]
