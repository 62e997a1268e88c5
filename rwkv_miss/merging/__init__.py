"""Base + adapters -> merged file, and back: merge, rounding losses, unmerge, diff, and their commands.

These modules import the whole package; only its command imports them.
"""
