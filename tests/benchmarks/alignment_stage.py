"""A stored 900-token chat aligned and projected, reading and writing included: CPU milliseconds of one thread, Llama 3
-> Mistral.
"""

from __future__ import annotations

import logging
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fusechat.align.alignment import Alignment, write_aligned
from fusechat.align.maps import em, prefix
from fusechat.align.stage import token_texts
from fusechat.chats.render import PLAIN_TEMPLATE, ChatRenderer
from fusechat.extract import writer as columns
from fusechat.stores.distributions import TopK
from fusechat.stores.store import DistributionStore
from fusechat.stores.writer import StoreWriter
from tests.benchmarks import tokenizers
from tests.benchmarks.measure import table

CHATS, TOKENS, K = 64, 900, 10


def made_store(path: Path, tokenizer: Any) -> DistributionStore:
    """Chats of 900 tokens of prose, code and mixed scripts with random distributions, the gold token among them."""
    tokenizer.bos_token = tokenizer.bos_token or tokenizer.eos_token
    renderer = ChatRenderer(tokenizer, template=PLAIN_TEMPLATE, max_length=TOKENS)
    texts = [*tokenizers.TEXTS.values()]
    chats = [
        {"id": f"{i:016x}", "tag": "", "messages": [{"role": "assistant", "content": f"{i} " + texts[i % 3] * 60}]}
        for i in range(CHATS)
    ]
    generator, rows = torch.Generator().manual_seed(0), []
    for chat, rendered in zip(chats, renderer([chat["messages"] for chat in chats]), strict=True):
        n = len(rendered.positions)
        logprobs = torch.randn(n, K, generator=generator).mul(2).log_softmax(-1).sort(
            -1, descending=True
        ).values + np.log(0.95)
        ids = torch.randint(0, len(tokenizer), (n, K), generator=generator)
        ids[:, 0] = torch.from_numpy(rendered.input_ids[rendered.positions + 1])
        rows.append(columns.row(chat, rendered, TopK(ids, logprobs, logprobs[:, 0])))
    writer = StoreWriter(path, "mark", 1)
    writer.write(0, columns.table(rows, len(tokenizer), "float16", TOKENS), columns.statistics(rows))
    writer.finish(vocab_size=len(tokenizer), chats="", special_ids=[])
    return DistributionStore(path)


def per_chat(
    root: Path, stores: tuple[DistributionStore, DistributionStore], kind: str, chained: bool, table_: Any, texts: Any
) -> float:
    """Best of three, milliseconds a chat."""
    seconds = []
    for repeat in range(4):  # the first compiles
        alignment = Alignment(*stores, kind, "skip", chained, "float16", table=table_, texts=texts)
        start = time.process_time()
        write_aligned(alignment, StoreWriter(root / f"{kind}{chained}{repeat}", "mark", 1), 1)
        seconds.append(time.process_time() - start)
    return 1e3 * min(seconds) / CHATS


def main() -> None:
    """Prints the table."""
    logging.disable(logging.WARNING)
    known = tokenizers.all_of_them()
    pivot, source = known["mistral"], known["llama3"]
    texts = token_texts(pivot), token_texts(source)
    maps = {"em": em(source, pivot, []), "prefix": prefix(source, pivot, [])}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        stores = made_store(root / "pivot", pivot), made_store(root / "source", source)
        rows = [
            ["dtw, table", per_chat(root, stores, "dtw", False, maps["em"], texts)],
            ["offsets, table", per_chat(root, stores, "offsets", False, maps["em"], None)],
            ["offsets, prefix with chain rule", per_chat(root, stores, "offsets", True, maps["prefix"], None)],
        ]
    found = [[what, ms, ms / 3.6e6 * 95_000] for what, ms in rows]
    table(f"alignment stage, {TOKENS} tokens a chat", ["what", "CPU ms a chat", "CPU hours for 95,000 chats"], found)


if __name__ == "__main__":
    main()
