"""Checkpoints of training runs: written while training runs, read by any layout."""

import megatron_twotower.mcore  # noqa: F401  before the first import of Megatron Core
