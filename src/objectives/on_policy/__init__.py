"""On-policy distillation: answers that the model samples, and a teacher that reads them."""
