"""Everything that `make gpu` measures, side by side in one process, on a card: python -m tests.benchmarks gpu

The parts that users decide by come first; a part that would begin after `LIMIT` is named and left out.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from fusechat.extract.extractor import Extractor
from fusechat.extract.kinds import Keep
from fusechat.fusion.gradient import fused_loss
from fusechat.fusion.losses import FusionLoss
from fusechat.fusion.targets import Targets
from fusechat.merging.run import merge
from fusechat.models.shards import CheckpointWriter
from tests.benchmarks import experiment, step
from tests.benchmarks.card import CARD, Sizes, cost
from tests.benchmarks.measure import table
from tests.benchmarks.merging import plan

MERGED: dict[str, dict[str, Any]] = {"varm": {}, "ties": {"density": 0.2}, "sce": {"density": 0.1}}
FORWARD = "the forward pass"
LIMIT = 390  # seconds: with the longest part after it and the checks before it, all ends within nine minutes


def losses(
    n: int, hidden: int, vocabulary: int, device: str
) -> tuple[dict[str, Callable[[], Tensor]], Callable[[], Any]]:
    """Loss and backward of n positions from bf16 hidden states, lm_head included, by all that are installed; and what
    clears up.
    """
    h = torch.randn(n, hidden, device=device, dtype=torch.bfloat16).requires_grad_()
    linear = torch.nn.Linear(hidden, vocabulary, bias=False, device=device, dtype=torch.bfloat16)
    ids = torch.randint(0, vocabulary, (n, step.K), device=device)
    gold, weight = torch.randint(0, vocabulary, (n,), device=device), torch.full((n,), 0.5 / n, device=device)
    targets = Targets(ids, torch.randn(n, step.K, device=device).softmax(-1), gold, weight, weight)
    head = SimpleNamespace(projection=linear, transform=lambda z: z, softcap=None, scale=1.0)
    options = torch.nn.LinearCrossEntropyOptions()
    of_torch = torch.nn.functional.linear_cross_entropy
    found: dict[str, Callable[[], Tensor]] = {
        "SFT + fusion, ours": lambda: fused_loss(h, head, targets, FusionLoss())[0],
        "SFT, torch's linear cross entropy": lambda: of_torch(h, linear.weight, gold, options=options),
        "SFT, logits held whole": lambda: torch.nn.functional.cross_entropy(linear(h).float(), gold),
    }
    if device == "cuda" and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        found["SFT, Liger"] = lambda: liger(linear.weight, h, gold)
    if device == "cuda" and importlib.util.find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy

        found["SFT, cut cross entropy"] = lambda: linear_cross_entropy(h, linear.weight, gold)

    def clear() -> None:
        h.grad = linear.weight.grad = None

    return found, clear


def loss_alone(sizes: Sizes, device: str) -> list[list[Any]]:
    """A line for each loss, length and vocabulary."""
    rows = []
    hidden = sizes.shapes[-1].hidden
    for vocabulary in sizes.vocabularies:
        for n in sizes.tokens:
            found, clear = losses(n, hidden, vocabulary, device)
            costs = {name: cost(lambda f=loss: f().backward(), device, clear) for name, loss in found.items()}  # type: ignore[misc]
            ours = costs["SFT + fusion, ours"][0]
            rows += [[vocabulary, n, name, 1e3 * s, s / ours, mb] for name, (s, mb) in costs.items()]
    return rows


def extraction(sizes: Sizes, device: str) -> list[list[Any]]:
    """Top-k of three quarters of the positions against the model's bare forward pass."""
    from transformers import LlamaForCausalLM

    rows, tokens, vocabulary = [], sizes.tokens[0], sizes.vocabularies[-1]
    for shape in sizes.shapes:
        with torch.device(device):
            torch.set_default_dtype(torch.bfloat16)
            model = LlamaForCausalLM(shape.config(vocabulary, tokens)).eval()
            torch.set_default_dtype(torch.float32)
        chats = [np.random.default_rng(i).integers(0, vocabulary, tokens) for i in range(sizes.chats)]
        positions = np.arange(tokens // 4, tokens - 1)
        rendered: list[Any] = [
            SimpleNamespace(text=str(i), input_ids=c, positions=positions) for i, c in enumerate(chats)
        ]
        extract, ids = Extractor(model, "top_k", Keep(vocabulary)), torch.from_numpy(np.stack(chats)).to(device)

        @torch.inference_mode()
        def bare(model: Any = model, ids: Tensor = ids) -> None:
            model(input_ids=ids, use_cache=False)

        @torch.inference_mode()
        def body(model: Any = model, ids: Tensor = ids) -> None:
            model.model(input_ids=ids, use_cache=False)

        works: dict[str, Callable[[], Any]] = {FORWARD: bare, "without its lm_head": body}
        works["extraction"] = lambda extract=extract, rendered=rendered: extract(rendered)  # type: ignore[misc]
        costs = {what: cost(work, device) for what, work in works.items()}
        forward = costs[FORWARD][0]
        total = sizes.chats * tokens
        rows += [[shape.name, vocabulary, w, total / s, s / forward, mb] for w, (s, mb) in costs.items()]
    return rows


def checkpoints(root: Path, sizes: Sizes, device: str) -> float:
    """Writes pivot, t1 and t2 in bf16, drawn on the card; returns the gigabytes of one."""
    width, layers, vocabulary = sizes.merged
    shapes = plan(width, layers, vocabulary)
    for name in ("pivot", "t1", "t2"):
        (root / name).mkdir(parents=True)
        writer, generator = CheckpointWriter(root / name, shapes, 5 << 30), torch.Generator(device).manual_seed(0)
        noise = torch.Generator(device).manual_seed(sum(name.encode()))
        for key, (shape, dtype) in shapes.items():
            tensor = torch.randn(shape, generator=generator, device=device) * 0.02
            if name != "pivot":
                tensor += torch.randn(shape, generator=noise, device=device) * 0.001
            writer.write(key, tensor.to(dtype).cpu())
        writer.close()
        (root / name / "config.json").write_text('{"model_type": "mistral"}')
    return sum(file.stat().st_size for file in (root / "pivot").glob("*.safetensors")) / 1e9


def merging(sizes: Sizes, device: str) -> list[list[Any]]:
    """Two targets by each method, slices on the CPU and on the card: seconds, and seconds a gigabyte of the output."""
    rows = []
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, FUSECHAT_CACHE=f"{folder}/memory"):
        root = Path(folder)
        size = checkpoints(root, sizes, device)
        for method, settings in MERGED.items():
            for where in dict.fromkeys(("cpu", device)):
                shutil.rmtree(root / "memory", ignore_errors=True)  # what VaRM has measured
                start, before = time.perf_counter(), time.process_time()
                targets = [root / "t1", root / "t2"]
                merge(method, root / "pivot", targets, root / "out", settings=settings, device=where, overwrite=True)
                seconds = time.perf_counter() - start
                rows.append([method, where, seconds, time.process_time() - before, seconds / size])
    return rows


