"""The settings of a run, and the path from a Hydra recipe to a validated configuration."""
