"""Look into a store: what it holds, a few decoded samples, and whether its files are whole.

python -m fusechat.inspect runs/tiny/seed0/distributions/a
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fusechat.app.errors import UserError
from fusechat.app.streams import Parser
from fusechat.app.verbs import plainly

if TYPE_CHECKING:
    from fusechat.stores.store import DistributionStore

SHOWN = ("fingerprint", "chats", "vocab_size", "token_map", "sequence", "extract")
POSITIONS, ENTRIES = 12, 5  # shown of a chat, and of a position


def describe(path: str, samples: int, tokenizer_path: str | None) -> None:
    """Prints a summary of the store and verifies its checksums. Raises `UserError` for a damaged or missing store."""
    from rich.console import Console

    from fusechat.stores.store import DistributionStore

    store, console = DistributionStore(path), Console()
    store.verify()
    for line in summary(store.manifest):
        console.print(line)
    console.print({key: store.manifest[key] for key in SHOWN if key in store.manifest})
    tokenizer = _tokenizer(tokenizer_path or store.manifest.get("path"))
    if tokenizer is None or "input_ids" not in store.columns:
        return
    for row in range(min(samples, len(store))):
        console.print(_sample(store, row, tokenizer))


def summary(manifest: dict[str, Any]) -> list[str]:
    """What a store holds and how large it is, in two lines."""
    from fusechat.stores.kinds import kind_counts

    shards = manifest["shards"]
    size, rows = sum(entry["bytes"] for entry in shards), sum(entry["rows"] for entry in shards)
    tokens = sum(entry["statistics"].get("tokens", 0) for entry in shards)
    positions = sum(entry["statistics"].get("positions", 0) for entry in shards) or sum(kind_counts(manifest).values())
    held = f"{rows:,} chats, {positions:,} response positions, {len(shards)} shards, checksums fit"
    per_token = f", {size / tokens:.1f} B per token" if tokens else ""
    per_position = f"{size / max(1, positions):.1f} B per position"
    return [
        f"[bold]{manifest['kind']}[/] of {manifest['model']}: {held}",
        f"{size / 1e6:.1f} MB{per_token}, {per_position}; log-probabilities as {manifest['logprobs']}",
    ]


def _sample(store: DistributionStore, row: int, tokenizer: Any) -> Any:
    """A table of one chat's first positions: the token before, the gold token, the most likely ones."""
    from rich.table import Table

    ids, positions, counts, top, logprobs = store.row(row, "input_ids", "positions", "counts", "ids", "logprobs")
    table, start = Table(title=f"chat {row}: {tokenizer.decode(ids)!r}"[:160]), 0
    for column in ("after", "gold next", "most likely next"):
        table.add_column(column)
    for position, count in zip(positions[:POSITIONS].tolist(), counts[:POSITIONS].tolist(), strict=True):
        before_and_gold = [repr(tokenizer.decode([int(i)])) for i in ids[position : position + 2]]
        kept = slice(start, start + min(count, ENTRIES))
        table.add_row(*before_and_gold, _likely(tokenizer, top[kept], logprobs[kept]))
        start += count
    return table


def _likely(tokenizer: Any, ids: Any, logprobs: Any) -> str:
    import numpy as np

    from fusechat.stores.encoding import decode_logprobs

    pairs = zip(ids, np.exp(decode_logprobs(logprobs)), strict=True)
    return "  ".join(f"{tokenizer.decode([int(i)])!r} {p:.3f}" for i, p in pairs)


def _tokenizer(path: str | None) -> Any:
    from fusechat.models.load import load_tokenizer

    try:
        return load_tokenizer(path) if path else None
    except UserError:
        return None


def main() -> None:
    """The command line."""
    parser = Parser(prog="python -m fusechat.inspect", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("store", help="a folder that extract or align has written")
    parser.add_argument("--samples", type=int, default=2, help="chats to decode")
    parser.add_argument("--tokenizer", help="tokenizer to decode with, where the model has moved")

    def run() -> None:
        arguments = parser.parse_args()
        describe(arguments.store, arguments.samples, arguments.tokenizer)

    plainly(run)


if __name__ == "__main__":
    main()
