"""Training on rewards: answers that the model samples, what they are worth, and the steps on them."""
