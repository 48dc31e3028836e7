"""Dataclass fields that state the values they accept, and the check of a configuration."""

import dataclasses
import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from megatron_twotower.common.errors import require

_KEY = "accepts"


@dataclass(frozen=True)
class Accepts:
    """The values that one setting accepts. Without any limit every value of its type is accepted.

    Attributes:
        unit: What a number counts or measures; empty for a pure number and for a text.
        choices: All accepted texts; empty for any.
        letters: The accepted letters of a text; empty for any.
        at_least: Lower limit, included.
        above: Lower limit, excluded.
        at_most: Upper limit, included.
        below: Upper limit, excluded.
        multiple_of: What divides the number.
    """

    unit: str = ""
    choices: tuple[str, ...] = ()
    letters: str = ""
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    multiple_of: int | None = None

    @property
    def limited(self) -> bool:
        """Whether some value of the type is refused."""
        return dataclasses.replace(self, unit="") != Accepts()

    def check(self, key: str, value: Any) -> None:
        """Compare one value with the limits.

        A number must also be finite and fit into 64 bits, and a text cannot contain NUL.

        Raises:
            UserError: One line with the key, the value and what is accepted.
        """
        if isinstance(value, str):
            require("\0" not in value, f"{key}: found {value!r}, expected a text without NUL")
        if isinstance(value, int):
            require(abs(value) < 2**63, f"{key}: found {value}, expected less than 2^63 = {2**63}")
        if isinstance(value, float):
            require(not math.isinf(value), f"{key}: found {value}, expected a finite number")
        if self.choices:
            require(value in self.choices, f"{key}: found {value!r}, expected one of {', '.join(self.choices)}")
        if self.letters:
            require(set(value) <= set(self.letters), f"{key}: found {value!r}, expected letters of {self.letters}")
        table: tuple[tuple[str, Callable[[Any, Any], bool], float | None], ...] = (
            ("at least", operator.ge, self.at_least),
            ("above", operator.gt, self.above),
            ("at most", operator.le, self.at_most),
            ("below", operator.lt, self.below),
            ("a multiple of", lambda number, divisor: number % divisor == 0, self.multiple_of),
        )
        limits = [(words, accepted, limit) for words, accepted, limit in table if limit is not None]
        expected = " and ".join(f"{words} {limit}" for words, _, limit in limits)
        require(
            all(accepted(value, limit) for _, accepted, limit in limits), f"{key}: found {value}, expected {expected}"
        )


# Metadata of a free field that needs a default factory, such as a list.
FREE = {_KEY: Accepts()}


def setting(default: Any, *, free: bool = False, choices: Iterable[str] = (), **limits: Any) -> Any:
    """Declare a field of a configuration.

    Args:
        default: The default value.
        free: Marks a setting that accepts every value of its type: booleans, paths, names.
        choices: All accepted texts.
        **limits: The unit and the limits, see `Accepts`.
    """
    accepts = Accepts(choices=tuple(choices), **limits)
    assert accepts.limited != free, "expected limits, or free=True, and not both"
    return dataclasses.field(default=default, metadata={_KEY: accepts})


def accepts(owner: Any, name: str) -> Accepts:
    """Return the accepted values of the field `name` of a configuration dataclass or instance.

    Raises:
        KeyError: The field was not declared with `setting`.
    """
    return {item.name: item for item in dataclasses.fields(owner)}[name].metadata[_KEY]


def check_settings(config: Any, prefix: str = "") -> None:
    """Compare every setting of nested dataclasses, and of lists of them, with its limits.

    None is always accepted.

    Args:
        config: An instance of a configuration dataclass.
        prefix: The key of `config` with a dot at its end; empty for a complete configuration.

    Raises:
        UserError: One line with the key, what was found and what was expected.
    """
    for item in dataclasses.fields(config):
        key, value = f"{prefix}{item.name}", getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            check_settings(value, f"{key}.")
        elif isinstance(value, list) and value and dataclasses.is_dataclass(value[0]):
            for number, element in enumerate(value):
                check_settings(element, f"{key}.{number}.")
        elif value is not None:
            accepts(config, item.name).check(key, value)
