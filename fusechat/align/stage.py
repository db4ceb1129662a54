"""Alignment as one function: two stores of the same chats -> an aligned store."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fusechat.align import checks
from fusechat.align.alignment import Alignment, corpus_counts, write_aligned
from fusechat.align.maps import TOKEN_MAPS
from fusechat.align.paths import lexicon
from fusechat.align.sequence import SEQUENCES
from fusechat.align.summary import summary, warn_of_few
from fusechat.app import outputs
from fusechat.app.errors import UserError
from fusechat.app.places import writes
from fusechat.app.progress import spell
from fusechat.app.settings import check
from fusechat.chats.vocabulary import token_bytes
from fusechat.models.load import load_tokenizer
from fusechat.stores.encoding import encode_mask
from fusechat.stores.kinds import KINDS, SAME
from fusechat.stores.store import DistributionStore
from fusechat.stores.writer import StoreWriter, finished, is_store

LOG = logging.getLogger(__name__)
BY_TEXT = ("em", "prefix")  # maps that look for a token of the same text
WITHOUT_OFFSETS = "dtw"  # aligns what a slow tokenizer has rendered
EXTRACT = "python -m fusechat.extract source="


@writes("align", reads=("pivot", "source"), known=is_store)
def align(
    pivot: str | Path,
    source: str | Path,
    output_dir: str | Path,
    *,
    pivot_tokenizer: Any = None,
    source_tokenizer: Any = None,
    token_map: str = "prefix",
    sequence: str = "offsets",
    unmatched: str = "skip",
    logprobs: str = "float16",
    num_proc: int = 1,
    overwrite: bool = False,
    imports: Mapping[str, str] | None = None,
    remedies: tuple[str, str] = (EXTRACT + "pivot", EXTRACT + "NAME"),
    when_made: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Brings a source's distributions onto the pivot's tokens. Returns the aligned store's manifest.

    - pivot, source: stores that extract has made of the same chats.
    - pivot_tokenizer, source_tokenizer: a tokenizer, a path, or a function that loads one, called only if it is needed;
      by default the path that the store names.
    - token_map: one of `TOKEN_MAPS`; sequence: one of `SEQUENCES`; imports: modules that brought members of your own,
      with their hashes.
    - unmatched: what pivot positions without a partner hold, ``gold`` (all mass on the next token, as published) or
      ``skip`` (nothing: no fusion loss there).
    - logprobs: float16, or uint8 in steps of 0.05 nats. num_proc: processes; the result does not depend on it.
    - remedies: the commands that make the two stores, for messages. when_made: called with a manifest that is new.

    A source that shares the pivot's tokens is passed through by hard links. A finished store of the same settings is
    left as it is, an unfinished one is gone on with. Raises `UserError` for unknown names, for stores that are missing
    or do not belong together, and for a store of other settings at ``output_dir`` unless ``overwrite``.
    """
    _ = TOKEN_MAPS[token_map], SEQUENCES[sequence]  # an unknown name is told before anything is opened
    check("alignment", unmatched=unmatched, num_proc=num_proc)
    began = time.monotonic()
    check("store", logprobs=logprobs)
    stores = DistributionStore(pivot, remedies[0]), DistributionStore(source, remedies[1])
    checks.check_chats(*stores)
    marks = {"pivot": stores[0].fingerprint, "source": stores[1].fingerprint}
    settings: dict[str, Any] = {
        "token_map": token_map,
        "sequence": sequence,
        "unmatched": unmatched,
        "logprobs": logprobs,
    }
    more = {"characters": "as written"} if token_map in BY_TEXT else {}  # not as the bytes' tokens, as it once was
    mark = outputs.stage_fingerprint(imports, **marks, **settings, **more)
    output = Path(output_dir)
    if held := finished(output, mark, overwrite=overwrite):
        return held
    writer = StoreWriter(output, mark, len(stores[1].manifest["shards"]), stage="align", overwrite=overwrite)
    if checks.same_tokens(*stores):
        LOG.info("%s shares the pivot's tokens: passed through", stores[1].manifest["model"])
        link_shards(stores[1], writer)
        made = {"token_map": "same", "sequence": "same"}
    else:
        tokenizers = _tokenizer(pivot_tokenizer, stores[0]), _tokenizer(source_tokenizer, stores[1])
        checks.check_texts(*stores, tokenizers)
        modules = [*(imports or ())]
        alignment = make_alignment(*stores, tokenizers, **settings, num_proc=num_proc, modules=modules)
        write_aligned(alignment, writer, num_proc, modules)
        made = {"token_map": token_map, "sequence": alignment.sequence}
        made |= {} if alignment.common is None else {"common": encode_mask(alignment.common)}
    about = {name: stores[0].manifest[name] for name in ("vocab_size", "chats")}
    about |= {name: stores[1].manifest[name] for name in ("model", "path") if name in stores[1].manifest}
    about |= {"kind": "aligned", "logprobs": logprobs}
    manifest = writer.finish(**about, **marks, **made)
    LOG.info(f"{summary(manifest, output)}, in {spell(time.monotonic() - began)}")
    warn_of_few(manifest)
    if when_made:
        when_made(manifest)
    return manifest