PARTS: dict[str, tuple[Callable[[Sizes, str], list[list[Any]]], list[str]]] = {
    "an optimizer step": (step.steps, step.HEADER),
    "loss and backward alone, bf16, lm_head included": (
        loss_alone,
        ["V", "positions", "what", "ms", "times ours", "peak MB"],
    ),
    "extraction, top 10": (extraction, ["model", "V", "what", "tokens/s", "times the forward pass", "peak MB"]),
    "three steps of fusechat_7b_varm, export, merge": (experiment.three_steps, experiment.HEADER),
    "merging two targets": (merging, ["method", "merge.device", "s", "CPU s", "s per GB"]),
}


def measured(sizes: Sizes, device: str, limit: float = LIMIT) -> None:
    """Prints a table for each part."""
    start = time.perf_counter()
    for title, (part, header) in PARTS.items():
        if (so_far := time.perf_counter() - start) > limit:
            print(f"\nleft out after {so_far:.0f} s: {title}")
            continue
        table(title, header, part(sizes, device))
        if device == "cuda":
            torch.cuda.empty_cache()
    print(f"\nall of it took {time.perf_counter() - start:.0f} s")


def main() -> None:
    """Everything, on the card that is there."""
    if not torch.cuda.is_available():
        print("no GPU here: nothing to measure")
        return
    gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    print(f"{torch.cuda.get_device_name()}, {gib:.0f} GiB, torch {torch.__version__}")
    measured(CARD, "cuda")


if __name__ == "__main__":
    main()
