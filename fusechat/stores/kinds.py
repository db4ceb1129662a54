"""How a pivot position found its partner on the source's side: the column ``kind`` of an aligned store.

same: one token of either side spells the text before the position. n:1: several source tokens for one of the pivot's.
1:n: one source token for several of the pivot's. none: no source position stands at this place of the text.
inside: no source position stands there either, but a source token whose beginning lies before it speaks for what is
left of it (`sequence=chain`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

KINDS = ("same", "n:1", "1:n", "none", "inside")
SAME, MANY_TO_ONE, ONE_TO_MANY, NONE, INSIDE = range(len(KINDS))


def kind_counts(manifest: Mapping[str, Any]) -> dict[str, int]:
    """Positions of each kind in a whole aligned store, from its manifest; zeros where the store is none."""
    return {kind: sum(entry["statistics"].get(kind, 0) for entry in manifest["shards"]) for kind in KINDS}
