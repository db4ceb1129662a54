"""FSDP2: a causal LM in shards, one unit for each of its blocks and one for the rest, embedding and head among it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

T = TypeVar("T")


def shard(model: nn.Module, mesh: Any, compute: torch.dtype) -> None:
    """Shards the parameters over a mesh of one dimension, in place.

    Shards keep the dtype they have, fp32 where they are trained. compute: what they are gathered in; gradients are
    reduced in fp32 at least.
    """
    exact = torch.promote_types(compute, torch.float32)
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=exact)}
    for block in blocks(model):
        fully_shard(block, **options)
    fully_shard(model, **options)
    whole: Any = model
    whole.within = MethodType(_within, model)
    register_fsdp_forward_method(model, "within")


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """What the outermost lists of modules hold: the decoder's layers."""
    for child in model.children():
        yield from child if isinstance(child, nn.ModuleList) else blocks(child)


def within(model: Any, work: Callable[[], T]) -> T:
    """Does ``work`` as if it were the model's forward: under FSDP embedding and head are gathered for it, once."""
    result: T = model.within(work) if hasattr(model, "within") else work()
    return result


def _within(model: nn.Module, work: Callable[[], T]) -> T:
    return work()


def whole_weights(model: nn.Module, trained_only: bool) -> dict[str, Tensor]:
    """All weights (or those that are trained) on the CPU of the first rank, as they are held; every rank must call it.

    Tied weights come once, under the name they have first.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=trained_only)
    state: dict[str, Any] = get_model_state_dict(model, options=options)
    once = dict(model.named_parameters())
    again = dict(model.named_parameters(remove_duplicate=False)).keys() - once.keys()
    return {name: value for name, value in state.items() if name not in again}
