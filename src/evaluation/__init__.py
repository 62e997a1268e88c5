"""Evaluation of a model: right answers, likelihoods, lm-evaluation-harness, distance from the base.

Imports common, config, ops, model, losses, data and inference.
"""
