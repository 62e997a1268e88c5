"""Sources of a loss's examples: what a run reads or draws, what it costs, and how it is evaluated.

Imports common, config, ops, model, losses, data, distributed, inference and evaluation. base.py has what the
sources share. A loss names the file of its source, which alone is loaded.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from rwkv_miss.errors import UserError

from ..config import Config
from ..losses import LOSSES

if TYPE_CHECKING:
    from .base import Source


def source_of(config: Config) -> Source:
    """Return the source of --loss, with these settings. Raises UserError if the loss names no file here."""
    source = f"{__name__}.{LOSSES[config.loss].source}"
    try:
        return importlib.import_module(source).SOURCE(config)
    except ModuleNotFoundError as error:
        if error.name != source:
            raise
        raise UserError(f"--loss {config.loss} names a source without a file: {source}") from None
