"""Memory, traffic and time of a layout, reckoned before any GPU is taken."""
