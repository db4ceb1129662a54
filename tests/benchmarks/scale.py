"""Stores of 1,000 to 1,000,000 synthetic chats of two sources: seconds and resident memory of whatever looks at all of them.

python -m tests.benchmarks scale            BENCH_DIR=DIR: where the stores lie meanwhile (1.2 GB)
Every size is measured in a process of its own, so that its memory is its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import torch

from fusechat.align.alignment import Alignment
from fusechat.align.checks import check_texts, same_tokens
from fusechat.align.maps import em
from fusechat.align.stage import link_shards
from fusechat.chats.render import ChatRenderer
from fusechat.extract import writer as columns
from fusechat.fusion.data import FusionDataModule
from fusechat.fusion.inputs import open_stores
from fusechat.fusion.options import Data
from fusechat.models.load import tokenizer_identity
from fusechat.stores.distributions import TopK
from fusechat.stores.store import DistributionStore
from fusechat.stores.writer import StoreWriter
from fusechat.tiny.models import make_tokenizer
from tests.benchmarks.measure import resident, table

SIZES = [1_000, 10_000, 100_000, 1_000_000]
PER_SHARD, K, BATCHES = 1_000, 10, 100  # the default rows of a shard; batches that a worker delivers
TEXT = "Salt, bread and iron."


def template(tokenizer: Any, count: int, text: str) -> tuple[pa.Table, dict[str, Any]]:
    """A shard of chats with random distributions, and its statistics."""
    texts = [f"{i} {text}" for i in range(count)]
    messages = [[{"role": "user", "content": "Name it."}, {"role": "assistant", "content": text}] for text in texts]
    generator, rows = torch.Generator().manual_seed(0), []
    for chat, rendered in zip(messages, ChatRenderer(tokenizer)(messages), strict=True):
        n = len(rendered.positions)
        logprobs = torch.randn(n, K, generator=generator).mul(2).log_softmax(-1).sort(-1, descending=True).values
        ids = torch.randint(0, len(tokenizer), (n, K), generator=generator)
        about = {"id": "", "tag": "a", "messages": chat}
        rows.append(columns.row(about, rendered, TopK(ids, logprobs - 0.05, logprobs[:, 0] - 0.05)))
    return columns.table(rows, len(tokenizer), "float16", 2048), columns.statistics(rows)


def write(
    path: Path, tokenizer: Any, chats: int, per_shard: int = PER_SHARD, text: str = TEXT, **about: Any
) -> DistributionStore:
    """The template as often as it takes, with ids of its own in every shard."""
    shard, statistics = template(tokenizer, per_shard, text)
    writer = StoreWriter(path, path.name, chats // per_shard)
    place = shard.column_names.index("id")
    for index in range(writer.total):
        ids = pa.array([f"{row:016x}" for row in range(index * per_shard, (index + 1) * per_shard)])
        writer.write(index, shard.set_column(place, "id", ids), statistics)
    fixed = {"vocab_size": len(tokenizer), "special_ids": [], "chats": "c", "offsets": True}
    fixed |= {"tokenizer": tokenizer_identity(tokenizer), "path": tokenizer.name_or_path}
    writer.finish(**fixed | about)
    return DistributionStore(path)


def linked(path: Path, pivot: DistributionStore) -> None:
    """An aligned store that shares the pivot's files."""
    writer = StoreWriter(path, path.name, len(pivot.ranges))
    link_shards(pivot, writer)
    writer.finish(pivot=pivot.fingerprint, vocab_size=pivot.manifest["vocab_size"], chats="c")


def tokenizers() -> tuple[Any, Any]:
    """The pivot's and the source's."""
    made = [make_tokenizer(kind, size, [TEXT]) for kind, size in (("llama", 400), ("qwen2", 300))]
    return made[0], made[1]


def make(root: Path, chats: int) -> None:
    """pivot, source; aligned/a and aligned/b: two sources, as stores that share their files."""
    pivot_tokenizer, source_tokenizer = tokenizers()
    pivot = write(root / "pivot", pivot_tokenizer, chats)
    write(root / "source", source_tokenizer, chats)
    for name in ("a", "b"):
        linked(root / "aligned" / name, pivot)


