"""Whether a model reads chats that share a row as if each were alone; asked of the model itself, not of its name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusechat.app.errors import UserError
from fusechat.chats.padding import Layout, padded, reading
from fusechat.models.heads import Within, close

LENGTHS = [12, 7, 5]  # tokens of the chats that are tried: the last two share a row in every layout
APART = 1e-5  # how far another chat may move logits, relative to them: experts that serve both round differently
OTHERWISE = "set data.packing=false, which changes no result, or another pivot.attn_implementation"


@torch.no_grad()
def check_apart(model: Any, lay: Layout, device: torch.device, within: Within) -> None:
    """Raises `UserError` unless chats in the rows of ``lay`` get the logits that they get in rows of their own, and
    those of a chat stay as they are where the others change.

    Attention that heeds position ids keeps them apart; state-space, linear and convolutional layers, models that do not
    hand position ids on, and kernels that transformers makes no mask for do not. within: see `OutputHead.verify`.
    """
    name, vocabulary = type(model).__name__, model.config.get_text_config().vocab_size
    places = torch.split(torch.arange(sum(LENGTHS)), LENGTHS)
    chats = [(each + 3) % vocabulary for each in places]
    others = [*((each + 4) % vocabulary for each in places[:-1]), chats[-1]]
    training = model.training
    model.eval()
    try:
        alone = _logits(model, padded, chats, device, within)
        try:
            together, changed = (_logits(model, lay, each, device, within) for each in (chats, others))
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{name} takes no position ids, by which data.packing keeps chats apart; {OTHERWISE}"
            ) from error
    finally:
        model.train(training)
    last, scale = slice(-LENGTHS[-1], None), alone.abs().max()
    if not close(together, alone) or not close(changed[last] / scale, together[last] / scale, APART):
        raise UserError(f"{name} lets chats of one row see each other, or not their own places; {OTHERWISE}")


def _logits(model: Any, lay: Layout, chats: Sequence[Tensor], device: torch.device, within: Within) -> Tensor:
    """Logits of all tokens, chat by chat."""
    laid = lay(chats, 0)
    given = reading(laid.ids, laid.mask, laid.positions)
    read = {name: tensor.to(device) for name, tensor in given.items()}
    logits: Tensor = within(lambda: model.forward(**read, use_cache=False).logits)
    at = torch.cat([start + torch.arange(len(chat)) for start, chat in zip(laid.starts, chats, strict=True)])
    return logits.flatten(0, 1)[at.to(device)]
