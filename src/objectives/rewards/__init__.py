"""Training on rewards: answers that the model samples, their rewards, and the steps on them."""

SAMPLES = "samples.jsonl"  # the file of some rollouts, in a run's folder
