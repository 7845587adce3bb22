"""What a model is worth: loss and bits per byte on held-out text."""
