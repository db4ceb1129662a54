"""Low-rank adapters (LoRA, arXiv 2106.09685) over the pivot, and the model that they make of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fusechat.models import load as models


def with_adapters(model: Any, lora: Mapping[str, Any]) -> Any:
    """The model with low-rank adapters in fp32, which alone are trained."""
    import peft

    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **lora))


def merged_adapters(
    path: str, loading: Mapping[str, Any], lora: Mapping[str, Any], adapters: Mapping[str, Tensor]
) -> Any:
    """The pivot, loaded once more in fp32 at least, with trained adapters added to its weights: W + B A scale."""
    exact = torch.promote_types(getattr(torch, loading["dtype"]), torch.float32)
    loading = {**loading, "dtype": str(exact).removeprefix("torch."), "load_in": None}
    model = with_adapters(models.load_model(path, **loading), lora)
    unknown = model.load_state_dict(adapters, strict=False).unexpected_keys
    assert not unknown, unknown
    return model.merge_and_unload()
