"""Batched generation with the chat template: left padding, so that a batch answers as each prompt alone would."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fusechat.chats.padding import pad
from fusechat.chats.render import ChatRenderer, Message


@torch.inference_mode()
def generate(
    model: Any,
    renderer: ChatRenderer,
    prompts: Sequence[Sequence[Message]],
    *,
    max_new_tokens: int,
    batch_size: int,
    temperature: float = 0.0,
) -> list[str]:
    """An answer to every prompt (messages up to the user's last), greedy at temperature 0, in the order given."""
    model.eval()
    tokenizer = renderer.tokenizer
    texts = [renderer.prompt(messages) for messages in prompts]
    encoded = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    order = sorted(range(len(texts)), key=lambda i: len(encoded[i]))
    answers = [""] * len(texts)
    filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        ids, mask = pad([encoded[i] for i in part], filler, side="left")
        out = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=max_new_tokens,
            pad_token_id=filler,
            eos_token_id=tokenizer.eos_token_id,
            **sampling,
        )
        for row, i in enumerate(part):
            answers[i] = tokenizer.decode(out[row, ids.shape[1] :], skip_special_tokens=True).strip()
    return answers
