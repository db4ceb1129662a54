"""An optimizer step of fusion against plain SFT of the same randomly initialised model: on a GPU 1B and 7B in bf16, else 50M in fp32."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fusechat.fusion.data import FusionBatch
from fusechat.fusion.losses import FusionLoss
from fusechat.fusion.module import FusionModule
from fusechat.models.heads import OutputHead
from tests.benchmarks.measure import measure, table

TOKENS, K, V = 2048, 10, 32_000
GPU = {"1B": (2048, 16, 5632, 32), "7B": (4096, 32, 11008, 32)}  # hidden size, layers, MLP size, heads
CPU = {"50M": (512, 5, 1536, 8)}


def batch(device: str) -> FusionBatch:
    """One chat of 2,048 tokens, three quarters of them the assistant's, with pivot and one source."""
    at = torch.arange(TOKENS // 4, TOKENS - 1)
    ids, n = torch.randint(0, V, (1, TOKENS)), len(at)
    logprobs = torch.randn(2, n, K).log_softmax(-1)
    numbers = [torch.tensor([[500.0, 600.0]]), torch.full((1, 2), 4.0 * n), torch.full((1, 2), float(n))]
    made = FusionBatch(
        ids,
        torch.ones_like(ids),
        at,
        ids[0, at + 1],
        torch.zeros_like(at),
        torch.randint(0, V, (2, n, K), dtype=torch.int32),
        logprobs,
        -torch.ones(2, n),
        *numbers,
        *numbers[:2],
        torch.tensor(float(n)),
        [""],
    )
    moved = {key: value.to(device) for key, value in vars(made).items() if isinstance(value, torch.Tensor)}
    return FusionBatch(**{**vars(made), **moved})


def steps(shape: tuple[int, int, int, int], device: str) -> dict[str, Callable[[], None]]:
    """One optimizer step each: transformers' own SFT loss, ours with lambda 1, and fusion with lambda 0.9."""
    hidden, layers, mlp, heads = shape
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=mlp,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=TOKENS,
    )
    torch.set_default_dtype(torch.bfloat16 if device == "cuda" else torch.float32)
    with torch.device(device):
        model = LlamaForCausalLM(config).train()
    torch.set_default_dtype(torch.float32)
    model.activation_checkpointing_enable({"use_reentrant": False})
    optimizer, data = torch.optim.AdamW(model.parameters(), lr=1e-6), batch(device)
    labels = torch.full_like(data.input_ids, -100)
    labels[0, data.at + 1] = data.gold

    def step(loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def run() -> None:
            loss().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return run

    def ours(lm_weight: float) -> Callable[[], torch.Tensor]:
        module = FusionModule("", ["source"], loss=FusionLoss(lm_weight=lm_weight))
        module.model, module.head = model, OutputHead(model)
        return lambda: module._losses(data)[0]

    plain = lambda: model(input_ids=data.input_ids, labels=labels, use_cache=False).loss
    return {
        "SFT, transformers' loss": step(plain),
        "SFT, lambda 1": step(ours(1.0)),
        "fusion, lambda 0.9": step(ours(0.9)),
    }


def cost(work: Callable[[], None], device: str) -> tuple[float, float]:
    """Seconds and peak megabytes of one step; on a GPU everything allocated, on a CPU what comes on top of model and optimizer."""
    if device == "cpu":
        found = measure(work, dict, repeats=2)
        return found.seconds, found.megabytes
    for _ in range(3):
        work()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(10):
        work()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / 10, torch.cuda.max_memory_allocated() / 1e6


def main() -> None:
    """Prints the table."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(torch.get_num_threads() if device == "cuda" else 1)
    rows = []
    for name, shape in (GPU if device == "cuda" else CPU).items():
        for what, work in steps(shape, device).items():
            seconds, megabytes = cost(work, device)
            rows.append([name, what, TOKENS / seconds, megabytes])
    card = torch.cuda.get_device_name() if device == "cuda" else "one CPU thread"
    table(f"optimizer step, {TOKENS} tokens, {card}", ["model", "what", "tokens/s", "peak MB"], rows)


if __name__ == "__main__":
    main()
