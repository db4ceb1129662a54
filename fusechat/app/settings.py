"""The check of settings against `fusechat.app.schema`: of a command's whole config, and of what Python calls give.

A mistake is one sentence: the key with its value, what was expected, and the known name that comes near.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError
from typing_extensions import is_typeddict

from fusechat.app.errors import UserError
from fusechat.app.parts import TARGET, split
from fusechat.app.registry import GROUPS
from fusechat.app.schema import Config
from fusechat.app.schema.words import (
    alternatives,
    are_options,
    bare,
    expected,
    inner,
    is_list,
    options_of,
    says_of,
    shown,
)
from fusechat.app.verbs import near

Kind = Any  # a type as annotations have it
Place = tuple[str | int, ...]  # keys and indices from the root on
SWAPPED = ("callbacks", "logger", "optimizer")  # sections in which a _target_ names a class with keys of its own
ELSEWHERE = {  # keys that people look for, and where they are
    "trainer.callbacks": "; a callback of your own is +callbacks.NAME._target_=module.Class",
    "trainer.logger": "; a logger of your own is +logger.NAME._target_=module.Class",
}
OPEN = {key.partition(".")[0] for key in GROUPS}  # sections in which a user's own members have keys of their own


def check(section: str, **values: Any) -> None:
    """Raises `UserError` for values out of type, range or choices. section: of the config, ``loss`` or ``extract``.

    For Python's callers; keys that the section does not have are their own signatures' to refuse.
    """
    known = fields(fields(Config)[section])
    check_config({section: {key: value for key, value in values.items() if key in known}})


def check_config(values: Mapping[str, Any], own_members: bool = False) -> None:
    """Raises `UserError` that tells all mistakes of a resolved config; keys may be absent.

    own_members: a user's modules may have brought members with settings of their own.
    """
    if found := list(faults(values, own_members)):
        raise UserError("; and ".join(found))


def faults(values: Mapping[str, Any], own_members: bool = False) -> Iterator[str]:
    """A sentence for every mistake in a config."""
    values = {**values, **{section: _settings(section, values[section]) for section in SWAPPED if section in values}}
    try:
        _adapter().validate_python(values)
    except ValidationError as error:
        told: set[Place] = set()
        for fault in error.errors(include_url=False, include_context=False, include_input=False):
            place, kind, value = _at(fault["loc"], values)
            if fault["type"] == "extra_forbidden":
                if not (own_members and len(place) == 1 and place[0] in OPEN):
                    name = fault["loc"][len(place)]
                    key = _dotted((*place, name))
                    yield f"the config has no key {key!r}{ELSEWHERE.get(key) or near(str(name), list(fields(kind)))}"
            elif place not in told:
                yield sentence(_dotted(place), kind, value)
                told.add(place)


def sentence(key: str, kind: Kind, value: Any) -> str:
    """``loss.temperature=0: expected a number above 0``; where only names are to choose from, all of them."""
    options, says = options_of(kind), says_of(kind)
    if isinstance(value, str) and options and are_options(kind):
        return f"{key}={value!r} is unknown; use one of: {', '.join(options)}{near(value, options)}"
    hint = near(value, says.known) if says and isinstance(value, str) else ""
    if isinstance(value, str) and value and is_list(kind):
        hint = f"; write '{key}=[{value}]'"
    return f"{key}={shown(value)}: expected {expected(kind)}{hint}"


def _settings(section: str, values: Any) -> Any:
    """A section without what a ``_target_`` in it brings: that class says what it takes."""
    if not isinstance(values, Mapping):
        return values
    own, _ = split(values)
    if section == "optimizer" and TARGET in own:
        return {key: value for key, value in own.items() if key in fields(fields(Config)[section])}
    return own


@cache
def fields(section: Kind) -> dict[str, Kind]:
    """The keys of a section with their types."""
    return get_type_hints(section, include_extras=True)


@cache
def _adapter() -> TypeAdapter[Any]:
    return TypeAdapter(Config)


def _at(where: Place, values: Any) -> tuple[Place, Kind, Any]:
    """As far as a mistake's place leads through keys and indices: the place, its type and the value there.

    Beyond lie the alternatives of a union, which are told together.
    """
    place: Place = ()
    kind: Kind = Config
    for step in where:
        within = fields(kind).get(str(step)) if is_typeddict(kind) else inner(kind)
        if within is None or not isinstance(values, (Mapping, list, tuple)):
            break
        place, kind, values = (*place, step), within, values[step]  # type: ignore[index,call-overload]
        kind = next((part for part in alternatives(kind) if is_typeddict(bare(part)[0])), kind)
    return place, kind, values


def _dotted(place: Place) -> str:
    """``merge.patterns[0].match``"""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in place).removeprefix(".")
