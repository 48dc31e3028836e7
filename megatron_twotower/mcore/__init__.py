"""The adapter to Megatron Core: its releases, patches, modules, parallelism and saved state.

Importing this folder patches Megatron Core, so that it runs on this machine.
"""

from megatron_twotower.mcore import patches

patches.install()
