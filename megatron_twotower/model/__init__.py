"""The two towers."""

import megatron_twotower.mcore  # noqa: F401  before the first import of Megatron Core
