"""How a training is laid out over processes: who takes which part of a step, and how they hear of each other.

B chats make an optimizer step, ``data.global_batch``. W ranks take B / W each, in micro-batches of ``data.batch_size``.
What is trained does not depend on W: the sums of a step are divided by the response tokens of the whole step.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from fusechat.app.errors import UserError

T = TypeVar("T")
VARIABLES = ["MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE"]
VARIABLES += ["PL_GLOBAL_SEED", "PL_SEED_WORKERS"]  # by Lightning's seed_everything


@dataclass(frozen=True)
class Share:
    """batch_size: chats that a device takes at a time; accumulate: how many times it does in an optimizer step."""

    batch_size: int
    accumulate: int


def share(global_batch: int, batch_size: int | None, world: int) -> Share:
    """Each rank's part of a step. batch_size None: all of it at once; else at most so many chats at a time.

    Raises `UserError` where ranks or micro-batches would differ in size.
    """
    if global_batch % world:
        below, above = global_batch // world * world, -(-global_batch // world) * world
        near = " or ".join(str(n) for n in (below, above) if n)
        raise UserError(
            f"data.global_batch={global_batch} is no multiple of {world} ranks; set data.global_batch={near}"
        )
    chats = global_batch // world
    size = min(batch_size or chats, chats)
    if chats % size:
        fitting = ", ".join(str(n) for n in range(1, chats + 1) if chats % n == 0)
        raise UserError(f"data.batch_size={size} does not divide the {chats} chats of a rank; use one of: {fitting}")
    return Share(size, chats // size)


def starts_ranks(trainer: Any) -> bool:
    """Whether this process would have to start the others: torchrun, SLURM or a launcher of ours have not.

    Raises `UserError` for several nodes, on each of which something must start them.
    """
    if trainer.world_size == 1 or trainer.strategy.cluster_environment.creates_processes_externally:
        return False
    if trainer.num_nodes > 1:
        raise UserError(
            f"trainer.num_nodes={trainer.num_nodes} needs torchrun or SLURM on every node; see docs/ranks.md"
        )
    return True


@contextmanager
def group_of_one(world: int) -> Iterator[None]:
    """Strategies make a process group for a single rank too: it ends with the training, and so do its variables."""
    import torch.distributed as dist

    before, had = {name: os.environ.get(name) for name in VARIABLES}, dist.is_initialized()
    try:
        yield
    finally:
        if world == 1 and not had:
            if dist.is_initialized():
                dist.destroy_process_group()
            for name, value in before.items():
                os.environ.pop(name, None)
                os.environ |= {name: value} if value is not None else {}


def gathered(value: T) -> list[T]:
    """The value of every rank, on every rank."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def generators(device: Any) -> dict[str, Any]:
    """The state of this process's random generators."""
    import torch

    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_generators(states: Mapping[str, Any]) -> None:
    """The inverse of `generators`."""
    import torch

    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
