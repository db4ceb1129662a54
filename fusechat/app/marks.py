"""Fingerprints: a short hash of all that decides an output, and what differs where two do not fit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

FORMAT = 2  # of everything that is stored; part of every fingerprint
PARTS = "decided_by"  # key of a record beside "fingerprint"
LONG = 120  # characters: a longer value is kept as its hash
TOLD = 6  # differences that a message lists
SHARED_OUT = {"devices", "num_nodes", "accelerator", "strategy", "timeout"}  # keys of trainer: who does the work
SHOWN = {"log_every_n_steps", "enable_model_summary"}
UNDECIDING = {  # section -> keys that decide nothing of an output
    "trainer": SHARED_OUT | SHOWN,
    "data": {"batch_size", "num_workers", "packing"},
    "extract": {"trainer"},
    "alignment": {"num_proc"},
    "evaluation": {"device"},
    "merge": {"name", "device", "dry_run"},
    "callbacks": {"checkpoint_every_n_steps", "samples", "progress_bar", "keep_checkpoints"},
}


class Mark(str):
    """A fingerprint that knows what it was made of. parts: flat, dotted name -> value."""

    __slots__ = ("parts",)
    parts: Mapping[str, Any]


def fingerprint(**parts: Any) -> Mark:
    """A short hash of everything that decides a stage's output; equal inputs give equal fingerprints."""
    text = json.dumps({"format": FORMAT, **parts}, sort_keys=True)  # no default: an object's repr may hide what differs
    mark = Mark(_hash(text))
    mark.parts = flat({"format": FORMAT, **parts})
    return mark


def stage_fingerprint(imports: Mapping[str, str] | None = None, **parts: Any) -> Mark:
    """`fingerprint` of a stage. imports: the user's own modules with their hashes, where the stage ran with any."""
    return fingerprint(**parts, **({"imports": dict(imports)} if imports else {}))


def stamp(mark: str) -> dict[str, Any]:
    """What a record says of its fingerprint: itself, and what it was made of, where that is known."""
    return {"fingerprint": str(mark)} | ({PARTS: dict(mark.parts)} if isinstance(mark, Mark) else {})


def difference(record: Mapping[str, Any], mark: str) -> str:
    """The keys in which a record and a fingerprint differ, with both values; the hashes where more is not known."""
    there, now = record.get(PARTS), stamp(mark).get(PARTS)
    if there is None or now is None:
        return f"fingerprint {record.get('fingerprint')}, now {mark}"
    return differing(there, now)


def differing(there: Mapping[str, Any], now: Mapping[str, Any], when: str = "there") -> str:
    """The keys in which two flat mappings differ, with both values; empty where there are none. when: of the first."""
    keys = [key for key in {**there, **now} if there.get(key, "unset") != now.get(key, "unset")]
    listed = [f"{key}: {_shown(there, key)} {when}, {_shown(now, key)} now" for key in keys[:TOLD]]
    return "; ".join([*listed, *([f"and {len(keys) - TOLD} more"] if len(keys) > TOLD else [])])


def _shown(parts: Mapping[str, Any], key: str) -> str:
    return json.dumps(parts[key], ensure_ascii=False) if key in parts else "unset"


def flat(value: Any, name: str = "", depth: int = 100) -> dict[str, Any]:
    """Nested mappings as one level of dotted names, as JSON would read them again; long values as their hash.

    depth: of mappings that are taken apart.
    """
    if isinstance(value, Mapping) and value and depth:
        pairs = (flat(inner, f"{name}.{key}" if name else str(key), depth - 1) for key, inner in value.items())
        return {key: inner for pair in pairs for key, inner in pair.items()}
    text = json.dumps(value, sort_keys=True)
    return {name: json.loads(text) if len(text) <= LONG else f"hash {_hash(text)}"}


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
