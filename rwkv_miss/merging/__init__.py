"""Base + adapters -> merged file, and back: merge, rounding losses, unmerge, diff, and their commands.

Imports all of the package; only the package's command imports it.
"""
