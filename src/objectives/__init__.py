"""The kinds of training: what each reads, minimises, measures and evaluates.

Imports common, config, ops, model, data, distributed, inference and evaluation. base.py has what the kinds
share, preferences/ and rewards/ what one of them has.
"""
