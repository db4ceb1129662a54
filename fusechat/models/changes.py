"""What people edit in a model's directory, told by key: configs in JSON and the chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusechat.app.marks import differing, flat

EDITED = {"config.json", "generation_config.json", "tokenizer_config.json", "adapter_config.json"}
TEMPLATES = {"chat_template.jinja", "chat_template.json"}
TEMPLATE = "chat_template"  # key of tokenizer_config.json, in models of before
MOST = 256  # keys: a config with more keeps those of its first level, values that are long as their hash


def values(file: Path) -> dict[str, Any]:
    """What a record keeps of a file beside its checksum: the values by dotted key, of those that people edit."""
    found = _read(file) if file.name in EDITED else None
    return {} if found is None else {"values": found}


def named(file: Path, entry: Mapping[str, Any]) -> str | None:
    """In what a file differs from a record's entry, with both values; None where only the checksum is known."""
    if file.name in TEMPLATES and file.is_file():
        return "the chat template"
    kept, now = entry.get("values"), _read(file)
    if kept is None or now is None:
        return None
    template = ["the chat template"] if kept.get(TEMPLATE) != now.get(TEMPLATE) else []
    there, here = ({key: found[key] for key in found if key != TEMPLATE} for found in (kept, now))
    told = differing(there, here, "when made")
    return "; ".join([f"{file.name}: {told}"] * bool(told) + template) or f"{file.name}: the same values, other bytes"


def _read(file: Path) -> dict[str, Any] | None:
    """A JSON object flat; None where there is none that can be read."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict):
        return None
    whole = flat(content)
    return whole if len(whole) <= MOST else flat(content, depth=1)
