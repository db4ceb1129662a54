"""What the benchmarks on a GPU share: their sizes, and the cost of a piece of work there (on a CPU, of its thread)."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from tests.benchmarks.measure import measure


@dataclass(frozen=True)
class Shape:
    """A Llama-shaped model without its vocabulary."""

    name: str
    hidden: int
    layers: int
    mlp: int
    heads: int
    kv_heads: int

    def config(self, vocabulary: int, positions: int) -> Any:
        """As `transformers` wants it."""
        from transformers import LlamaConfig

        return LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            intermediate_size=self.mlp,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=positions,
            tie_word_embeddings=False,
        )


@dataclass(frozen=True)
class Sizes:
    """How large everything is: the same code runs with `CARD` on a GPU and with `TINY` in the tests."""

    shapes: tuple[Shape, ...]
    tokens: tuple[int, ...]
    vocabularies: tuple[int, ...]
    chats: int  # run together by extraction, each of the first number of tokens
    merged: tuple[int, int, int]  # hidden size, layers and vocabulary of what is merged
    trained: tuple[int, int, int]  # hidden size, layers and vocabulary of the pivot of the experiment


B1, B7 = Shape("1B", 2048, 16, 8192, 32, 8), Shape("7B", 4096, 32, 14336, 32, 8)
CARD = Sizes((B1, B7), (2048, 8192), (32_000, 152_064), 8, (4096, 4, 32_000), (4096, 32, 32_002))
TINY = Sizes((Shape("tiny", 32, 2, 64, 4, 2),), (48,), (300,), 2, (32, 2, 300), (32, 2, 1200))
CPU = Sizes((Shape("50M", 512, 5, 1536, 8, 8),), (2048,), (32_000,), 4, (512, 4, 32_000), (512, 4, 32_002))
OUT_OF_MEMORY = (float("nan"), float("nan"))


def memory(device: str) -> float:
    """Bytes of the card; of a CPU, without a limit."""
    return torch.cuda.get_device_properties(device).total_memory if device == "cuda" else float("inf")


def mixed(parameters: int, device: str) -> bool:
    """Whether fp32 weights, gradients and both moments of AdamW, 16 bytes a parameter, leave a fifth of the card."""
    return 16 * parameters < 0.8 * memory(device)


def autocast(device: str, on: bool) -> AbstractContextManager[Any]:
    """Computation in bf16, where ``on``."""
    return torch.autocast(device, torch.bfloat16) if on else nullcontext()


def cost(
    work: Callable[[], Any], device: str, reset: Callable[[], Any] = dict, repeats: int = 4
) -> tuple[float, float]:
    """Seconds and peak megabytes of one piece of work; NaN where it does not fit.

    On a GPU everything allocated counts; on a CPU what comes on top of what was there, and the time of its thread.
    """
    if device != "cuda":
        found = measure(work, reset, repeats=1)
        return found.seconds, found.megabytes
    try:
        for _ in range(2):
            work()
            reset()
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            work()
            reset()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / repeats, torch.cuda.max_memory_allocated() / 1e6
    except torch.OutOfMemoryError:
        return OUT_OF_MEMORY
    finally:
        reset()
