"""All that knows Megatron Core's insides. Importing it makes Megatron Core run on this machine."""

from megatron_twotower.mcore import patches

patches.install()
