"""Adapter methods, one file each; importing this package registers them all."""

from . import (  # noqa: F401
    adalora,
    bat,
    dora,
    lora,
    lora_fa,
    miss,
    mora,
    mos,
    pissa,
    prolora,
    state,
    vera,
)
