"""`AlisaConfig` as command line flags: one flag a field, so that a new option appears here by itself."""

from __future__ import annotations

import argparse
import dataclasses
import re
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any

from ..config import AlisaConfig
from ..errors import ConfigError

_NAMES = {int: "an integer", float: "a number", type(None): "none"}


def add_config_flags(parser: argparse.ArgumentParser, without: Sequence[str] = ()) -> None:
    """Add `--sparsity`, `--kv-dtype`, ... in a group of their own. without: fields that the command sets itself."""
    group = parser.add_argument_group("options of alisa", "the same as torch.compile(options={...})")
    helps, hints = _helps(), typing.get_type_hints(AlisaConfig)
    for field in dataclasses.fields(AlisaConfig):
        if field.name in without:
            continue
        flag = f"--{field.name.replace('_', '-')}"
        # argparse expands % in a help text.
        text = f"{helps.get(field.name, '')} (default: {field.default})".replace("%", "%%")
        # An absent flag stays absent: only what was typed is passed on.
        settings: dict[str, Any] = {"help": text, "default": argparse.SUPPRESS}
        if hints[field.name] is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, **settings)
        else:
            group.add_argument(flag, type=_reader(hints[field.name]), metavar="VALUE", **settings)


def given_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What was typed, as `options={...}`; wrong values are refused here, before a model is loaded."""
    names = [field.name for field in dataclasses.fields(AlisaConfig)]
    options = {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}
    AlisaConfig.from_options(options)
    return options


def read_options(text: str) -> dict[str, Any]:
    """`window=128,head_mode=per_kv_head` as `options={...}`; AlisaConfig has the say about names and values."""
    options, hints = {}, typing.get_type_hints(AlisaConfig)
    for part in text.split(","):
        name, equals, value = part.partition("=")
        name = name.strip().replace("-", "_")
        if not equals:
            raise ConfigError("an option has no value", got=repr(part), expected="NAME=VALUE[,NAME=VALUE...]")
        if name not in hints:
            AlisaConfig.from_options({name: value})
        try:
            options[name] = _flag(value) if hints[name] is bool else _reader(hints[name])(value)
        except argparse.ArgumentTypeError as error:
            raise ConfigError(f"option {name!r} has a wrong value: {error}") from error
    AlisaConfig.from_options(options)
    return options


def _flag(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected true or false")
    return text.lower() == "true"


def _helps() -> dict[str, str]:
    """The `name[, name]: text` lines of AlisaConfig's docstring."""
    found = {}
    for match in re.finditer(r"^ *([a-z_, ]+): (.+)$", AlisaConfig.__doc__ or "", re.MULTILINE):
        for name in match[1].split(","):
            found[name.strip()] = match[2].replace("`", "").rstrip(".")
    return found


def _reader(hint: Any) -> Callable[[str], Any]:
    """A converter for one field's type. Which values make sense is AlisaConfig's to say, not argparse's."""
    members = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)

    def read(text: str) -> Any:
        if type(None) in members and text.lower() == "none":
            return None
        for number in (int, float):
            if number in members:
                try:
                    return number(text)
                except ValueError:
                    continue
        if str in members:
            return text
        expected = " or ".join(_NAMES[member] for member in members)
        raise argparse.ArgumentTypeError(f"got {text!r}, expected {expected}")

    return read
