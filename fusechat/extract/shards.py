"""The work of one process: shards of a store, from chats to Arrow files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import datasets
import torch

from fusechat.app.errors import UserError
from fusechat.app.registry import import_modules
from fusechat.chats.render import ChatRenderer
from fusechat.extract import writer as columns
from fusechat.extract.batches import Predictor
from fusechat.extract.extractor import Extractor
from fusechat.extract.kinds import Keep
from fusechat.extract.processes import Tell
from fusechat.models import load as models
from fusechat.stores.writer import StoreWriter


class Source(Protocol):
    """A model, wherever it runs."""

    def opened(self, device: torch.device | None, shards: Shards) -> AbstractContextManager[Predictor]:
        """The model, ready to predict for the time of a block. device: None where the source itself decides."""


class Elsewhere(Source, Protocol):
    """A model that does not run here."""

    @property
    def decides(self) -> Mapping[str, str]:
        """What of it decides numbers: part of the fingerprint, and told by the manifest."""


@dataclass(frozen=True)
class Loaded:
    """A model that runs here. options: of `load_model`; tokens_per_batch: padded tokens."""

    path: str
    options: Mapping[str, Any]
    tokens_per_batch: int

    def opened(self, device: torch.device | None, shards: Shards) -> AbstractContextManager[Predictor]:
        """As `Source`."""
        model = self._load(device, shards.renderer.tokenizer, shards.renderer.max_length)
        return nullcontext(Extractor(model, shards.kind, shards.keep, seed=shards.seed, budget=self.tokens_per_batch))

    def _load(self, device: torch.device | None, tokenizer: Any, max_length: int) -> Any:
        """The model, checked against its tokenizer and the length of chats. device: None where a device_map decides."""
        try:
            model = models.load_model(self.path, device=device, **self.options).eval()
        except torch.OutOfMemoryError:
            raise UserError(
                f"{self.path} does not fit in the memory of {device or 'the devices'}; spread it with "
                "source.device_map=auto, or make it smaller with source.load_in=8bit or 4bit"
            ) from None
        models.check_vocabulary(model, tokenizer, self.path)
        models.check_context(model.config, self.path, max_length)
        return model


@dataclass(frozen=True)
class Shards:
    """Makes shards of a store. Plain values alone: it is sent to processes of their own.

    chats: of `load_chats`. rows_per_shard: chats; logprobs: how they are stored.
    bad: chats with NaN or inf in the shards that are there already, of which there may be ``max_bad_fraction``.
    imports: the user's own modules, which may have registered the kind.
    """

    source: Source
    chats: datasets.Dataset
    renderer: ChatRenderer
    writer: StoreWriter
    kind: str
    keep: Keep
    seed: int
    rows_per_shard: int
    logprobs: str
    max_bad_fraction: float
    bad: Sequence[str]
    imports: Sequence[str]

    def __call__(self, device: torch.device | None, indices: Sequence[int], tell: Tell) -> None:
        """Makes the shards ``indices`` on a device, one after another."""
        import_modules(self.imports)
        bad = list(self.bad)
        with self.source.opened(device, self) as predictor:
            for index in indices:
                self._make(index, predictor, bad, tell)

    def _make(self, index: int, predictor: Predictor, bad: list[str], tell: Tell) -> None:
        first = index * self.rows_per_shard
        chats = self.chats.select(range(first, min(first + self.rows_per_shard, len(self.chats)))).to_list()
        rendered = self.renderer([chat["messages"] for chat in chats])
        rows: dict[int, columns.Row] = {}
        for places, tops in predictor.batches(rendered):
            for place, top in zip(places, tops, strict=True):
                rows[place] = columns.row(chats[place], rendered[place], top)
                bad += [chats[place]["id"]] if rows[place]["bad"] else []
            check_bad(bad, len(self.chats), self.max_bad_fraction)
            tell(len(places), sum(len(rendered[place].input_ids) for place in places))
        ordered = [rows[place] for place in range(len(rows))]
        table = columns.table(ordered, self.keep.vocab_size, self.logprobs, self.renderer.max_length)
        self.writer.write(index, table, {**columns.statistics(ordered), **predictor.noted()})


def check_bad(bad: Sequence[str], total: int, most: float) -> None:
    """Raises `UserError` where too many chats gave NaN or inf. bad: their ids; most: the fraction that may."""
    if len(bad) > most * total:
        raise UserError(
            f"{len(bad)} of {total} chats gave NaN or inf (first: {bad[0]}), more than "
            f"extract.max_bad_fraction={most}; try source.dtype=float32 or bfloat16 (of a server: --dtype)"
        )


def bad_of(entries: Iterable[Mapping[str, Any]]) -> list[str]:
    """Ids of the chats with NaN or inf in shards that are whole."""
    return [identity for entry in entries for identity in entry["statistics"]["bad"]]
