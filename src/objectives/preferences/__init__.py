"""Training on preferences, and KTO's baseline."""
