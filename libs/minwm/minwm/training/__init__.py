"""Training: one file per stage, one loop, one engine."""
