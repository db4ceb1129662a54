"""Look into a store: what it holds, a few decoded samples, and whether its files are whole.

python -m fusechat.inspect runs/tiny/seed0/distributions/a
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from fusechat.app.errors import UserError


def describe(path: str, samples: int, tokenizer_path: str | None) -> None:
    """Prints a summary of the store and verifies its checksums. Raises `UserError` for a damaged or missing store."""
    from rich.console import Console
    from rich.table import Table

    from fusechat.stores.store import DistributionStore

    store, console = DistributionStore(path), Console()
    store.verify()
    about, shards = store.manifest, store.manifest["shards"]
    size, rows = sum(e["bytes"] for e in shards), sum(e["rows"] for e in shards)
    positions = sum(
        e["statistics"].get("positions", 0) or sum(e["statistics"].get(k, 0) for k in ("same", "n:1", "1:n", "none"))
        for e in shards
    )
    tokens = sum(e["statistics"].get("tokens", 0) for e in shards)
    held = f"{rows:,} chats, {positions:,} response positions, {len(shards)} shards, checksums fit"
    console.print(f"[bold]{about['kind']}[/] of {about['model']}: {held}")
    per_token = f", {size / tokens:.1f} B per token" if tokens else ""
    console.print(
        f"{size / 1e6:.1f} MB{per_token}, {size / max(1, positions):.1f} B per position; log-probabilities as {about['logprobs']}"
    )
    console.print(
        {k: about[k] for k in ("fingerprint", "chats", "vocab_size", "token_map", "sequence", "extract") if k in about}
    )
    tokenizer = _tokenizer(tokenizer_path or about.get("path"))
    if tokenizer is None or "input_ids" not in store._shards[0]:
        return
    for row in range(min(samples, rows)):
        ids, positions_, counts, top, logprobs = store.row(row, "input_ids", "positions", "counts", "ids", "logprobs")
        table, at = Table(title=f"chat {row}: {tokenizer.decode(ids)!r}"[:160]), 0
        for column in ("after", "gold next", "most likely next"):
            table.add_column(column)
        for n, position in enumerate(positions_.tolist()[:12]):
            table.add_row(
                *(repr(tokenizer.decode([int(i)])) for i in ids[position : position + 2]),
                _likely(tokenizer, top, logprobs, at, int(counts[n])),
            )
            at += int(counts[n])
        console.print(table)


def _likely(tokenizer: Any, ids: Any, logprobs: Any, start: int, count: int) -> str:
    import numpy as np

    from fusechat.stores.encoding import decode_logprobs

    part = slice(start, start + min(count, 5))
    pairs = zip(ids[part], np.exp(decode_logprobs(logprobs[part])), strict=True)
    return "  ".join(f"{tokenizer.decode([int(i)])!r} {p:.3f}" for i, p in pairs)


def _tokenizer(path: str | None) -> Any:
    from fusechat.models.load import load_tokenizer

    try:
        return load_tokenizer(path) if path else None
    except UserError:
        return None


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m fusechat.inspect", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("store", help="a folder that extract or align has written")
    parser.add_argument("--samples", type=int, default=2, help="chats to decode")
    parser.add_argument("--tokenizer", help="tokenizer to decode with, where the model has moved")
    arguments = parser.parse_args()
    try:
        describe(arguments.store, arguments.samples, arguments.tokenizer)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
