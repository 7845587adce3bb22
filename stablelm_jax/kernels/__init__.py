"""How the hot parts run on each chip, each with a plain reference beside it. Arrays only."""
