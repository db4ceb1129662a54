"""Several sets of chats as one: how many of each, and which, follow from their content and a seed."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from fusechat.app.errors import UserError
from fusechat.app.marks import Mark, fingerprint
from fusechat.app.verbs import near

LOG = logging.getLogger(__name__)
PART = "part"  # column of a mixture: the name of the part that a chat is from
OPTIONS = {"format": "format", "split": "split", "subset": "name"}  # key of a part -> key of chat that it stands for
KEYS = ["path", "name", "rows", "weight", *OPTIONS]
Several = Sequence[str | Path | Mapping[str, Any]]
Given = str | Path | Several  # what chat.path may be


@dataclass(frozen=True)
class Part:
    """path: of one set; name: what it is called, and the tag of its chats that have none. rows: how many of its chats
    are taken; weight: their share of the mixture; neither: all. options: of `load_chats`, where not those of all parts.
    """

    path: str
    name: str
    rows: int | None
    weight: float | None
    options: Mapping[str, str]


def parts_of(given: Several) -> list[Part]:
    """Raises `UserError` for what is no part, names that stand twice, and weights that only some parts have."""
    parts = [_part(each) for each in given]
    if not parts:
        raise UserError("chat.path is an empty list; give files, folders or Hub ids")
    if twice := [name for name, count in Counter(part.name for part in parts).items() if count > 1]:
        raise UserError(f"chat.path: two parts are called {twice[0]!r}; give each a name, {{path: …, name: …}}")
    with_, without = ([part.name for part in parts if (part.weight is None) == none] for none in (False, True))
    if with_ and without:
        raise UserError(
            f"chat.path: {with_[0]} has a weight and {without[0]} has none; give all of them one, or take rows"
        )
    return parts


def mixed(parts: Sequence[Part], loaded: Sequence[Any], seed: int) -> Any:
    """Parts one after the other, each in its own order: a `datasets.Dataset` with the column `PART`.

    loaded: the chats of each. Of them those of the lowest hashes of seed and content are taken, so that fewer are some
    of more. Raises `UserError` where a part holds fewer chats than are wanted.
    """
    from datasets import concatenate_datasets

    taken = []
    for part, rows, count in zip(parts, loaded, shares(parts, [len(rows) for rows in loaded]), strict=True):
        LOG.info("%s: %d of %d chats of %s", part.name, count, len(rows), part.path)
        drawn = rows.select(_drawn(rows["id"], count, seed))
        taken.append(drawn.map(_named, fn_kwargs={"name": part.name}, load_from_cache_file=False))
    return concatenate_datasets(taken)


def shares(parts: Sequence[Part], sizes: Sequence[int]) -> list[int]:
    """How many chats of each part are taken; with weights as many as their shares allow without taking any twice."""
    counts = [size if part.rows is None else part.rows for part, size in zip(parts, sizes, strict=True)]
    weights = [part.weight for part in parts if part.weight is not None]
    if weights:
        whole = min(size / weight for size, weight in zip(sizes, weights, strict=True))
        counts = [int(whole * weight * (1 + 1e-12)) for weight in weights]
    for part, count, size in zip(parts, counts, sizes, strict=True):
        if count > size:
            raise UserError(f"chat.path: {part.name} holds {size} chats and rows={count} is more; give {size} or fewer")
        if not count:
            raise UserError(f"chat.path: weight={part.weight} gives {part.name} no chat; give it more, or rows to all")
    return counts


def sizes_of(rows: Any) -> dict[str, int]:
    """Name of each part of a mixture -> its chats, in their order; nothing for other chats."""
    return dict(Counter(rows[PART])) if PART in rows.column_names else {}


def mark_of(rows: Any) -> Mark:
    """The fingerprint of chats: of their content, in their order, and of the parts of a mixture."""
    return fingerprint(ids=list(rows["id"]), **({"parts": sizes} if (sizes := sizes_of(rows)) else {}))


def paths_of(given: Given) -> list[str]:
    """The paths that ``chat.path`` names."""
    if isinstance(given, (str, Path)):
        return [str(given)]
    return [str(each.get("path") if isinstance(each, Mapping) else each) for each in given]


def _part(given: Any) -> Part:
    held: dict[str, Any] = dict(given) if isinstance(given, Mapping) else {"path": str(given)}
    if unknown := [str(key) for key in held if key not in KEYS]:
        known = f"{near(unknown[0], KEYS)}; keys: {', '.join(KEYS)}"
        raise UserError(f"chat.path: a part has no key {unknown[0]!r}{known}")
    path, rows, weight = held.get("path"), held.get("rows"), held.get("weight")
    if not path or not isinstance(path, (str, Path)):
        raise UserError(f"chat.path: the part {held} has no path; give {{path: FILE, rows: 1000}}")
    if rows is not None and not (type(rows) is int and rows > 0):
        raise UserError(f"chat.path: rows={rows!r} of {path}: expected a whole number from 1 on")
    if weight is not None and not (type(weight) in (int, float) and 0 < weight < float("inf")):
        raise UserError(f"chat.path: weight={weight!r} of {path}: expected a number above 0")
    if rows is not None and weight is not None:
        raise UserError(f"chat.path: {path} has rows={rows} and weight={weight}; give one of them")
    for key in ("name", *OPTIONS):
        if not isinstance(held.get(key), (str, int, NoneType)):
            raise UserError(f"chat.path: {key}={held[key]!r} of {path}: expected a name")
    options = {own: str(held[key]) for key, own in OPTIONS.items() if held.get(key)}
    return Part(str(path), str(held.get("name") or Path(path).stem), rows, weight, options)


def _drawn(ids: Sequence[str], count: int, seed: int) -> list[int]:
    """The places of ``count`` chats, in their order: those whose content hashes lowest."""
    hashes = [hashlib.sha256(f"part:{seed}:{identity}".encode()).digest() for identity in ids]
    return sorted(sorted(range(len(hashes)), key=hashes.__getitem__)[:count])


def _named(row: Mapping[str, Any], name: str) -> dict[str, str]:
    return {"tag": row["tag"] or name, PART: name}
