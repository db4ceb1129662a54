"""Chats in rows of their own against shared rows: tokens per CPU second of loss and backward pass, one thread."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from fusechat.chats.padding import Layout, flattened, packed, padded
from fusechat.fusion.batches import FusionRows
from fusechat.fusion.losses import FusionLoss
from fusechat.fusion.module import FusionModule
from fusechat.fusion.plan import Ints, Plan
from fusechat.models.heads import OutputHead
from tests.benchmarks.card import Shape
from tests.benchmarks.data import store
from tests.benchmarks.measure import table

STEP, V = 32, 512
TINY_PIVOT = Shape("tiny", 128, 3, 256, 4, 4)
CHATS = {  # name -> lengths in tokens: as in experiment=tiny, and with a long tail that is cut at 512
    "tiny, 13 to 28 tokens": lambda rng: np.clip(13 + rng.gamma(1.5, 2.7, 512), 13, 28),
    "long tail, 8 to 512 tokens": lambda rng: np.clip(rng.lognormal(4.3, 1.0, 128), 8, 512),
}
LAYOUTS: dict[str, Layout] = {
    "rows of their own": padded,
    "data.packing": packed,
    "one row (as flash attention has it)": flattened,
}


def throughput(data: FusionRows, module: FusionModule, lengths: Ints, bucket: int) -> tuple[float, float]:
    """Tokens per CPU second, and the share of places that hold one."""
    options = {"step": STEP, "batch_size": STEP, "rank": 0, "world": 1, "seed": 0, "bucket": bucket}
    batches = [data[draw] for draw in Plan(np.arange(len(lengths)), lengths, lengths, **options)]  # type: ignore[arg-type]
    places = sum(batch.input_ids.numel() for batch in batches)
    start = time.process_time()
    for batch in batches:
        module._losses(batch)[0].backward()
        module.zero_grad()
    return float(lengths.sum()) / (time.process_time() - start), float(lengths.sum()) / places


def module() -> FusionModule:
    """The tiny pivot, random, about to be trained on one source."""
    from transformers import LlamaForCausalLM

    made = FusionModule("", ["source"], loss=FusionLoss(lm_weight=0.5))
    made.model = LlamaForCausalLM(TINY_PIVOT.config(V, 512)).train()
    made.head = OutputHead(made.model)
    return made


def compared(name: str, folder: Path) -> list[list[object]]:
    """A line for each layout and bucket; ratios are against rows of their own, taken in turns, best of three."""
    lengths = CHATS[name](np.random.default_rng(0)).astype(np.int64)
    made, trained, rows = store(folder / name, "float16", 0.5, lengths.tolist(), V), module(), []
    data = {what: FusionRows([made, made], 0, lay=lay) for what, lay in LAYOUTS.items()}
    for bucket in (1, 16):
        found = [{what: throughput(each, trained, lengths, bucket) for what, each in data.items()} for _ in range(3)]
        best = {what: max(run[what] for run in found) for what in data}
        first = best["rows of their own"][0]
        rows += [[name, bucket, what, share, speed, speed / first] for what, (speed, share) in best.items()]
    return rows


def main() -> None:
    """Prints the table."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    header = ["chats", "data.bucket", "rows", "places that hold a token", "tokens/CPU s", "of rows of their own"]
    with tempfile.TemporaryDirectory() as folder:
        for name in CHATS:
            table(f"packing: {STEP} chats a step, hidden 128, 3 layers, fp32", header, compared(name, Path(folder)))


if __name__ == "__main__":
    main()
