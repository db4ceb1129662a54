"""What is to be known of models and chats before an experiment is written; nothing is downloaded but small files."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fusechat.app.errors import UserError
from fusechat.chats.overlap import questions
from fusechat.chats.padding import pad
from fusechat.chats.render import ChatRenderer, Rendered
from fusechat.models.licences import licence_of
from fusechat.models.load import check_vocabulary, empty_model, load_model

SAMPLE = 500  # chats that are rendered to know their lengths
TESTS = 20, 500  # chats that are set aside, at least and at most; a tenth between
TIMED = 0.5  # seconds of forward passes, at least


@dataclass(frozen=True)
class Model:
    """total, active: parameters in all, and those that a token meets; width: of the hidden states."""

    name: str
    path: str
    kind: str
    total: int
    active: int
    width: int
    layers: int
    vocabulary: int
    context: int | None
    template: bool
    licence: str | None


@dataclass(frozen=True)
class Lengths:
    """Of a sample of chats as a model reads them. tokens, positions: means; longest; cut: share of the chats."""

    tokens: float
    positions: float
    longest: int
    cut: float


def facts_of(name: str, path: str, tokenizer: Any) -> Model:
    """A model's shape, from its config alone. Raises `UserError` where the tokenizer has more tokens than it."""
    model = empty_model(path)
    check_vocabulary(model, tokenizer, path)
    config = model.config.get_text_config()
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    total = sum(sizes.values())
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    many = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 1
    idle = experts * (1 - getattr(config, "num_experts_per_tok", many) / many) if experts else 0
    return Model(
        name,
        path,
        type(model).__name__,
        total,
        int(total - idle),
        config.hidden_size,
        config.num_hidden_layers,
        len(tokenizer),
        getattr(config, "max_position_embeddings", None),
        bool(tokenizer.chat_template),
        licence_of(path),
    )


def lengths_of(rendered: Sequence[Rendered]) -> Lengths:
    """Means and extremes of rendered chats."""
    tokens = [len(chat.input_ids) for chat in rendered]
    positions = sum(len(chat.positions) for chat in rendered)
    cut = sum(chat.truncated for chat in rendered)
    return Lengths(sum(tokens) / len(tokens), positions / len(tokens), max(tokens), cut / len(tokens))


def split(rows: Sequence[Mapping[str, Any]], where: str) -> tuple[list[Any], list[Any]]:
    """Chats to fuse with, and a tenth of them to test with: all that ask the same first question are on one side.

    Which they are is decided by the questions' hashes, not by their places. Raises `UserError` where they are few.
    """
    by_question: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        first = next(questions(row["messages"]), ())
        by_question.setdefault(hashlib.sha256(repr(first).encode()).hexdigest(), []).append(row)
    least, most = TESTS
    wanted, tests = min(most, max(least, len(rows) // 10)), list[Any]()
    if len(by_question) < 2 * least:
        raise UserError(
            f"{where} has {len(by_question)} chats that differ in their question, too few to set some aside; "
            "give the chats to test with: tests=FILE"
        )
    order = sorted(by_question)
    while len(tests) < wanted and len(order) > 1:
        tests += by_question[order.pop(0)]
    return [row for question in order for row in by_question[question]], tests


def speed_of(model: Model, renderer: ChatRenderer, chats: Sequence[Any]) -> float:
    """FLOP/s of a model's forward pass over some chats on the best device: 2 · active parameters · tokens a second."""
    import torch

    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    loaded = load_model(model.path, device=device)
    rendered = renderer([row["messages"] for row in chats[:16]])
    ids, mask = (part.to(device) for part in pad([chat.input_ids for chat in rendered]))
    tokens = sum(len(chat.input_ids) for chat in rendered)
    with torch.inference_mode():
        loaded(ids, attention_mask=mask).logits[..., :1].float().cpu()  # the first pass is slower
        began, passes = time.perf_counter(), 0
        while (spent := time.perf_counter() - began) < TIMED:
            loaded(ids, attention_mask=mask).logits[..., :1].float().cpu()
            passes += 1
    return 2 * model.active * tokens * passes / spent
