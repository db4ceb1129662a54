"""The output head of a causal LM: hidden states -> logits, including what some architectures do to their logits."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from fusechat.app.errors import UserError

Within = Callable[[Callable[[], Tensor]], Tensor]


CARD_SHARE, TILE = 128, 128  # logits take one part in so many of a card's memory, in rows that fill its matrix units


@lru_cache
def chunk_rows(device: torch.device, vocabulary: int, on_cpu: int) -> int:
    """How many rows of logits [rows, V] in fp32 are computed together.

    on_cpu: as many elements, for a CPU works in its caches. A card wants products that fill it, and has the memory.
    """
    if device.type != "cuda":
        return max(1, on_cpu // vocabulary)
    memory = int(torch.cuda.get_device_properties(device).total_memory)
    return max(TILE, memory // (4 * CARD_SHARE * vocabulary) // TILE * TILE)


def close(ours: Tensor, own: Tensor, tolerance: float = 1e-4) -> bool:
    """Whether logits are a model's own, computed in another way: half precision is given more room."""
    tolerance, own = 0.05 if own.dtype in (torch.bfloat16, torch.float16) else tolerance, own.float()
    return bool((own - ours.float()).abs().max() <= tolerance * own.abs().max().clamp_min(1.0))


class OutputHead:
    """Splits a causal LM into backbone and lm_head, so that logits are computed only where they are needed.

    Covers scaled (Cohere, Granite) and soft-capped (Gemma-2) logits and tied embeddings; `verify` compares with the
    model's own logits and refuses whatever else an architecture may do. B batch, T tokens, D hidden size, V vocabulary.
    otherwise: what can be done with a model that is refused.
    """

    def __init__(self, model: nn.Module, otherwise: str = "take another model") -> None:
        whole: Any = model
        self.otherwise = otherwise
        self.model: Any = whole.get_base_model() if hasattr(model, "get_base_model") else whole
        config = self.model.config.get_text_config()
        self.scale = float(getattr(config, "logit_scale", None) or 1.0) / float(
            getattr(config, "logits_scaling", None) or 1.0
        )
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        head = self.model.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise UserError(f"{type(self.model).__name__} has no linear lm_head; {otherwise}")
        self.projection: nn.Linear = head
        self.vocabulary = int(config.vocab_size)

    def hidden(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
        """Last hidden states, [B, T, D]."""
        output = self.model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **options)
        return output.last_hidden_state  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of any hidden states [..., D] -> [..., V]."""
        return self.transform(self.projection(hidden))

    def transform(self, logits: Tensor) -> Tensor:
        """What the architecture does to the lm_head's output."""
        if self.scale != 1.0:
            logits = logits * self.scale
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits

    @torch.no_grad()
    def verify(self, input_ids: Tensor, within: Within | None = None) -> None:
        """Raises `UserError` unless backbone + head give the model's own logits on ``input_ids``.

        within: does some work as the forward of the whole model that gathers its parameters, where it is in shards.
        """
        probe = input_ids[:1, :16]
        training = self.model.training
        self.model.eval()
        as_forward = within or (lambda work: work())
        own: Tensor = as_forward(lambda: self.model.forward(input_ids=probe, use_cache=False).logits)
        ours = as_forward(lambda: self.logits(self.hidden(probe)))
        self.model.train(training)
        if own.shape != ours.shape or not close(ours, own):
            raise UserError(
                f"{type(self.model).__name__} computes its logits in a way that backbone and lm_head do not show; "
                f"{self.otherwise}"
            )
