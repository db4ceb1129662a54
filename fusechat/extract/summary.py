"""What a finished store of distributions says in numbers: sizes, what was dropped, the source's own bits per byte."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from fusechat.stores.units import bits_per_byte

LOG = logging.getLogger(__name__)
MANY = 0.01  # share of the chats that may be cut before it is a warning


def totals(manifest: dict[str, Any]) -> dict[str, Any]:
    """Sums of the shards' statistics; lists are joined. Shards of earlier versions may know fewer of them."""
    parts = [entry["statistics"] for entry in manifest["shards"]]
    kinds = {key: type(value) for part in parts for key, value in part.items()}
    return {key: sum((part.get(key, kind()) for part in parts), kind()) for key, kind in kinds.items()}


def numbers(manifest: dict[str, Any]) -> dict[str, float]:
    """What people look at first: sizes, what was dropped, bits per byte of this source, bytes on disk."""
    sums = totals(manifest)
    size = sum(entry["bytes"] for entry in manifest["shards"])
    return {
        "chats": sum(entry["rows"] for entry in manifest["shards"]),
        "tokens": sums["tokens"],
        "positions": sums["positions"],
        "no_response": len(sums["no_response"]),
        "bad": len(sums["bad"]),
        "truncated": sums["truncated"],
        "bits_per_byte": float(bits_per_byte(sums["nats"], max(1, sums["text_bytes"]))),
        "megabytes": size / 1e6,
        "out_of_memory": len(sums.get("out_of_memory", [])),
        "lost": sums.get("lost", 0.0) / max(1, sums["positions"]),
        "bounded": sums.get("bounded", 0),
        "padding": sums.get("padding", 0),
        "bytes_per_token": size / max(1, sums["tokens"]),
    }


def warn_of_cut(manifest: dict[str, Any]) -> None:
    """A warning where more than a hundredth of the chats was cut."""
    cut, chats = totals(manifest)["truncated"], sum(entry["rows"] for entry in manifest["shards"])
    if cut > MANY * chats:
        told = "%d of %d chats (%.0f %%) are longer than chat.max_length=%s tokens of %s and were cut; raise it, or: %s"
        LOG.warning(told, cut, chats, 100 * cut / chats, manifest["max_length"], manifest["model"], "shorten the chats")


def summary(manifest: dict[str, Any], path: Path) -> str:
    """The closing line."""
    n = numbers(manifest)
    halved = f"{n['out_of_memory']} batches ran in halves for want of memory; " if n["out_of_memory"] else ""
    served = (
        f"from {manifest['served']} behind a server: {n['lost']:.2%} of the mass without a token id, {n['bounded']} "
        f"next tokens not listed, {n['padding']} entries of padding; "
        if "served" in manifest
        else ""
    )
    return (
        f"{manifest['model']}: {n['chats']} chats, {n['tokens']:,} tokens ({n['positions']:,} predicted), "
        f"dropped: {n['no_response']} without an assistant token, {n['bad']} with NaN/inf; "
        f"truncated: {n['truncated']}; {halved}{served}{n['bits_per_byte']:.4f} bits per byte; "
        f"{n['megabytes']:.1f} MB ({n['bytes_per_token']:.1f} B/token) in {path}"
    )
