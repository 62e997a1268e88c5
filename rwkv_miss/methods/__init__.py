"""One file per adapter method; importing this package registers them all."""

from . import lora, lora_fa, miss, state  # noqa: F401