def make_alignment(
    pivot: DistributionStore,
    source: DistributionStore,
    tokenizers: tuple[Any, Any],
    *,
    token_map: str,
    sequence: str,
    unmatched: str,
    logprobs: str,
    num_proc: int = 1,
    modules: list[str] | None = None,
) -> Alignment:
    """The alignment that `align`'s settings describe, its map made. tokenizers: the pivot's and the source's."""
    chosen, offsets = TOKEN_MAPS[token_map], all(s.manifest.get("offsets", True) for s in (pivot, source))
    if "fast" in chosen.needs and not tokenizers[0].is_fast:
        others = ", ".join(sorted(name for name, member in TOKEN_MAPS.items() if "fast" not in member.needs))
        raise UserError(
            f"token_map={token_map} asks the pivot's tokenizer for offsets and it is a slow one; use one of: {others}"
        )
    sequence = sequence_for(sequence, offsets)
    chained = "chain" in chosen.needs and offsets
    alignment = Alignment(pivot, source, sequence, unmatched, chained, logprobs, drawn=source.manifest["drawn"])
    if "texts" in SEQUENCES[sequence].needs:
        alignment.texts = token_texts(tokenizers[0]), token_texts(tokenizers[1])
    if "path" in SEQUENCES[sequence].needs:
        alignment.words = lexicon(tokenizers[1], tokenizers[0])
    roles = checks.role_pairs(pivot, source, tokenizers)
    seen = [corpus_counts(alignment, num_proc, modules or [])] if "counts" in chosen.needs else []
    alignment.table = chosen.function(tokenizers[1], tokenizers[0], roles, *seen)
    if alignment.table is not None:
        check_table(alignment.table, token_map, len(tokenizers[1]), alignment.vocab_size)
    if "rest" in chosen.needs:
        keep_rest(alignment)
    return alignment


def keep_rest(alignment: Alignment) -> None:
    """Tells the pivot's tokens that the source has; the source's others get an id beyond the pivot's each."""
    assert alignment.table is not None
    table, size = alignment.table, alignment.vocab_size
    alignment.common = np.zeros(size, bool)
    alignment.common[table[table >= 0]] = True
    alignment.table = np.where(table >= 0, table, size + np.arange(len(table)))


def sequence_for(name: str, offsets: bool) -> str:
    """The sequence alignment asked for, or, where a tokenizer reports no offsets, one that needs none."""
    if "boundaries" not in SEQUENCES[name].needs or offsets:
        return name
    LOG.warning("a slow tokenizer reports no offsets: aligned by alignment.sequence=%s instead", WITHOUT_OFFSETS)
    return WITHOUT_OFFSETS


def check_table(table: Any, name: str, source_size: int, pivot_size: int) -> None:
    """Raises `UserError` where a token map is no integer array [source_size] of pivot ids and -1."""
    found = np.asarray(table)
    if found.shape != (source_size,) or found.dtype != np.int64 or found.min() < -1 or found.max() >= pivot_size:
        raise UserError(
            f"token_map={name} gives {found.dtype} {list(found.shape)}; expected int64 [{source_size}]: "
            f"for every source token one of the pivot's ids, at most {pivot_size - 1}, or -1"
        )


def token_texts(tokenizer: Any) -> list[str]:
    """Every token's bytes as characters: no replacement character can derail a distance. Empty for special tokens."""
    return [(text or b"").decode("latin-1") for text in token_bytes(tokenizer)]


def link_shards(source: DistributionStore, writer: StoreWriter) -> None:
    """Passes a store through: hard links to the source's shards, no second copy (a copy where links are impossible)."""
    writer.begin()
    for index, entry in enumerate(source.manifest["shards"]):
        if writer.done(index) is not None:
            continue
        file = writer.path / entry["file"]
        file.unlink(missing_ok=True)
        try:
            os.link(source.path / entry["file"], file)
        except OSError:
            shutil.copyfile(source.path / entry["file"], file)
        positions, nats = entry["statistics"]["positions"], entry["statistics"]["nats"]
        statistics = {**dict.fromkeys(KINDS, 0), KINDS[SAME]: positions, "matched_nats": nats}
        statistics |= {"positions_with_mass": positions, "mass": float("nan")}
        writer.record(index, {**entry, "statistics": statistics})


def _tokenizer(given: Any, store: DistributionStore) -> Any:
    """A tokenizer from what `align` was given for it."""
    if given is None or isinstance(given, (str, Path)):
        return load_tokenizer(str(given or store.manifest["path"]))
    return given if hasattr(given, "convert_ids_to_tokens") else given()
