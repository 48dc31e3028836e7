"""Checkpoints of training runs: written while training continues, read by any parallel layout."""

import megatron_twotower.mcore  # noqa: F401  before the first import of Megatron Core