def phases(root: Path) -> list[list[Any]]:
    """[what, CPU seconds, highest resident MB meanwhile, anonymous MB after it], one after another in this process."""
    found: list[list[Any]] = []

    def timed(what: str, work: Callable[[], Any]) -> Any:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        start = time.process_time()
        result = work()
        found.append([what, time.process_time() - start, resident("VmHWM:"), resident("RssAnon:")])
        return result

    def resumed() -> Any:
        again = data.train_dataloader()
        again.plan.epoch, again.plan.start = 1, again.plan.optimizer_steps // 2
        return next(iter(again.plan))

    pair, written = tokenizers(), StoreWriter(root / "out", "out", 1)
    timed("nothing yet: the imports", dict)
    stores = timed("open three stores", lambda: open_stores(root / "pivot", [root / "aligned/a", root / "aligned/b"]))
    options: dict[str, Any] = {"max_tokens": 2048, "vocab_size": len(pair[0]), "pad_token_id": 0}
    settings = Data(global_batch=128, batch_size=8)
    what = "check, checksums included, and split"
    data = timed(what, lambda: FusionDataModule(stores, settings, **options))
    data.trainer = SimpleNamespace(global_rank=0, world_size=1)
    draw = timed("plan an epoch", lambda: next(iter(data.train_dataloader().plan)))
    timed("first batch", lambda: data.rows[draw])
    timed("resume in mid-epoch", resumed)
    source = DistributionStore(root / "source")
    timed("align: same tokens?", lambda: (same_tokens(stores[0], source), same_tokens(stores[0], stores[1])))
    timed("align: same texts?", lambda: check_texts(stores[0], source, pair))
    alignment = Alignment(stores[0], source, "offsets", "skip", False, "float16", table=em(pair[1], pair[0], []))
    alignment.shard(0)  # compiles
    timed("align a shard", lambda: written.write(0, *alignment.shard(len(source.ranges) // 2)))
    found.append([f"a DataLoader's worker, {BATCHES} batches", float("nan"), *worker_memory(data)])
    return found


def worker_memory(data: FusionDataModule) -> tuple[float, float]:
    """Megabytes of one worker: what it has read or changed itself, of these anonymous."""
    data.settings = Data(global_batch=128, batch_size=8, num_workers=1)
    batches = iter(data.train_dataloader())
    for _ in range(BATCHES):
        next(batches)
    fields = Path(f"/proc/{batches._workers[0].pid}/smaps_rollup").read_text().splitlines()[1:]
    kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in fields}
    private = kilobytes["Private_Clean"] + kilobytes["Private_Dirty"]
    return private / 1024, kilobytes["Private_Dirty"] / 1024


def main() -> None:
    """Prints the tables."""
    columns: dict[str, list[str]] = {}
    sizes = []
    for chats in [int(n) for n in os.environ.get("SCALE", "").split(",") if n] or SIZES:
        with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR")) as folder:
            make(Path(folder), chats)
            command = [sys.executable, "-m", "tests.benchmarks.scale", folder]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            store = DistributionStore(Path(folder) / "pivot")
            entries = store.manifest["shards"]
            total = sum(e["bytes"] for e in entries)
            manifest = (store.path / "manifest.json").stat().st_size
            sizes.append([f"{chats:,}", len(list(store.path.iterdir())), total / chats, total / 1e6, manifest / 1e6])
        for what, seconds, peak, own in json.loads(done.stdout.splitlines()[-1]):
            columns.setdefault(what, []).append(f"{seconds:.3f} s, {peak:.0f} MB, {own:.0f} MB".removeprefix("nan s, "))
    header = [f"{row[0]} chats" for row in sizes]
    table("a store", ["chats", "files", "B per chat", "MB", "manifest MB"], sizes)
    table(
        "CPU seconds, highest resident MB meanwhile, anonymous MB after it",
        ["what", *header],
        [[w, *c] for w, c in columns.items()],
    )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(phases(Path(sys.argv[1]))))
    else:
        main()
