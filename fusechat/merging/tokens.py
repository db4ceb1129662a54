"""Embedding rows matched by token: targets with added tokens or padded vocabularies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fusechat.app.errors import UserError
from fusechat.app.texts import json_object
from fusechat.models.checkpoints import LazyCheckpoint
from fusechat.models.computed import Computed


def vocabulary(path: Path) -> dict[str, int] | None:
    """token -> id from tokenizer.json, added tokens included; None without one."""
    file = path / "tokenizer.json"
    if not file.exists():
        return None
    content = json_object(file)
    try:
        vocab = content["model"]["vocab"]
        found = {entry[0]: i for i, entry in enumerate(vocab)} if isinstance(vocab, list) else dict(vocab)
        return found | {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"{file} is no tokenizer ({type(error).__name__}: {error}); copy or download it again"
        ) from error


def match_rows(pivot: LazyCheckpoint, target: LazyCheckpoint) -> dict[str, Computed]:
    """Vocabulary-sized tensors of the target with their rows in the pivot's order; rows it lacks are the pivot's.

    Empty where both have the same tokens at the same ids and the same shapes. Raises `UserError` where shapes differ
    and no tokenizer tells which row is which.
    """
    own, theirs = vocabulary(pivot.path), vocabulary(target.path)
    names = [
        n for n in pivot if n in target and len(pivot.infos[n].shape) == 2 and _is_vocabulary(pivot, target, n, own)
    ]
    same = own == theirs or own is None or theirs is None
    moved: dict[str, Computed] = {}
    for name in names:
        shape, other = pivot.infos[name].shape, target.infos[name].shape
        if shape == other and same:
            continue
        if own is None or theirs is None or shape[1] != other[1]:
            raise UserError(
                f"{name}: shape {other} in {target.path}, {shape} in the pivot {pivot.path}, "
                "and no tokenizers to match rows by"
            )
        shared = [(i, theirs[token]) for token, i in own.items() if token in theirs]
        pairs = [(mine, other_row) for mine, other_row in shared if mine < shape[0] and other_row < other[0]]
        moved[name] = _gathered(pivot, target, name, pairs)
    return moved


def _gathered(pivot: LazyCheckpoint, target: LazyCheckpoint, name: str, pairs: Sequence[tuple[int, int]]) -> Computed:
    """The target's rows in the pivot's order. pairs: (the pivot's row, the target's); other rows are the pivot's."""
    shape = torch.Size(pivot.infos[name].shape)
    theirs = torch.full((shape[0],), -1)
    if pairs:
        to, source = torch.tensor(pairs).unbind(1)
        theirs[to] = source

    def rows(first: int, last: int) -> Tensor:
        found = pivot.tensor(name)[first:last].to(torch.float32, copy=True)  # never into the pivot's own pages
        chosen = theirs[first:last]
        has = chosen >= 0
        found[has] = target.tensor(name)[chosen[has]].float()
        return found

    return Computed(shape, rows)


def _is_vocabulary(pivot: LazyCheckpoint, target: LazyCheckpoint, name: str, own: dict[str, int] | None) -> bool:
    """Whether a matrix has a row for each token: outside the blocks, at least half as many rows as the pivot has."""
    outside = not any(part.isdigit() for part in name.split("."))
    rows = min(pivot.infos[name].shape[0], target.infos[name].shape[0])
    return outside and (own is None or rows >= 0.5 * len(own)) and ("embed" in name or "head" in name or "wte" in name)
