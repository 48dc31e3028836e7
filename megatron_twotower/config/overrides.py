"""Overrides of the command line, made safe for Hydra's grammar.

Hydra reads `key=value` with a grammar in which a comma, an equals sign, a quote, a bracket, most
other special characters and all letters outside ASCII have a meaning or none. The value of a
setting that is a text (a path, a name) is taken as it is here, and quoted for Hydra. Values in
quotes, `null` and `${key}` keep the meaning that Hydra gives them.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

from megatron_twotower.common.errors import UserError, require
from megatron_twotower.common.text import is_unicode
from megatron_twotower.config.schema import PhaseConfig, RunConfig


def _text_keys(config: Any, prefix: str = "") -> Iterator[str]:
    """Yield the keys of the settings that are texts."""
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            yield from _text_keys(value, f"{prefix}{item.name}.")
        elif item.type in (str, str | None):
            yield f"{prefix}{item.name}"


_TEXT_KEYS = {*_text_keys(RunConfig()), *_text_keys(PhaseConfig(), "phases.")}


def quoted(text: str) -> str:
    """Return a text in quotes, as Hydra's grammar reads it."""
    from hydra.core.override_parser.types import Quote, QuotedString

    return QuotedString(text=text, quote=Quote.single).with_quotes()


def plain_overrides(overrides: Sequence[str], *, several: bool = False) -> list[str]:
    """Return overrides that Hydra reads as they are meant.

    Args:
        overrides: Words `key=value` of the command line.
        several: With `--multirun` a comma separates values, and keys of Hydra itself are accepted.

    Raises:
        UserError: A key is missing or of Hydra, or a value cannot be read.
    """
    return [_plain(override, several=several) for override in overrides]


def _plain(override: str, *, several: bool) -> str:
    """Return one override that Hydra reads as it is meant."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    key, _, value = override.partition("=")
    require(bool(key), f"override {override!r}: found no key, expected key=value")
    require(not override.startswith(("+", "~")), f"override {override!r}: keys cannot be added or removed, only set")
    require(
        several or not re.match(r"hydra\b", key),
        f"override {override!r}: found a key of Hydra itself, which only --multirun uses",
    )
    require(is_unicode(override), f"override {override!r}: found bytes that are not UTF-8")
    text = re.sub(r"\.\d+(?=\.)", "", key) in _TEXT_KEYS
    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException as error:
        if text and not (several and "," in value):
            return f"{key}={quoted(value)}"
        raise UserError(
            f"override {override!r}: Hydra's grammar cannot read the value, expected a text with special characters "
            f"in quotes, such as {key}=\"'a,b'\""
        ) from error
    if not text or (several and parsed.is_sweep_override()) or _meant_for_hydra(value, parsed.value()):
        return override
    return f"{key}={quoted(value)}"


def _meant_for_hydra(value: str, parsed: Any) -> bool:
    """Whether the value of a text is what Hydra reads: plain, quoted, escaped, null or `${key}`."""
    in_quotes = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    return (
        parsed is None or parsed == value or in_quotes or "${" in value or (isinstance(parsed, str) and "\\" in value)
    )
