"""FSDP2: a causal LM in shards, one unit for each of its blocks and one for the rest, embedding and head among it.

The first rank alone reads the weights; the others build the model without any and get their shards from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from fusechat.app.errors import UserError
from fusechat.fusion.ranks import gathered

T = TypeVar("T")


def first_loads(load: Callable[[], T], empty: Callable[[], T]) -> T:
    """What ``load`` gives on the first rank and ``empty`` on the others; a `UserError` of any rank is raised on all."""
    made, wrong = None, None
    try:
        made = empty() if dist.get_rank() else load()
    except UserError as error:
        wrong = str(error)
    for told in gathered(wrong):
        if told is not None:
            raise UserError(told)
    assert made is not None
    return made


def shard(model: nn.Module, mesh: Any, compute: torch.dtype, device: torch.device) -> None:
    """Shards the parameters over a mesh of one dimension, in place; they come from its first rank, to each its own.

    Elsewhere the model may be on ``meta``, and no rank but the first ever holds more than its shards and one tensor's.
    Shards keep the dtype they have, fp32 where they are trained. compute: what they are gathered in; gradients are
    reduced in fp32 at least. device: this rank's.
    """
    whole = {name: tensor.detach() for name, tensor in held(model).items()}
    (dtypes, *_) = gathered({name: tensor.dtype for name, tensor in whole.items()})
    for name, tensor in held(model).items():
        tensor.data = tensor.data.to(dtypes[name])  # an architecture may keep some of its own
    _fully_shard(model, mesh, compute)
    group, first = mesh.get_group(), mesh.get_local_rank() == 0
    if not first:
        model.to_empty(device=device)
    for name, tensor in held(model).items():
        source = whole.pop(name).to(device) if first else None
        if isinstance(tensor, DTensor):
            _hand_out(source, tensor.to_local().detach(), tensor.shape, group)
        else:
            dist.broadcast(tensor.data if source is None else source, group_src=0, group=group)


def held(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, those that no checkpoint holds (RoPE's frequencies) too; tied ones once."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _hand_out(source: Tensor | None, local: Tensor, shape: torch.Size, group: Any) -> None:
    """Rows of a tensor to the ranks that hold them, as many to each but for the last. source: the first rank's."""
    rows = -(-shape[0] // dist.get_world_size(group))
    part = local.new_empty(rows, *shape[1:])
    parts = None
    if source is not None:
        parts = [source[n * rows : (n + 1) * rows] for n in range(dist.get_world_size(group))]
        parts = [torch.cat([p, p.new_zeros(rows - len(p), *shape[1:])]) if len(p) < rows else p for p in parts]
    dist.scatter(part, parts, group_src=0, group=group)
    local.copy_(part[: len(local)])


def _fully_shard(model: nn.Module, mesh: Any, compute: torch.dtype) -> None:
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
