"""fusechat_7b_varm with random weights in Mistral's shape: three optimizer steps of each target, export, reload, merge."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fusechat.tiny.models import make_tokenizer
from tests.benchmarks import scale
from tests.benchmarks.card import Sizes, memory, mixed
from tests.conftest import run_entry

HEADER = ["what", "s", "peak MB on the device", "notes"]
SOURCES, STEPS, CHATS, FEWER = ("nh2_mixtral", "nh2_solar"), 3, 500, 8
DISK = 14  # bytes a parameter: pivot and merged model in bf16, two targets in fp32, half a model to spare


def pivot(path: Path, shape: tuple[int, int, int], device: str, text: str) -> Any:
    """Writes a randomly initialised Mistral in bf16 with a tokenizer of its own; returns the tokenizer."""
    from transformers import MistralConfig, MistralForCausalLM

    hidden, layers, vocabulary = shape
    heads = {"num_attention_heads": max(1, hidden // 128), "num_key_value_heads": max(1, hidden // 512)}
    config = MistralConfig(
        vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers, intermediate_size=hidden * 7 // 2, **heads
    )
    tokenizer = make_tokenizer("llama", 400, [text])
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        model = MistralForCausalLM(config)
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return tokenizer


def layers_that_fit(shape: tuple[int, int, int], folder: Path) -> tuple[int, int, int]:
    """The shape, with `FEWER` layers where the disk does not hold two targets of all of them."""
    hidden, layers, vocabulary = shape
    free = shutil.disk_usage(folder).free
    return shape if DISK * size(shape) < free else (hidden, min(layers, FEWER), vocabulary)


def size(shape: tuple[int, int, int]) -> int:
    """Parameters, norms left out."""
    hidden, layers, vocabulary = shape
    return layers * int(hidden * hidden * (2.5 + 10.5)) + 2 * vocabulary * hidden


def three_steps(sizes: Sizes, device: str, full: bool | None = None) -> list[list[Any]]:
    """A line for each thing done. full: all weights are trained, or LoRA; None: all where the card holds that."""
    with tempfile.TemporaryDirectory() as folder:
        shape = layers_that_fit(sizes.trained, Path(folder))
        full = mixed(size(shape), device) if full is None else full
        return _three_steps(Path(folder), shape, sizes.tokens[0], device, full)


def _three_steps(root: Path, shape: tuple[int, int, int], tokens: int, device: str, full: bool) -> list[list[Any]]:
    rows: list[list[Any]] = []
    place, model, text = root / "fusechat_7b_varm", root / "pivot", scale.TEXT * (tokens // 40)

    def timed(what: str, work: Callable[[], Any], notes: str = "") -> Any:
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        result = work()
        peak = torch.cuda.max_memory_allocated() / 1e6 if device == "cuda" else float("nan")
        rows.append([what, time.perf_counter() - start, peak, notes])
        return result

    tokenizer = timed(
        "write the pivot", lambda: pivot(model, shape, device, text), f"{size(shape) / 1e9:.2f}B, {shape[1]} layers"
    )
    store = scale.write(place / "distributions/pivot", tokenizer, CHATS, per_shard=CHATS, text=text)
    for name in SOURCES:
        scale.linked(place / "aligned" / name, store)
    options = ["experiment=fusechat_7b_varm", f"paths.root={root}", f"pivot.path={model}", "logger=none"]
    options += [
        f"trainer.accelerator={device}",
        "trainer.devices=1",
        "trainer.strategy=auto",
        f"trainer.max_steps={STEPS}",
    ]
    options += ["trainer.precision=bf16-mixed", "callbacks.progress_bar=false", "data.batch_size=4"] + (
        [] if full else ["lora.enabled=true", "pivot.dtype=bfloat16"]
    )
    how = (
        "all weights, fp32 masters, checkpointing"
        if full
        else f"LoRA ({memory(device) / 1e9:.0f} GB do not hold 16 bytes a parameter)"
    )
    for name in SOURCES:
        timed(
            f"three steps and export: {name}", lambda name=name: run_entry("train", [*options, f"source={name}"]), how
        )  # type: ignore[misc]
    timed(
        "merge of two by varm",
        lambda: run_entry("merge", [*options, f"merge.device={device}"]),
        f"merge.device={device}",
    )
    merged = next((place / "merged").iterdir())
    moved = timed("reload the merged model", lambda: change(merged, model, device))
    rows[-1][-1] = f"relative change of a matrix {moved:.1e}"
    return rows


def change(merged: Path, model: Path, device: str) -> float:
    """Reloads a merged model, asks it for finite logits, and says how far its first projection moved from the pivot's."""
    from transformers import AutoModelForCausalLM

    name = "model.layers.0.self_attn.q_proj.weight"
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).state_dict()[name].clone()
    found = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.bfloat16).to(device)
    with torch.inference_mode():
        assert bool(torch.isfinite(found(torch.arange(8, device=device)[None]).logits).all())
    own = AutoModelForCausalLM.from_pretrained(merged, dtype="auto").state_dict()[name].float()
    return float((own - theirs).norm() / theirs.norm())
