"""Training: noise, losses, the loop, and a run around them."""

import megatron_twotower.mcore  # noqa: F401  before the first import of Megatron Core
