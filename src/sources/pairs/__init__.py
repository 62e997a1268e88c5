"""Pairs of answers, or single ones with a label, and KTO's baseline."""
