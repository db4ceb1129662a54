"""Batched generation with the chat template: left padding, so that a batch answers as each prompt alone would."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fusechat.chats.padding import pad
from fusechat.chats.render import ChatRenderer
from fusechat.chats.roles import Message
from fusechat.models.devices import fed_at

TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@torch.inference_mode()
def generate(
    model: Any,
    renderer: ChatRenderer,
    prompts: Sequence[Sequence[Message]],
    *,
    max_new_tokens: int,
    batch_size: int,
    temperature: float = 0.0,
    tell: Callable[[int], None] | None = None,
) -> list[str]:
    """An answer to every prompt (messages up to the user's last), greedy at temperature 0, in the order given.

    Prompts of about one length run together. An answer ends with any of the model's `stop_tokens`. tell: called with
    the number of answers after every batch.
    """
    model.eval()
    tokenizer, device = renderer.tokenizer, fed_at(model)
    stops = stop_tokens(renderer, model.generation_config)
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
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max_new_tokens,
            pad_token_id=filler,
            eos_token_id=stops,
            **sampling,
        ).cpu()
        for row, i in enumerate(part):
            answers[i] = tokenizer.decode(out[row, ids.shape[1] :], skip_special_tokens=True).strip()
        if tell is not None:
            tell(len(part))
    return answers


def stop_tokens(renderer: ChatRenderer, config: Any) -> list[int]:
    """Ids that end an answer, in order: those of the model's generation config, its tokenizer's end of sequence, and
    the special token with which the chat template closes the assistant's turn.

    Llama 3, Qwen and Gemma close a turn with another token than the tokenizer's own.
    """
    tokenizer, own = renderer.tokenizer, getattr(config, "eos_token_id", None)
    found = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id}
    rendered = renderer([TURNS])[0]
    last = int(rendered.input_ids[rendered.assistant_mask][-1])
    token = tokenizer.added_tokens_decoder.get(last)
    return sorted({*found, last if token is not None and token.special else None} - {None})
