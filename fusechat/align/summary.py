"""What is said of an aligned store at the end: in the log, and as numbers for whoever tracks runs."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusechat.stores.kinds import KINDS, NONE, kind_counts

LOG = logging.getLogger(__name__)
FEW = 0.5  # share of the positions that have a partner, below which it is a warning


def numbers(manifest: Mapping[str, Any]) -> dict[str, float]:
    """Positions, the share of each kind of partner, and the cross entropy of the gold token where there is one."""
    counts = kind_counts(manifest)
    total = max(1, sum(counts.values()))
    nats = sum(entry["statistics"].get("matched_nats", 0) for entry in manifest["shards"])
    shares = {kind: count / total for kind, count in counts.items()}
    return {"positions": total, **shares, "matched_nats": nats / max(1, total - counts[KINDS[NONE]])}


def warn_of_few(manifest: Mapping[str, Any]) -> None:
    """A warning where under half of the pivot's positions have a distribution of the source."""
    if (found := 1 - numbers(manifest)[KINDS[NONE]]) < FEW:
        told = "only %.0f %% of the pivot's positions have a distribution of %s: the others teach nothing of it; %s"
        LOG.warning(told, 100 * found, manifest["model"], "try alignment=offsets, or another token_map")


def summary(manifest: Mapping[str, Any], path: Path) -> str:
    """The closing line."""
    n = numbers(manifest)
    shares = ", ".join(f"{kind} {n[kind]:.1%}" for kind in KINDS)
    nats = f"gold {n['matched_nats']:.3f} nats where matched"
    return f"{manifest['model']} aligned: {n['positions']:,} positions ({shares}); {nats}; {path}"
