"""Training on rewards: answers that the model samples, their rewards, and the steps on them."""
