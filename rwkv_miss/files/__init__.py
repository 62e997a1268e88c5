"""Files: checkpoints and safetensors, read with care and written whole; what they are and whose they are.

Imports only errors, interrupts and progress from the rest of the package.
"""
