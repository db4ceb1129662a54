"""The work of one process: shards of a store, from chats to Arrow files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import torch

from fusechat.app.errors import UserError
from fusechat.app.registry import import_modules
from fusechat.chats.render import ChatRenderer
from fusechat.extract import writer as columns
from fusechat.extract.batches import batches
from fusechat.extract.extractor import Extractor
from fusechat.extract.kinds import Keep
from fusechat.extract.processes import Tell
from fusechat.models import load as models
from fusechat.stores.writer import StoreWriter


@dataclass(frozen=True)
class Source:
    """A model and how it is loaded: options of `load_model`."""

    path: str
    options: Mapping[str, Any]

    def load(self, device: torch.device | None, tokenizer: Any, max_length: int) -> Any:
        """The model, checked against its tokenizer and the length of chats. device: None where a device_map decides."""
        try:
            model = models.load_model(self.path, device=device, **self.options).eval()
        except torch.OutOfMemoryError:
            raise UserError(
                f"{self.path} does not fit in the memory of {device or 'the devices'}; spread it with "
                "source.device_map=auto, or make it smaller with source.load_in=8bit or 4bit"
            ) from None
        models.check_vocabulary(model, tokenizer, self.path)
        models.check_context(model, self.path, max_length)
        return model


@dataclass(frozen=True)
class Shards:
    """Makes shards of a store. Plain values alone: it is sent to processes of their own.

    chats: of `load_chats`. rows_per_shard: chats; tokens_per_batch: padded tokens; logprobs: how they are stored.
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
    tokens_per_batch: int
    logprobs: str
    max_bad_fraction: float
    bad: Sequence[str]
    imports: Sequence[str]

    def __call__(self, device: torch.device | None, indices: Sequence[int], tell: Tell) -> None:
        """Makes the shards ``indices`` on a device, one after another."""
        import_modules(self.imports)
        model = self.source.load(device, self.renderer.tokenizer, self.renderer.max_length)
        extractor, bad = Extractor(model, self.kind, self.keep, seed=self.seed), list(self.bad)
        for index in indices:
            self._make(index, extractor, bad, tell)

    def _make(self, index: int, extractor: Extractor, bad: list[str], tell: Tell) -> None:
        first = index * self.rows_per_shard
        chats = self.chats.select(range(first, min(first + self.rows_per_shard, len(self.chats)))).to_list()
        rows: dict[int, columns.Row] = {}
        extractor.unfit = []
        for places, rendered in batches(chats, self.renderer, self.tokens_per_batch):
            for place, one, top in zip(places, rendered, extractor(rendered), strict=True):
                rows[place] = columns.row(chats[place], one, top)
                bad += [chats[place]["id"]] if rows[place]["bad"] else []
            check_bad(bad, len(self.chats), self.max_bad_fraction)
            tell(len(places), sum(len(one.input_ids) for one in rendered))
        ordered = [rows[place] for place in range(len(rows))]
        table = columns.table(ordered, self.keep.vocab_size, self.logprobs, self.renderer.max_length)
        self.writer.write(index, table, {**columns.statistics(ordered), "out_of_memory": extractor.unfit})


def check_bad(bad: Sequence[str], total: int, most: float) -> None:
    """Raises `UserError` where too many chats gave NaN or inf. bad: their ids; most: the fraction that may."""
    if len(bad) > most * total:
        raise UserError(
            f"{len(bad)} of {total} chats gave NaN or inf (first: {bad[0]}), more than "
            f"extract.max_bad_fraction={most}; try source.dtype=float32 or bfloat16"
        )


def bad_of(entries: Iterable[Mapping[str, Any]]) -> list[str]:
    """Ids of the chats with NaN or inf in shards that are whole."""
    return [identity for entry in entries for identity in entry["statistics"]["bad"]]
