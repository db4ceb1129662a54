"""Adapters of several clients made one: any merge method, applied to the low-rank factors themselves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from fusechat.app.outputs import write_durably
from fusechat.merging import METHODS, merge
from fusechat.mutual.messages import Message
from fusechat.mutual.sides import Terms


def averaged(before: Message, adapters: Mapping[str, Message], folder: Path, terms: Terms) -> Mapping[str, Tensor]:
    """One adapter of several, factor by factor, by a method that merges models: its pivot is what was sent ``before``.

    folder: of what is written for it. linear: their mean, weighted by private chats. Where one
    alone has come it is the average, where none has, what was sent before.
    """
    found = [message.adapter for message in (adapters.values() if adapters else [before]) if message.adapter]
    if len(found) == 1:
        return found[0]
    place, output = folder / "factors", folder / "average"
    for name, message in {"before": before, **adapters}.items():
        (place / name).mkdir(parents=True, exist_ok=True)
        save_file(dict(message.adapter or {}), place / name / "model.safetensors", {"format": "pt"})
        write_durably(place / name / "config.json", b"{}\n")
    needs = METHODS[terms.average].needs
    weights = [message.envelope.trained_on for message in adapters.values()] if "weights" in needs else None
    merge(
        terms.average,
        place / "before",
        [place / name for name in adapters],
        output,
        settings=terms.average_settings,
        weights=weights,
        seed=terms.seed,
        overwrite=True,
    )
    return load_file(output / "model.safetensors")


def shapes(message: Message) -> dict[str, tuple[int, ...]]:
    """The factors of a message's adapter: name -> shape."""
    return {name: tuple(tensor.shape) for name, tensor in (message.adapter or {}).items()}
