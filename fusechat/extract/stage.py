"""Extraction as one function: chats and a source -> a store of its next-token distributions."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets

from fusechat.app import outputs, settings
from fusechat.app.errors import UserError, one_of
from fusechat.app.places import writes
from fusechat.app.progress import Progress, progress, spell
from fusechat.app.surroundings import check_room
from fusechat.chats.formats import load_chats
from fusechat.chats.mixture import Given, mark_of, sizes_of
from fusechat.chats.render import ChatRenderer, renderer_for
from fusechat.extract.kinds import KINDS, OF_TOP, Keep, entries_of
from fusechat.extract.processes import Tell, share
from fusechat.extract.served import Served
from fusechat.extract.shards import Elsewhere, Loaded, Shards, Source, bad_of, check_bad
from fusechat.extract.summary import summary, warn_of_cut
from fusechat.models import load as models
from fusechat.models.devices import devices_of
from fusechat.stores.served.server import Server
from fusechat.stores.store import FORMAT
from fusechat.stores.writer import StoreWriter, finished, is_store

LOG = logging.getLogger(__name__)
ONE_PROCESS = {"accelerator": "auto", "devices": 1}


@writes("extract", reads=("model", "chats", "pivot"), known=is_store)
def extract(
    model: str,
    chats: Given | datasets.Dataset,
    output_dir: str | Path,
    *,
    name: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    dtype: str = "float32",
    attn_implementation: str | None = None,
    device_map: str | None = None,
    load_in: str | None = None,
    pivot: Any = None,
    template: str = "pivot",
    max_length: int = 2048,
    end_of_turn: bool = True,
    train_on: str = "all",
    kind: str = "top_k",
    top_k: int = 10,
    top_p: float = 0.99,
    draws: int = 50,
    logprobs: str = "float16",
    tokens_per_batch: int = 16384,
    rows_per_shard: int = 1000,
    max_bad_fraction: float = 0.01,
    seed: int = 0,
    trainer: Mapping[str, Any] | None = None,
    server: Server | None = None,
    told: Elsewhere | None = None,
    overwrite: bool = False,
    imports: Mapping[str, str] | None = None,
    record: Mapping[str, Any] | None = None,
    when_made: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Runs a source over chats and stores its distributions at every token of the assistant. Returns the manifest.

    model: directory or Hub id; name: what the store calls it. chats: as `load_chats` takes or returns them.
    pivot: its tokenizer, or its path, for template="pivot"; other templates, and train_on, as `renderer_for`.
    kind: one of `KINDS`, with top_k, top_p, draws as in `Keep`. logprobs: float16, or uint8 (steps of 0.05 nats).
    tokens_per_batch: padded tokens run together; a batch that does not fit in memory runs in halves, which the
    manifest notes. max_bad_fraction: chats with NaN or inf before the run stops. record: more to write into the
    manifest; decides nothing. when_made: called with the manifest where it is new. trainer: accelerator and devices as
    in `devices_of`, a process for each (one where a device_map spreads the model); more than one need a main module
    that can be imported, as multiprocessing's spawn does. server: where the model runs, if not here; of ``model`` only
    tokenizer and config are read then. told: what somebody else has predicted with the model, of which only the
    tokenizer is read then.

    A finished store of the same settings is left as it is, an unfinished one is gone on with; the number of devices
    decides nothing of its content. Raises `UserError` for unusable models, chats or settings, and for a store of other
    settings at ``output_dir`` unless ``overwrite``.
    """
    began = time.monotonic()
    more = {"draws": "by content"} if "generator" in KINDS[kind].needs else {}
    amount = {"kind": kind, "top_k": top_k, "top_p": top_p, "draws": draws}
    amount |= {"tokens_per_batch": tokens_per_batch, "rows_per_shard": rows_per_shard}
    settings.check("extract", **amount, max_bad_fraction=max_bad_fraction)
    settings.check("chat", template=template, max_length=max_length, end_of_turn=end_of_turn, train_on=train_on)
    settings.check("store", logprobs=logprobs)
    tokenizer = models.load_tokenizer(model, revision=revision, trust_remote_code=trust_remote_code)
    keep = _keep(len(tokenizer), top_k, top_p, draws)
    pivot = models.load_tokenizer(pivot) if template == "pivot" and isinstance(pivot, str) else pivot
    renderer = renderer_for(tokenizer, pivot, template, max_length, end_of_turn, train_on)
    rows, _ = load_chats(chats)
    parts = {"parts": sizes} if (sizes := sizes_of(rows)) else {}
    about = parts | _about(tokenizer, renderer, model=name or Path(model).name, path=str(model), chats=mark_of(rows))
    loading = {"dtype": dtype, "revision": revision, "trust_remote_code": trust_remote_code}
    loading |= {"attn_implementation": attn_implementation, "device_map": device_map, "load_in": load_in}
    devices: Sequence[Any] = [None]
    if server:
        one_of(kind, tuple(OF_TOP), "a server gives the likeliest tokens and nothing else: extract.kind")
        told = Served(server, model, {key: loading[key] for key in ("revision", "trust_remote_code")})
    source: Source = told or Loaded(model, loading, tokens_per_batch)
    if told:
        ran: dict[str, Any] = {**told.decides}
        del amount["tokens_per_batch"]
    else:
        ran = {"model": models.model_identity(model, revision), "dtype": dtype} | (
            {"load_in": load_in} if load_in else {}
        )
        devices = devices if device_map else devices_of(**{**ONE_PROCESS, **(trainer or {})}, key="extract.trainer")
    told_of = ("tokenizer", "chats", "template", "max_length", "end_of_turn", "train_on")
    deciding = {key: about[key] for key in told_of if key in about}
    deciding |= {"extract": amount, "store": {"logprobs": logprobs, "format": FORMAT}, **ran, **more}
    mark = outputs.stage_fingerprint(imports, **deciding)
    output = Path(output_dir)
    if held := finished(output, mark, overwrite=overwrite):
        return held
    check_room(output, rows.data.nbytes * entries_of(kind, keep), "the store")
    writer = StoreWriter(output, mark, -(-len(rows) // rows_per_shard), stage="extract", overwrite=overwrite)
    whole = {index: entry for index in range(writer.total) if (entry := writer.done(index))}
    shards = Shards(
        source,
        rows,
        renderer,
        writer,
        kind,
        keep,
        seed=seed,
        rows_per_shard=rows_per_shard,
        logprobs=logprobs,
        max_bad_fraction=max_bad_fraction,
        bad=bad_of(whole.values()),
        imports=list(imports or {}),
    )
    _fill(shards, whole, devices)
    manifest = writer.finish(
        **about,
        **(told.decides if told else {}),
        extract={**amount, "max_bad_fraction": max_bad_fraction},
        drawn="generator" in KINDS[kind].needs,
        logprobs=logprobs,
        **(record or {}),
    )
    LOG.info(f"{summary(manifest, output)}, in {spell(time.monotonic() - began)}")
    warn_of_cut(manifest)
    if when_made:
        when_made(manifest)
    return manifest


def _fill(shards: Shards, whole: Mapping[int, Any], devices: Sequence[Any]) -> None:
    """Makes the shards that are not whole yet. Raises `UserError` for too many bad chats, all processes' together."""
    writer, total = shards.writer, len(shards.chats)
    if whole:
        LOG.info("going on after %d whole shards of %d", len(whole), writer.total)
    left = [index for index in range(writer.total) if index not in whole]
    with progress("extract", total, "chats", sum(entry["rows"] for entry in whole.values())) as shown:
        share(shards, left, devices, _telling(shown))
    check_bad(bad_of(writer.recorded()), total, shards.max_bad_fraction)


def _telling(shown: Progress) -> Tell:
    """Shows chats, and tokens per second."""
    seen = 0

    def tell(chats: int, tokens: int) -> None:
        nonlocal seen
        seen += tokens
        shown(chats, lambda: f"{seen / max(1e-9, shown.seconds):,.0f} tokens/s")

    return tell


def _keep(vocab_size: int, top_k: int, top_p: float, draws: int) -> Keep:
    """`Keep`, after a look at the vocabulary."""
    if top_k > vocab_size:
        raise UserError(f"extract.top_k={top_k}: expected 1 to {vocab_size}, the model's vocabulary")
    return Keep(vocab_size, top_k, top_p, draws)


def _about(tokenizer: Any, renderer: ChatRenderer, **names: str) -> dict[str, Any]:
    """What later stages want to know of the tokens that a store holds."""
    return {
        **names,
        "kind": "distributions",
        "tokenizer": models.tokenizer_identity(tokenizer),
        "vocab_size": len(tokenizer),
        "offsets": tokenizer.is_fast,
        "template": renderer.template,
        "special_ids": sorted(i for i, token in tokenizer.added_tokens_decoder.items() if token.special),
        "max_length": renderer.max_length,
        "end_of_turn": renderer.end_of_turn,
        **({} if renderer.train_on == "all" else {"train_on": renderer.train_on}),
    }
