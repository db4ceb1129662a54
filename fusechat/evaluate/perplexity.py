"""Cross entropy of the assistant's text: total nats per chat, from which bits per byte and nats per token follow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fusechat.chats.padding import pad
from fusechat.chats.render import ChatRenderer, Message
from fusechat.models.heads import OutputHead


@torch.inference_mode()
def score(
    model: Any, renderer: ChatRenderer, chats: Sequence[Sequence[Message]], batch_size: int
) -> list[dict[str, float]]:
    """nats, bytes and tokens of every chat's response, in the order given."""
    model.eval()
    head, rendered = OutputHead(model), renderer(chats)
    order = sorted(range(len(chats)), key=lambda i: len(rendered[i].input_ids))
    found: list[dict[str, float]] = [{}] * len(chats)
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        ids, mask = pad([rendered[i].input_ids for i in part])
        hidden = head.hidden(ids.to(model.device), mask.to(model.device))
        for row, i in enumerate(part):
            positions = torch.from_numpy(rendered[i].positions)
            logits = head.logits(hidden[row, positions]).float()
            gold = ids[row, positions + 1].to(logits.device)
            nats = torch.nn.functional.cross_entropy(logits, gold, reduction="sum") if len(gold) else torch.zeros(())
            found[i] = {"nats": float(nats), "bytes": float(rendered[i].n_bytes), "tokens": float(len(gold))}
    return found
