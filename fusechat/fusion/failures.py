"""What a training that ran out of memory, or of patience with another rank, says: where it was, and what would help."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

from fusechat.app.errors import UserError
from fusechat.app.quantities import size

LOG = logging.getLogger(__name__)
LOST = ("Timed out", "timed out", "Connection closed by peer", "Connection reset by peer", "timeout")
ALLOCATOR = "DefaultCPUAllocator: can't allocate memory"
ACTIVATION = 34  # bytes a layer, token and hidden unit keeps in bf16 for its backward pass (arXiv 2205.05198, eq. 2)
PATIENCE = 10  # steps in a row that may be skipped
STAGES = {"train": "training", "validate": "validating", "sanity_check": "validating"}


class Explained(Callback):
    """Turns running out of memory, and waiting in vain for another rank, into a `UserError` of one line."""

    def __init__(self) -> None:
        self.place = "while saving"

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Notes where it was: Lightning forgets."""
        doing = STAGES.get(str(getattr(trainer.state.stage, "value", "")), "starting")
        self.place = f"while {doing}, step {trainer.global_step}"

    @contextmanager
    def around(self, trainer: Any, module: Any) -> Iterator[None]:
        """What a training does inside."""
        try:
            yield
        except RuntimeError as error:  # of which torch.OutOfMemoryError is one
            if isinstance(error, torch.OutOfMemoryError) or ALLOCATOR in str(error):
                raise UserError(out_of_memory(trainer, module, self.place)) from error
            if trainer.world_size > 1 and any(sign in str(error) for sign in LOST):
                raise UserError(
                    f"rank {trainer.global_rank} of {trainer.world_size} waited in vain for the others {self.place}; "
                    "the one that stopped says why in its own lines (a rank waits trainer.timeout minutes)"
                ) from error
            raise


def out_of_memory(trainer: Any, module: Any, place: str) -> str:
    """What filled the memory, and what each remedy would free of it, by the model's shape."""
    data, shape = trainer.datamodule, module.model.config.get_text_config() if module.model is not None else None
    chats, longest = data.train_plan().micro_batch // trainer.world_size, int(data.lengths.max())
    told = f"out of memory {place}, with {chats} chats of at most {longest} tokens at a time on a device"
    told += (
        f", gradient_checkpointing={str(module.gradient_checkpointing).lower()}, lora={str(bool(module.lora)).lower()}"
    )
    if shape is None:
        return f"{told}; take a smaller pivot, or trainer=fsdp over more devices"
    activations = ACTIVATION * shape.num_hidden_layers * shape.hidden_size * chats * longest
    helps = []
    if not module.gradient_checkpointing:
        helps.append(f"gradient_checkpointing=true frees about {size(activations)} of activations")
    elif chats > 1:
        activations = 2 * activations // ACTIVATION
    if chats > 1:
        helps.append(f"data.batch_size={_half(chats)} about {size(activations // 2)}")
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    if not module.lora:
        shards = trainer.world_size if module._device_mesh is not None else 1
        helps.append(f"lora.enabled=true about {size(12 * trained // shards)} of gradients and optimizer state")
    helps.append("trainer=fsdp shares weights, gradients and optimizer state among more devices")
    return f"{told}; " + ", ".join(helps)


def skip_step(module: Any, loss: Any, before: int) -> int:
    """Drops the gradients of a step whose loss is NaN or inf: the optimizer passes it over. Returns how many in a row.

    before: of these. The loss is the same on every rank. Raises `UserError` where there are too many.
    """
    for parameter in module.parameters():
        parameter.grad = None
    step = module.trainer.global_step + 1
    if before + 1 >= PATIENCE:
        raise UserError(
            f"the loss is {float(loss)} in {PATIENCE} steps in a row, at step {step}: lower optimizer.lr, or look for "
            "NaN in the pivot's weights; the last checkpoint may be whole"
        )
    LOG.warning("step %d is skipped: its loss is %s", step, float(loss))
    return before + 1


def _half(chats: int) -> int:
    """The largest divisor of ``chats`` below it."""
    return next(n for n in range(chats // 2, 0, -1) if chats % n == 0)
