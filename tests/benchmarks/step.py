"""An optimizer step of fusion against plain SFT of the same randomly initialised model: on a GPU 1B and 7B, else 50M in
fp32.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusechat.fusion.batches import FusionBatch
from fusechat.fusion.losses import FusionLoss
from fusechat.fusion.module import FusionModule
from fusechat.models.heads import OutputHead
from tests.benchmarks.card import CARD, CPU, Shape, Sizes, autocast, cost, mixed
from tests.benchmarks.measure import table

K = 10
HEADER = ["model", "weights", "tokens", "V", "what", "tokens/s", "of the fastest SFT", "peak MB", "of the smallest SFT"]
FUSION = "fusion, lambda 0.9"


def batch(tokens: int, vocabulary: int, device: str) -> FusionBatch:
    """One chat, three quarters of it the assistant's, with pivot and one source."""
    at = torch.arange(tokens // 4, tokens - 1)
    ids, n = torch.randint(0, vocabulary, (1, tokens)), len(at)
    numbers = {"nats": torch.tensor([[500.0, 600.0]])}
    numbers |= {"n_bytes": torch.full((1, 2), 4.0 * n), "n_tokens": torch.full((1, 2), float(n))}
    tensors = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "at": at,
        "gold": ids[0, at + 1],
        "sequence": torch.zeros_like(at),
        "ids": torch.randint(0, vocabulary, (2, n, K), dtype=torch.int32),
        "logprobs": torch.randn(2, n, K).log_softmax(-1),
        "gold_logprob": -torch.ones(2, n),
        "chunk": torch.zeros(2, 0, dtype=torch.int64),
        "chunk_nats": torch.zeros(2, 0),
        "shared": torch.zeros(2, 0, dtype=torch.bool),
        **numbers,
        "common_nats": numbers["nats"],
        "common_bytes": numbers["n_bytes"],
        "step_tokens": torch.tensor(float(n)),
    }
    return FusionBatch(**{name: tensor.to(device) for name, tensor in tensors.items()}, tags=[""])


def losses(model: Any, data: FusionBatch, device: str) -> dict[str, Callable[[], Tensor]]:
    """What a step minimises: SFT by transformers' own loss, by Liger's where it is installed and by ours; fusion."""
    labels = torch.full_like(data.input_ids, -100)
    labels[0, data.at + 1] = data.gold

    def ours(lm_weight: float) -> Callable[[], Tensor]:
        module = FusionModule("", ["source"], loss=FusionLoss(lm_weight=lm_weight))
        module.model, module.head = model, OutputHead(model)
        return lambda: module._losses(data)[0]

    found: dict[str, Callable[[], Tensor]] = {
        "SFT, transformers' loss": lambda: model(input_ids=data.input_ids, labels=labels, use_cache=False).loss
    }
    if device == "cuda" and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        head, liger = OutputHead(model), LigerFusedLinearCrossEntropyLoss()

        def by_liger() -> Tensor:
            hidden = head.hidden(data.input_ids, data.attention_mask)[0, :-1]
            value: Tensor = liger(head.projection.weight, hidden, labels[0, 1:])
            return value

        found["SFT, Liger's loss"] = by_liger
    return {**found, "SFT, lambda 1": ours(1.0), FUSION: ours(0.9)}


def compared(shape: Shape, vocabulary: int, tokens: int, device: str, precision: str) -> list[list[Any]]:
    """A line for each loss: tokens/s and peak megabytes of a step, and both against the best SFT."""
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with torch.device(device):
        from transformers import LlamaForCausalLM

        model = LlamaForCausalLM(shape.config(vocabulary, tokens)).train()
    torch.set_default_dtype(before)
    model.activation_checkpointing_enable({"use_reentrant": False})
    optimizer, data = (
        torch.optim.AdamW(model.parameters(), lr=1e-6, fused=device == "cuda"),
        batch(tokens, vocabulary, device),
    )

    def step(loss: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            with autocast(device, precision == "bf16-mixed"):
                value = loss()
            value.backward()
            optimizer.step()

        return run

    clear = lambda: optimizer.zero_grad(set_to_none=True)
    found = {what: cost(step(loss), device, clear) for what, loss in losses(model, data, device).items()}
    sft = [values for what, values in found.items() if what != FUSION and values[0] == values[0]]
    fastest, smallest = (min([v[i] for v in sft], default=float("nan")) for i in (0, 1))
    start = [shape.name, precision, tokens, vocabulary]
    return [[*start, w, tokens / s, fastest / s, mb, mb / smallest] for w, (s, mb) in found.items()]


def steps(sizes: Sizes, device: str, precision: str | None = None) -> list[list[Any]]:
    """All shapes, lengths and vocabularies. precision: None takes fp32 master weights where the card holds them."""
    rows = []
    for shape in sizes.shapes:
        for vocabulary in sizes.vocabularies:
            for tokens in sizes.tokens:
                size = parameters(shape, vocabulary)
                chosen = precision or ("bf16-mixed" if mixed(size, device) else "bf16-true")
                rows += compared(shape, vocabulary, tokens, device, chosen)
                if device == "cuda":
                    torch.cuda.empty_cache()
    return rows


def parameters(shape: Shape, vocabulary: int) -> int:
    """How many a model has, norms left out."""
    attention = 2 * shape.hidden**2 * (1 + shape.kv_heads / shape.heads)
    return int(shape.layers * (attention + 3 * shape.hidden * shape.mlp) + 2 * vocabulary * shape.hidden)


def main() -> None:
    """Prints the table."""
    if torch.cuda.is_available():
        table(f"optimizer step, {torch.cuda.get_device_name()}", HEADER, steps(CARD, "cuda"))
    else:
        torch.set_num_threads(1)
        table("optimizer step, one CPU thread", HEADER, steps(CPU, "cpu", "32-true"))


if __name__ == "__main__":
    main()
