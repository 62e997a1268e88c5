"""Several processes and machines: DeepSpeed also on a CPU, ranks that compare, ranks that die.

Imports common and config.
"""
