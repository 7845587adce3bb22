"""What a model is worth: loss on held-out text, scores of benchmarks."""
