"""How weights change: the learning rate of each step, and the optimizer."""
