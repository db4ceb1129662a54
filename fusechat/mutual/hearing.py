"""A message in the place of a model: what a sender says of the public chats becomes a store of its distributions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fusechat.app.checksums import digest
from fusechat.app.errors import UserError
from fusechat.chats.render import Rendered
from fusechat.extract.batches import Batch
from fusechat.mutual.messages import AGAIN, KNOWN, Message
from fusechat.stores.distributions import NEG_INF, TopK
from fusechat.stores.encoding import decode_counts

if TYPE_CHECKING:
    from fusechat.extract.shards import Shards


@dataclass(frozen=True)
class Heard:
    """What `extract` reads in place of a model (`fusechat.extract.shards.Elsewhere`); all chats are one shard."""

    message: Message

    @property
    def decides(self) -> Mapping[str, str]:
        """The message's content."""
        return {"told": digest(self.message.place / KNOWN)}

    @contextmanager
    def opened(self, device: torch.device | None, shards: Shards) -> Iterator[Heard]:
        """Ready. Raises `UserError` for token ids that the sender's tokenizer has not."""
        assert self.message.knowledge is not None
        ids = self.message.knowledge.column("ids").combine_chunks().flatten().to_numpy()
        if len(ids) and int(ids.max()) >= shards.keep.vocab_size:
            sender, known = self.message.envelope.sender, shards.keep.vocab_size
            raise UserError(f"{sender} tells of token {ids.max()}, its tokenizer has {known}; {AGAIN}")
        yield self

    def batches(self, rendered: Sequence[Rendered]) -> Iterator[Batch]:
        """Chat by chat, as the sender's tokenizer reads it; None where the sender says nothing of one."""
        rows = self.message.knowledge.to_pydict() if self.message.knowledge is not None else {"row": []}
        at = {row: place for place, row in enumerate(rows["row"])}
        for row, chat in enumerate(rendered):
            told = {name: np.asarray(values[at[row]]) for name, values in rows.items()} if row in at else None
            yield [row], [None if told is None else self._top(told, row, len(chat.positions))]

    def noted(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def _top(self, told: Mapping[str, Any], row: int, positions: int) -> TopK:
        counts = decode_counts(told["counts"].astype(np.int64), len(told["gold_logprob"]))
        if len(counts) != positions or counts.sum() != len(told["ids"]) or len(told["ids"]) != len(told["logprobs"]):
            sender = self.message.envelope.sender
            raise UserError(f"{sender} tells of {len(counts)} positions of chat {row}, which has {positions}; {AGAIN}")
        present = np.arange(counts.max(initial=1)) < counts[:, None]
        ids, logprobs = np.zeros(present.shape, np.int64), np.full(present.shape, NEG_INF, np.float32)
        ids[present], logprobs[present] = told["ids"], told["logprobs"]
        gold = torch.from_numpy(told["gold_logprob"].astype(np.float32))
        return TopK(torch.from_numpy(ids), torch.from_numpy(logprobs), gold)
