"""Sources of a loss's examples: what a run reads or draws, what it costs, and how it is evaluated.

Imports common, config, ops, model, losses, data, distributed, inference and evaluation. base.py has what the
sources share, kinds.py tells which one a run has.
"""
