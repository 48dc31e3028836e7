"""Every setting of a run, and the way from a Hydra recipe to a checked configuration."""
