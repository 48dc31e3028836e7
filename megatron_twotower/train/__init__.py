"""Training: noise, losses, the training loop, and a complete run."""

import megatron_twotower.mcore  # noqa: F401  before the first import of Megatron Core
