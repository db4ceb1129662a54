"""Parts of a user's own in a config, by ``_target_`` as Hydra instantiates them: callbacks, loggers, optimizers."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fusechat.app.errors import UserError
from fusechat.app.registry import import_modules

TARGET = "_target_"
Parts = Mapping[str, Mapping[str, Any]]  # name -> what hydra.utils.instantiate takes


def split(section: Mapping[str, Any]) -> tuple[dict[str, Any], Parts]:
    """A section's settings, and the parts in it that have a ``_target_``."""
    parts = {key: dict(value) for key, value in section.items() if isinstance(value, Mapping) and TARGET in value}
    return {key: value for key, value in section.items() if key not in parts}, parts


def made(section: str, parts: Parts) -> list[Any]:
    """The objects, in order. Raises `UserError` with the cause where one cannot be made."""
    if not parts:
        return []
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    own_modules(parts.values())  # those in the working folder too
    found = []
    for name, config in parts.items():
        try:
            found.append(instantiate({**config, "_convert_": "all"}))
        except InstantiationException as error:
            raise UserError(f"{section}.{name}: {' '.join(str(error.__cause__ or error).split())}") from error
    return found


def own_modules(configs: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """The modules that ``_target_`` names, imported; with a hash of the source of those that no package has brought."""
    hashes = import_modules(sorted({str(config[TARGET]).rpartition(".")[0] for config in configs}))
    return {name: source for name, source in hashes.items() if not _installed(name)}


def _installed(module: str) -> bool:
    file = Path(getattr(sys.modules[module], "__file__", None) or "")
    return "site-packages" in file.parts or file.is_relative_to(Path(__file__).parents[1])
