"""Files: checkpoints and safetensors, read with care and written whole; their kinds and their identity.

Imports only errors, interrupts and progress from the rest of the package.
"""
