"""Options whose names, types and defaults come from the parameters of a function or of a dataclass.

A table says which parameters are options, and adds what a parameter does not know: the help text,
another name or metavar if the option has one, and the numbers that it accepts. `add_options`
declares the options, and `arguments_for` returns the arguments to call the function or the
dataclass with.
"""

import argparse
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from megatron_twotower.common.errors import UserError
from megatron_twotower.config.setting import Accepts


@dataclass(frozen=True)
class Option:
    """How a parameter appears on the command line.

    Attributes:
        help: What the user sets with it.
        flag: The option, if it is not the name of the parameter with hyphens.
        keywords: Keywords of `ArgumentParser.add_argument`. They override those of the parameter.
        accepts: The numbers that it accepts.
    """

    help: str
    flag: str | None
    keywords: Mapping[str, Any]
    accepts: Accepts

    def flag_of(self, parameter: str) -> str:
        """The option of `parameter`, with its two hyphens."""
        return self.flag or "--" + parameter.replace("_", "-")

    def value(self, parameter: str, arguments: argparse.Namespace) -> Any:
        """What the command line says of `parameter`; a list of values as a tuple."""
        name = self.keywords.get("dest") or self.flag_of(parameter).removeprefix("--").replace("-", "_")
        value = getattr(arguments, name)
        return tuple(value) if isinstance(value, list) else value


LIMITS = ("at_least", "above", "at_most", "below")


def option(help: str, flag: str | None = None, **keywords: Any) -> Option:
    """An entry of a table of options; see `Accepts` for the limits of a number."""
    limits = {name: keywords.pop(name) for name in LIMITS if name in keywords}
    return Option(help, flag, keywords, Accepts(**limits))


# A number of things: rows, steps, tokens.
COUNT: Mapping[str, Any] = {"at_least": 1}


def add_number(parser: "Parser", flag: str, kind: type[int] | type[float] = int, **keywords: Any) -> None:
    """Add one option that takes numbers, with its limits."""
    entry = option(keywords.pop("help"), flag, **keywords)
    action = parser.add_argument(flag, type=kind, help=entry.help, **entry.keywords)
    vars(action)["accepts"] = entry.accepts


def check_numbers(actions: Iterable[argparse.Action], arguments: argparse.Namespace) -> None:
    """Compare the numbers on the command line with the limits of their options.

    Raises:
        UserError: One line with the option, what was found and what is accepted.
    """
    for action in actions:
        value, accepts = getattr(arguments, action.dest, None), vars(action).get("accepts")
        for each in value if isinstance(value, list) else [value]:
            if accepts is not None and each is not None:
                accepts.check(action.option_strings[0], each)


Options = Mapping[str, Option]
Parser = argparse.ArgumentParser | argparse._ArgumentGroup


def add_options(parser: Parser, source: Callable[..., Any], options: Options, *, unset: bool = False) -> None:
    """Add an option for each parameter of `source` that the table names.

    Args:
        source: A function or a dataclass. A parameter gives the type and the default. `bool` gives
            a switch, a sequence takes one or more values, and a parameter without a default is
            required.
        unset: Options that are left out are `None`. The help text shows the default.
    """
    parameters = inspect.signature(source, eval_str=True).parameters
    for name, entry in options.items():
        parameter = parameters[name]
        if "default" in entry.keywords:
            parameter = parameter.replace(default=entry.keywords["default"])
        keywords: dict[str, Any] = {"help": entry.help, **_keywords(parameter), **entry.keywords}
        if unset and keywords.get("action") is None:
            keywords |= {"default": None, "help": entry.help + _shown(parameter.default)}
        action = parser.add_argument(entry.flag_of(name), **keywords)
        vars(action)["accepts"] = entry.accepts


def _keywords(parameter: inspect.Parameter) -> dict[str, Any]:
    """The keywords of `add_argument` that the annotation and the default give."""
    kind = _without_none(parameter.annotation)
    if kind is bool:
        return {"action": "store_false" if parameter.default else "store_true"}
    keywords: dict[str, Any] = {}
    default = parameter.default
    if get_origin(kind) is not None:  # Sequence[X] or tuple[X, ...]
        kind = get_args(kind)[0]
        keywords["nargs"] = "+"
        default = default if default is parameter.empty else list(default)
    if kind is not str:
        keywords["type"] = kind
    return keywords | ({"required": True} if default is parameter.empty else {"default": default})


def _without_none(kind: Any) -> Any:
    """X of an annotation `X | None`; str of `str | X`."""
    if get_origin(kind) not in (Union, UnionType):
        return kind
    kinds = [each for each in get_args(kind) if each is not NoneType]
    if str in kinds:
        return str
    (kind,) = kinds
    return kind


def _shown(default: Any) -> str:
    """A default in brackets, for the end of a help text."""
    if default is None:
        return ""
    return f" ({' '.join(map(str, default)) if isinstance(default, tuple) else default})"


def flags(options: Options) -> tuple[str, ...]:
    """The options of a table."""
    return tuple(entry.flag_of(name) for name, entry in options.items())


def arguments_for(options: Options, arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments for the parameters of a table, without those whose value is `None`."""
    values = {name: entry.value(name, arguments) for name, entry in options.items()}
    return {name: value for name, value in values.items() if value is not None}


def recipe_and_overrides(settings: Sequence[str]) -> tuple[str, list[str]]:
    """Split `recipe=NAME key=value ...` into the recipe and what it is overridden with.

    Raises:
        UserError: There is no recipe, or more than one.
    """
    recipes = [item.removeprefix("recipe=") for item in settings if item.startswith("recipe=")]
    if len(recipes) != 1:
        raise UserError(f"recipe: found {len(recipes)}, expected exactly one recipe=NAME (or recipe=PATH.yaml)")
    return recipes[0], [item for item in settings if not item.startswith("recipe=")]
