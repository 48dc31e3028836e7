"""Tasks of `data.parts` with the settings that tests share."""

from megatron_twotower.data.parts import UnitTask
from megatron_twotower.data.tokenizer import tokenizer_fingerprint


def unit_task(unit, number, *, folder, tokenizer):
    """The task that tokenises `unit` into part `number`, with 16-bit ids."""
    return UnitTask(number, unit, folder, tokenizer, tokenizer_fingerprint(tokenizer), "text", "uint16")
