"""Training data: bytes per token on disk, and how fast a DataLoader delivers stored examples, one thread."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from fusechat.fusion.batches import FusionRows
from fusechat.fusion.plan import Draw
from fusechat.stores.encoding import encode_logprobs
from fusechat.stores.store import DistributionStore
from fusechat.stores.writer import StoreWriter, list_column
from tests.benchmarks.measure import table

CHATS, TOKENS, K, V = 400, 512, 10, 32_000


def store(
    path: Path, kind: str, response: float, lengths: Sequence[int] = (TOKENS,) * CHATS, vocabulary: int = V
) -> DistributionStore:
    """A store of random distributions over chats of some lengths, a share ``response`` of them the assistant's."""
    rng, chats, counts = np.random.default_rng(0), len(lengths), [int(length * response) for length in lengths]
    rows = [np.sort(rng.gumbel(size=(n, K)).astype(np.float32) * 2)[:, ::-1] for n in counts]
    logprobs = [(r - np.log(np.exp(r).sum(-1, keepdims=True))).reshape(-1) for r in rows]
    ids = [rng.integers(0, vocabulary, n * K) for n in counts]
    positions = [np.array([length - n - 1, length - 1]) for length, n in zip(lengths, counts, strict=True)]
    lists = {
        "input_ids": ([rng.integers(0, vocabulary, length) for length in lengths], np.uint16),
        "positions": (positions, np.uint16),
        "boundaries": ([np.ones(n) for n in counts], np.uint8),
        "counts": ([np.array([K])] * chats, np.uint16),
        "ids": (ids, np.uint16),
        "gold_logprob": ([-np.ones(n) for n in counts], np.float16),
    }
    columns = {name: list_column(values, dtype) for name, (values, dtype) in lists.items()}
    columns["logprobs"] = list_column([encode_logprobs(r, kind) for r in logprobs], np.dtype(kind))
    scalars = {"id": [f"{i:016x}" for i in range(chats)], "tag": [""] * chats, "text_hash": ["0" * 8] * chats}
    numbers = {
        "nats": np.full(chats, 500.0),
        "bytes": 4 * np.array(counts, np.int32),
        "tokens": np.array(counts, np.int32),
    }
    writer = StoreWriter(path, "mark", 1)
    writer.write(0, pa.table({**scalars, **numbers, **columns}), {})
    writer.finish(vocab_size=vocabulary)
    return DistributionStore(path)


def throughput(data: FusionRows) -> float:
    """Million tokens per CPU second, collation included."""
    order = np.random.default_rng(0).permutation(CHATS)
    draws = [Draw(order[i : i + 8].tolist(), 1) for i in range(0, CHATS, 8)]
    data[draws[0]]
    start = time.process_time()
    for draw in draws:
        data[draw]
    return CHATS * TOKENS / (time.process_time() - start) / 1e6


def reading(data: DistributionStore) -> float:
    """Million tokens per CPU second that the store alone delivers, every column touched."""
    start = time.process_time()
    for row in np.random.default_rng(0).permutation(CHATS):
        for column in data.row(int(row), "input_ids", "ids", "logprobs", "gold_logprob"):
            column.max()
    return CHATS * TOKENS / (time.process_time() - start) / 1e6


def main() -> None:
    """Prints the table."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("float16", "uint8"):
            for response in (0.5, 0.8, 0.99):
                made = store(Path(folder) / f"{kind}{response}", kind, response)
                size = made.manifest["shards"][0]["bytes"] / (CHATS * TOKENS)
                rows.append([kind, f"{response:.0%}", size, reading(made), throughput(FusionRows([made, made], 0))])
    header = [
        "log-probabilities",
        "assistant's share",
        "B per token",
        "read, M tokens/CPU s",
        "collated with one source, M tokens/CPU s",
    ]
    table("stores: k 10, V 32,000, 512 tokens a chat", header, rows)


if __name__ == "__main__":
    main()
