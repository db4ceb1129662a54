"""What is said of an aligned store at the end: in the log, and as numbers for whoever tracks runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusechat.stores.kinds import KINDS, NONE, kind_counts


def numbers(manifest: Mapping[str, Any]) -> dict[str, float]:
    """Positions, the share of each kind of partner, and the cross entropy of the gold token where there is one."""
    counts = kind_counts(manifest)
    total = max(1, sum(counts.values()))
    nats = sum(entry["statistics"].get("matched_nats", 0) for entry in manifest["shards"])
    shares = {kind: count / total for kind, count in counts.items()}
    return {"positions": total, **shares, "matched_nats": nats / max(1, total - counts[KINDS[NONE]])}


def summary(manifest: Mapping[str, Any], path: Path) -> str:
    """The closing line."""
    n = numbers(manifest)
    shares = ", ".join(f"{kind} {n[kind]:.1%}" for kind in KINDS)
    nats = f"gold {n['matched_nats']:.3f} nats where matched"
    return f"{manifest['model']} aligned: {n['positions']:,} positions ({shares}); {nats}; {path}"
