"""What a training's inputs must be: of one tokenizer, a checkpoint where one is named; and room for what comes."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fusechat.app.errors import UserError
from fusechat.app.marks import differing
from fusechat.app.session import MISSING
from fusechat.app.surroundings import check_room
from fusechat.chats.mixture import mark_of
from fusechat.fusion.losses import FusionLoss
from fusechat.fusion.rules import FusionRule
from fusechat.models.checkpoints import LazyCheckpoint
from fusechat.models.load import tokenizer_identity
from fusechat.stores.store import DistributionStore, read_manifest

LOOK = ("max_length", "end_of_turn", "train_on")  # keys of chat that a store is made by, whichever chats it holds
CHOICE = ("path", "name", "split", "format", "limit", "streaming", "seed")  # keys that choose the chats
BYTES = 4  # of a weight in the export, and of each of a checkpoint's three numbers for it (AdamW)


def check_tokens(stores: Sequence[DistributionStore], tokenizer: Any, pivot: str, remedy: str) -> None:
    """Raises `UserError` where the pivot's distributions were extracted with another tokenizer than the pivot has now.

    stores: the pivot's first. remedy: the command that extracts them.
    """
    manifest, now = stores[0].manifest, tokenizer_identity(tokenizer)
    if manifest["tokenizer"] != now:
        before = f"{manifest['path']} ({manifest['tokenizer']})"
        raise UserError(
            f"pivot.path={pivot} has another vocabulary or chat template ({now}) than {stores[0].path} was made with: "
            f"{before}; set pivot.path, or run: {remedy} overwrite=true"
        )


def check_chats(store: Path, chat: Mapping[str, Any], remedy: str) -> None:
    """Raises `UserError` where chat.* asks for other chats than the pivot's store holds, or for another look at them.

    chat: the section of the config; remedy: the command that makes the store. Chats that lie elsewhere or are asked for
    in other words may be the same: they are read then. Says nothing of a store that is not there, nor where chat.path
    is not given.
    """
    manifest = read_manifest(store)
    if manifest is None or chat["path"] == MISSING:
        return
    held = {"train_on": "all", **{key: manifest[key] for key in LOOK if key in manifest}, **manifest.get("chat", {})}
    changed = [key for key in held if key in chat and chat[key] != held[key]]
    if any(key in CHOICE for key in changed) and _are_those(chat, manifest["chats"]):
        changed = [key for key in changed if key not in CHOICE]
    if changed:
        there, now = ({f"chat.{key}": values[key] for key in changed} for values in (held, chat))
        raise UserError(
            f"{store} holds other chats than these settings ask for ({differing(there, now)}), and they are what is "
            f"trained on; set these keys as they were, or run: {remedy} overwrite=true"
        )


def _are_those(chat: Mapping[str, Any], mark: str) -> bool:
    from fusechat.chats.formats import load_chats

    try:
        rows, _ = load_chats(chat["path"], **{key: chat[key] for key in CHOICE if key != "path"})
    except UserError:
        return False
    return mark_of(rows) == mark


def check_maps(stores: Sequence[DistributionStore], loss: FusionLoss) -> None:
    """Raises `UserError` where a store holds probabilities by rank and the loss compares ids, or the other way."""
    for store in stores[1:] if not (loss.ranked or loss.on_chunks) else ():
        made = store.manifest.get("token_map")
        if made == "uld" or ("common" in store.manifest and not loss.split):
            raise UserError(
                f"{store.path} was aligned with token_map={made}: its probabilities have ranks and no tokens, and "
                f"loss.kind={loss.kind} compares tokens; use loss={made}, or align with another token_map"
            )
        if loss.split and "common" not in store.manifest and made != "same":
            raise UserError(
                f"{store.path} was aligned with token_map={made}, which does not tell the tokens of both vocabularies "
                f"apart from others, as loss.kind={loss.kind} does; align with token_map=hybrid"
            )


def check_rule(rule: FusionRule, loss: FusionLoss) -> None:
    """Raises `UserError` where a rule mixes models that a loss must tell apart: they cut text, or know tokens, in their
    own ways.
    """
    if loss.on_chunks and rule.needs_sources and not (rule.takes_one and rule.level == "sequence"):
        raise UserError(
            f"loss.kind={loss.kind} compares chunks of text, which each model cuts in its own way: one model is to "
            "speak for a sequence; set fusion=min_ce fusion.level=sequence"
        )
    if loss.split and rule.needs_sources and not (rule.takes_one and rule.empty == "skip"):
        raise UserError(
            f"loss.kind={loss.kind} compares by id the tokens that a model shares with the pivot: one model is to "
            "speak at a position; set fusion=min_ce fusion.empty=skip"
        )


def check_checkpoint(path: str) -> None:
    """Raises `UserError` where ``ckpt_path`` names no checkpoint; a folder may be a sharded one."""
    place = Path(path)
    if not place.exists() or (place.is_file() and not zipfile.is_zipfile(place)):
        what = "is no checkpoint" if place.exists() else "does not exist"
        raise UserError(f"ckpt_path={path} {what}; give a .ckpt of this training, or ckpt_path=last or null")


def check_sharded(checkpoint: str | None, strategy: str) -> None:
    """Raises `UserError` where a checkpoint in shards (a folder) meets a trainer of whole files, or the other way."""
    if checkpoint is None or Path(checkpoint).is_dir() == (strategy == "fsdp"):
        return
    made, other = "in shards, as trainer=fsdp writes it", "trainer=fsdp"
    if strategy == "fsdp":
        made, other = "one file, as every trainer but fsdp writes it", "trainer=cpu or trainer=ddp"
    raise UserError(
        f"{checkpoint} is {made}, and trainer.strategy={strategy} cannot read it; go on with {other} "
        "(trainer.devices=1 will do), or begin anew with ckpt_path=null"
    )


def check_target_room(output: Path, pivot: Path, lora: Mapping[str, Any]) -> None:
    """`check_room` for a target of a local pivot and, unless adapters are trained, two checkpoints on the way."""
    if not pivot.is_dir():
        return
    weights = sum(info.bytes // info.dtype.itemsize for info in LazyCheckpoint(pivot).infos.values())
    check_room(output, weights * BYTES * (1 if lora["enabled"] else 1 + 2 * 3), "training")
