"""Option: a setting of a run, which is a flag with more places where it may be set."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

from rwkv_miss.flags import flag


class Auto(enum.Enum):
    """The value of a number or mapping that is left to the program; it is neither a number nor true or false.

    The command line and YAML have 0, -1 or auto for it, as the help says.
    """

    AUTO = "auto"

    def __bool__(self) -> bool:
        raise TypeError("AUTO has no truth value: ask Config.is_automatic(), or take Config.settled()")


AUTO = Auto.AUTO


def opt(
    default: Any,
    help: str,
    automatic: bool = False,
    words: dict[str, Any] | None = None,
    bare: Any = None,
    file: bool = False,
    operator: bool = False,
    **declared: Any,
) -> Any:
    """Make a setting: a flag that is also a key of YAML and a field of the training page.

    `automatic`: the default leaves the choice to the program (src/planning/defaults.py); a Config then has
    AUTO, or "auto" where the setting is a text. `words`: values that may be given as a word. `bare`: the
    value of a name without one in a mapping. `file`: the setting names a file or a folder that is read.
    `operator`: it runs code, names a place to write, or is about the process itself; a server's page may not
    set it. `declared`: the other names, choices and bounds, as for every flag.
    """
    value = AUTO if automatic and not isinstance(default, str) else default
    # the default in files and in the help
    more = {"type": type(default), "written": default, "automatic": automatic, "words": words or {}}
    return flag(value, help, bare=bare, file=file, operator=operator, **more, **declared)


def shared(setting: dataclasses.Field, more: str = "") -> Any:
    """Declare the flag of another program for a setting; `more` ends its help."""
    bounds = dataclasses.asdict(setting.metadata["bounds"])
    return flag(setting.default, (setting.metadata["help"] + more).replace("%", "%%"), **bounds)
