"""One file per adapter method; importing this package registers them all."""

from . import lora, miss  # noqa: F401
