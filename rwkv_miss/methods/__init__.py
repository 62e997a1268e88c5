"""One file per adapter method; importing this package registers them all."""

from . import lora, miss, state  # noqa: F401
