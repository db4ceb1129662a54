"""Cross entropy of the assistant's text: total nats per chat, from which bits per byte and nats per token follow.

Beside it how many of its tokens are the model's likeliest ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusechat.chats.padding import pad
from fusechat.chats.render import ChatRenderer
from fusechat.chats.roles import Message
from fusechat.models.devices import fed_at
from fusechat.models.heads import OutputHead


@torch.inference_mode()
def score(
    model: Any, renderer: ChatRenderer, chats: Sequence[Sequence[Message]], batch_size: int
) -> list[dict[str, float]]:
    """nats, bytes, tokens and hits of every chat's response, in the order given."""
    model.eval()
    head, rendered, device = OutputHead(model), renderer(chats), fed_at(model)
    order = sorted(range(len(chats)), key=lambda i: len(rendered[i].input_ids))
    found: list[dict[str, float]] = [{}] * len(chats)
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        ids, mask = pad([rendered[i].input_ids for i in part])
        hidden = head.hidden(ids.to(device), mask.to(device))
        positions = [torch.from_numpy(rendered[i].positions) for i in part]
        golds = [ids[row, at + 1] for row, at in enumerate(positions)]
        states = [hidden[row, at.to(hidden.device)] for row, at in enumerate(positions)]
        measured = torch.stack(
            [_measured(head, *pair) for pair in zip(states, golds, strict=True)]
        ).tolist()  # waits once
        for i, (nats, hits), gold in zip(part, measured, golds, strict=True):
            about = {"bytes": float(rendered[i].n_bytes), "tokens": float(len(gold))}
            found[i] = {"nats": nats, **about, "hits": hits}
    return found


def _measured(head: OutputHead, states: Tensor, gold: Tensor) -> Tensor:
    """Cross entropy of one response in nats, and tokens of it that are likeliest. states [R, D], gold [R] -> [2].

    R may be 0. Both are counted in fp32, exact up to 2^24 tokens.
    """
    logits = head.logits(states).float()
    gold = gold.to(logits.device)
    nats = torch.nn.functional.cross_entropy(logits, gold, reduction="sum")
    return torch.stack([nats, (logits.argmax(-1) == gold).sum().to(nats)])
