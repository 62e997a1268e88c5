"""Training on preferences: the values of a reference, and KTO's baseline."""
