"""Text in and out: a model with its adapters, sampling, conversations, fast single tokens.

Imports common, config, ops, model and data; never Lightning or DeepSpeed.
"""
