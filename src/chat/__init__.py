"""Chat in a terminal: its input and output.

Imports common, data, inference and evaluation.
"""
