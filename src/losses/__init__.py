"""Losses, one file each: what is minimised, with its options, its checks and its words.

Imports common, ops and model. Every file here but base.py, metrics.py, options.py and those that begin with
"_" is a loss; no list names them. config/ makes flags of their options, src/sources reads what they need.
"""

import importlib
import pkgutil

from .base import LOSSES, Loss, help_of, loss_of, options_of

OWN = ("base", "metrics", "options")

for module in pkgutil.iter_modules(__path__):
    if module.name not in OWN and not module.name.startswith("_"):
        importlib.import_module(f"{__name__}.{module.name}")

__all__ = ["LOSSES", "Loss", "help_of", "loss_of", "options_of"]
