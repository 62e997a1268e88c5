"""A chat in a terminal: what can be typed, and what is printed.

Imports common, data, inference and evaluation.
"""
