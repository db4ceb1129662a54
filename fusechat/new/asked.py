"""What was typed behind ``fusechat new``, as checked values. Nothing heavy is imported."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusechat.app.errors import UserError
from fusechat.app.registry import CONF
from fusechat.app.verbs import near

OWN = "an experiment"
NEEDED = {"pivot": "DIR", "sources": "'{a: DIR, b: DIR}'", "chats": "FILE"}
KEYS = {  # what may be given -> what it is
    "pivot": "directory or Hub id of the model that every target starts from",
    "sources": "the models to learn from, {NAME: directory, Hub id or GGUF file}",
    "chats": "file, directory or Hub id of the chats to fuse with; or a list of them, as chat.path takes it",
    "tests": "chats to test with; without, a tenth of the chats is set aside (20 to 500)",
    "max_length": "tokens of a chat, longer ones are cut (2048, or the smallest context of the models)",
    "folder": "config folder of your own (my_conf)",
    "root": "folder of the runs (FUSECHAT_ROOT, or runs)",
    "overwrite": "true replaces an experiment of this name (false)",
}


@dataclass(frozen=True)
class Asked:
    """What was typed, checked."""

    name: str
    pivot: str
    sources: Mapping[str, str]
    chats: Any
    tests: Any
    max_length: int | None
    folder: Path
    root: Path
    overwrite: bool

    @property
    def file(self) -> Path:
        """The experiment's file."""
        return self.folder / "experiment" / f"{self.name}.yaml"

    @property
    def runs(self) -> Path:
        """The experiment's folder of outputs."""
        return self.root / self.name


def asked(name: str, given: Mapping[str, Any], typed: str) -> Asked:
    """given: key -> value; typed: as they were typed, for messages.

    Raises `UserError` for unknown and for missing keys (all at once), names that cannot be, and a file that is there.
    """
    if unknown := [key for key in given if key not in KEYS]:
        raise UserError(f"{unknown[0]!r} is no key of fusechat new{near(unknown[0], [*KEYS])}; --help lists them")
    if missing := [key for key in NEEDED if not given.get(key)]:
        give = " ".join(f"{key}={NEEDED[key]}" for key in missing)
        command = " ".join(filter(None, ["python -m fusechat.new", shlex.quote(name), typed, give]))
        raise UserError(f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing; run: {command}")
    sources = given["sources"]
    if not isinstance(sources, dict) or not all(isinstance(path, str) for path in sources.values()):
        raise UserError(f"sources={sources}: expected {NEEDED['sources']}, a path for each name")
    taken = [file.stem for file in (CONF / "experiment").glob("*.yaml")]
    for what, kind in ((name, OWN), *((str(source), "a source") for source in sources)):
        if not what.replace("-", "_").isidentifier() or what == "pivot" or (kind == OWN and what in taken):
            raise UserError(f"{what!r} cannot name {kind}: letters, digits, _ and -, and no name that is taken")
    root = given.get("root") or os.environ.get("FUSECHAT_ROOT", "runs")
    paths = {str(source): _place(path) for source, path in sources.items()}
    own = Asked(
        name,
        _place(str(given["pivot"])),
        paths,
        given["chats"],
        given.get("tests"),
        given.get("max_length"),
        Path(given.get("folder", "my_conf")),
        Path(root),
        given.get("overwrite") is True,
    )
    if own.file.exists() and not own.overwrite:
        raise UserError(f"{own.file} is there already; choose another name, or add overwrite=true to replace it")
    return own


def _place(path: str) -> str:
    """A model's path that holds wherever the experiment is used from."""
    return str(Path(path).absolute()) if Path(path).exists() else path
