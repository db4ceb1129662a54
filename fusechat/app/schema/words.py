"""Types in words, for messages: ``a number above 0, at most 1``."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt

from fusechat.app.schema.values import Says

Kind = Any  # a type as annotations have it
WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", type(None): "null"}
NONE = type(None)


def expected(kind: Kind) -> str:
    """What a value of a type is."""
    if says := says_of(kind):
        return says.text
    if len(parts := alternatives(kind)) > 1:
        return " or ".join(expected(part) for part in sorted(parts, key=lambda part: part is NONE))
    if options := options_of(kind):
        return options[0] if len(options) == 1 else f"one of {', '.join(options)}"
    base, bounds = bare(kind)
    if origin(base) is Sequence:
        item = inner(kind)
        return "a list [..,..]" if item in (Any, str) else f"a list [..,..], each {expected(item)}"
    if base in WORDS:
        return WORDS[base] + _range(bounds)
    return "keys with values, {key: value}"


def origin(kind: Kind) -> Any:
    """What a type is made of: a union, a list, a choice, …"""
    return get_origin(kind)


def alternatives(kind: Kind) -> list[Kind]:
    """The types of a union; one for others."""
    return list(get_args(kind)) if origin(kind) in (Union, types.UnionType) else [kind]


def bare(kind: Kind) -> tuple[Kind, tuple[Any, ...]]:
    """A type and what annotates it."""
    return (get_args(kind)[0], kind.__metadata__) if origin(kind) is Annotated else (kind, ())


def says_of(kind: Kind) -> Says | None:
    """The words that a type carries itself; of ``X | None`` those of X."""
    parts = [part for part in alternatives(kind) if part is not NONE]
    found = [note for note in bare(parts[0])[1] if isinstance(note, Says)] if len(parts) == 1 else []
    if not found:
        return None
    return Says(f"{found[0].text} or null", found[0].known) if NONE in alternatives(kind) else found[0]


def options_of(kind: Kind) -> list[str]:
    """The choices of literal types."""
    literals = [part for part in alternatives(kind) if origin(part) is Literal]
    return [str(option) for part in literals for option in get_args(part)]


def are_options(kind: Kind) -> bool:
    """Whether there are only choices, and null."""
    return all(part is NONE or origin(part) is Literal for part in alternatives(kind))


def inner(kind: Kind) -> Kind | None:
    """What a list or mapping holds, optional ones too; None for other types and for unions of several."""
    parts = [part for part in alternatives(kind) if part is not NONE]
    base = bare(parts[0])[0]
    held = len(parts) == 1 and origin(base) in (Sequence, Mapping)
    return get_args(base)[-1] if held else None


def is_list(kind: Kind) -> bool:
    """Whether a list is expected, and nothing else but null."""
    parts = [part for part in alternatives(kind) if part is not NONE]
    return len(parts) == 1 and origin(bare(parts[0])[0]) is Sequence


def shown(value: Any) -> str:
    """A value as it is typed on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(shown, value))}]"
    return repr(value) if isinstance(value, str) else str(value)


def _range(bounds: Sequence[Any]) -> str:
    """``from 0 to 1``, ``above 0, at most 1``."""
    low = [f" above {b.gt}" if isinstance(b, Gt) else f" from {b.ge}" for b in bounds if isinstance(b, (Gt, Ge))]
    high = [f"below {b.lt}" if isinstance(b, Lt) else f"{b.le}" for b in bounds if isinstance(b, (Lt, Le))]
    if not low or not high:
        on = " on" if low and low[0].startswith(" from") else ""
        return "".join(low) + on + "".join(f" {text}" for text in high)
    return f"{low[0]}{' to ' if low[0].startswith(' from') else ', at most '}{high[0]}"
