"""Sources behind a server: the same distributions, from somebody else's machines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fusechat.app.endpoint import in_flight
from fusechat.app.errors import UserError
from fusechat.chats.render import Rendered
from fusechat.extract.batches import Batch
from fusechat.extract.kinds import OF_TOP, Keep, joined
from fusechat.stores.distributions import NOTHING, TopK
from fusechat.stores.served.asked import Asked, Noted
from fusechat.stores.served.server import Server

if TYPE_CHECKING:
    import torch

    from fusechat.extract.shards import Shards

MOST = 0.01  # of the mass without an id, and of next tokens without a log-probability, before the run stops
ENOUGH = 1000  # positions after which that is looked at before a shard ends


@dataclass(frozen=True)
class Served:
    """A model behind a server. path, options: of its config, as `embedding_rows` takes them."""

    server: Server
    path: str
    options: Mapping[str, Any]

    @property
    def decides(self) -> Mapping[str, str]:
        """As the server has it."""
        return self.server.decides

    @contextmanager
    def opened(self, device: torch.device | None, shards: Shards) -> Iterator[Asking]:
        """Its connections are closed at the end of the block."""
        tokenizer, longest = shards.renderer.tokenizer, shards.renderer.max_length
        kept = "the shards so far are whole"
        with self.server.asked(tokenizer, self.path, tokens=longest, kept=kept, **self.options) as asked:
            yield Asking(asked, self.server, shards.kind, shards.keep)


class Asking:
    """Asks for one chat at a request, many under way."""

    def __init__(self, asked: Asked, server: Server, kind: str, keep: Keep) -> None:
        self.asked, self.server, self.kind, self.keep = asked, server, OF_TOP[kind], keep
        self.sums: Counter[str] = Counter()  # of all chats
        self.shard: Counter[str] = Counter()

    def batches(self, rendered: Sequence[Rendered]) -> Iterator[Batch]:
        """All chats of a shard, one after another. Raises `UserError` where too much mass has no id."""
        for place, (top, noted) in enumerate(in_flight(self._one, rendered, self.server.requests)):
            for counts in (self.sums, self.shard):
                counts.update({**noted, "positions": len(top.gold_logprob)})
            self._check(ENOUGH)
            yield [place], joined([top], [len(top.gold_logprob)])
        self._check(1)

    def noted(self) -> dict[str, Any]:
        """Sums over the shard: entries of padding, mass without an id, next tokens without a log-probability."""
        found, self.shard = dict(self.shard), Counter()
        found.pop("positions", None)
        return found

    def _one(self, rendered: Rendered) -> tuple[TopK, Noted]:
        if not len(rendered.positions):
            return NOTHING, {}
        top, noted = self.asked.top(rendered, self.keep.top_k)
        return self.kind(top, self.keep), noted

    def _check(self, enough: int) -> None:
        positions, lost, bounded = (self.sums[name] for name in ("positions", "lost", "bounded"))
        if positions >= enough and max(lost, bounded) > MOST * positions:
            raise UserError(
                f"{lost / positions:.1%} of the mass that {self.server.base_url} lists belongs to no single token id, "
                f"and {bounded / positions:.1%} of the next tokens are not listed; at most {MOST:.0%} may: serve "
                f"{self.server.model} where tokens have ids ({self.server.section}.engine=server), or leave out the "
                "ends of turns, which such servers do not name (chat.end_of_turn=false)"
            )
