"""Families: functions that do the same work in different ways, chosen by name on the command line.

A member registers itself where it is defined; error messages, ``--help``, the docs' lists and the parametrised tests
read the registry. What a command line may name is known without importing a member: each family is also a config
group, and its choices are the values in the group's files. Members of a user's own come by ``imports=[my_module]``.
"""

from __future__ import annotations

import hashlib
import importlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fusechat.app.errors import UserError

CONF = Path(__file__).parents[1] / "conf"
GROUPS = {  # config key that names a member -> config group whose files list the choices
    "loss.kind": "loss",
    "fusion.rule": "fusion",
    "token_map.name": "token_map",
    "alignment.sequence": "alignment",
    "merge.method": "merge",
    "extract.kind": "extract",
    "evaluation.kind": "evaluation",
    "mutual.method": "mutual",
    "chat.format": "format",
}
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Member:
    """One way of doing a family's work. needs: what it asks of its caller, in the family's own words."""

    name: str
    function: Callable[..., Any]
    help: str
    needs: frozenset[str]


class Family(Mapping[str, Member]):
    """The members of one family by name. key: the config key that chooses among them.

    needs: all that a member may ask of its caller; None where any name will do (the columns of a chat format).
    """

    def __init__(self, key: str, needs: Sequence[str] | None = ()) -> None:
        assert key in GROUPS, key
        self.key, self.known_needs = key, None if needs is None else frozenset(needs)
        self._members: dict[str, Member] = {}

    def register(self, name: str, help: str, *, needs: Sequence[str] = ()) -> Callable[[Function], Function]:
        """Decorator. help: one line. Raises `UserError` for a name that is taken and an unknown need."""

        def add(function: Function) -> Function:
            if name in self._members:
                raise UserError(f"{self.key}={name!r} is registered twice; give {function.__qualname__} another name")
            if self.known_needs is not None and (unknown := set(needs) - self.known_needs):
                known = ", ".join(sorted(self.known_needs)) or "none"
                raise UserError(f"{self.key}={name!r} needs {', '.join(sorted(unknown))}; this family knows: {known}")
            self._members[name] = Member(name, function, help, frozenset(needs))
            return function

        return add

    def __getitem__(self, name: str) -> Member:
        """Raises `UserError` that lists the members where the name is unknown."""
        if name not in self._members:
            raise _unknown(self.key, name, sorted(self._members))
        return self._members[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)


def choices(key: str, folders: Sequence[Path] = ()) -> dict[str, str]:
    """Name -> one line of help, for a key of `GROUPS`, from YAML files alone. folders: config folders beside ours."""
    leaf = key.split(".")[-1]
    found: dict[str, str] = {}
    for file in (file for conf in (CONF, *folders) for file in sorted((conf / GROUPS[key]).glob("*.yaml"))):
        text = file.read_text(encoding="utf-8")
        if value := re.search(rf"^{leaf}: *([\w/]+)", text, re.M):
            lines = [line for line in text.splitlines() if not line.startswith("# @package")]
            found.setdefault(value[1], lines[0].lstrip("# ").partition(": ")[2])
    return {name: line for name, line in found.items() if name != "null"}


def check_choices(values: Mapping[str, str | None], folders: Sequence[Path] = (), open: bool = False) -> None:
    """Raises `UserError` for a value that names no member. values: a key of `GROUPS` -> its value. Imports no member.

    open: modules of the user's own may have registered more; what is unknown is left to `Family.__getitem__`.
    """
    for key, value in values.items():
        known = choices(key, folders)
        if value is not None and known and value not in known and not open:
            raise _unknown(key, value, sorted(known))


def import_modules(names: Sequence[str]) -> dict[str, str]:
    """Imports a user's modules, those in the working folder too. Returns name -> sha256 of its source.

    The stages put the hashes into their fingerprints: what such a module decides changes with its source. Raises
    `UserError` with the reason where one cannot be imported.
    """
    here = str(Path.cwd())
    if names and here not in sys.path:
        sys.path.insert(0, here)
    hashes = {}
    for name in names:
        try:
            module = importlib.import_module(name)
        except Exception as error:  # a stranger's module may raise anything
            raise UserError(
                f"imports: {name!r} cannot be imported from {here}: {type(error).__name__}: {error}"
            ) from error
        file = getattr(module, "__file__", None)  # none: built in, or a folder without __init__.py
        hashes[name] = hashlib.sha256(Path(file).read_bytes() if file else b"").hexdigest()
    return hashes


def _unknown(key: str, name: str, known: Sequence[str]) -> UserError:
    return UserError(f"{key}={name!r} is unknown; use one of: {', '.join(known)}")
