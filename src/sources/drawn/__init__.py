"""Questions and drawn answers: what draws them, what judges or teaches them, and the steps on them."""

SAMPLES = "samples.jsonl"  # the file of some rollouts, in a run's folder
