"""Several processes and machines: DeepSpeed also on a CPU, ranks that compare settings, ranks that die.

Imports common and config.
"""
