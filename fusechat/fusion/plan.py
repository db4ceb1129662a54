"""Which chats each rank takes, step by step.

The order is made from seed, epoch and step: it does not depend on how many devices or micro-batches share a step, and a
resumed run takes it up at the step where it stopped, on as many devices as it has then.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Draw:
    """The chats of one micro-batch on one rank, and the response tokens of the optimizer step it belongs to.

    No chats: a rank that has none where others do runs the model on one padding token, for the others wait for it.
    """

    rows: list[int]
    step_tokens: int


class Plan(Sampler[Draw]):
    """Which chats each rank takes, epoch by epoch.

    An optimizer step has ``step`` chats, the last of an epoch what is left; which they are depends on rows, lengths,
    seed and step alone. A step is taken in micro-batches, in each of which each of ``world`` ranks takes ``batch_size``
    chats or what is left. rows: the chats of an epoch; lengths and responses: tokens of every chat of the stores. seed
    None: in order. bucket: steps whose chats are sorted by length together. ``start``: optimizer steps that a resumed
    epoch has done already.
    """

    def __init__(
        self,
        rows: Ints,
        lengths: Ints,
        responses: Ints,
        *,
        step: int,
        batch_size: int,
        rank: int,
        world: int,
        seed: int | None,
        bucket: int,
    ) -> None:
        self.rows, self.lengths, self.responses = rows, lengths, responses
        self.rank, self.world, self.seed, self.bucket = rank, world, seed, bucket
        self.step, self.micro_batch = step, batch_size * world
        self.epoch, self.start = 0, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning: every epoch has its own order."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.micro_batches(self.optimizer_steps)

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps of an epoch."""
        return -(-len(self.rows) // self.step)

    def micro_batches(self, steps: int) -> int:
        """How many micro-batches the first so many optimizer steps of an epoch have."""
        whole, rest = divmod(min(steps * self.step, len(self.rows)), self.step)
        return whole * -(-self.step // self.micro_batch) + -(-rest // self.micro_batch)

    def steps_done(self, micro_batches: int) -> int:
        """How many optimizer steps of an epoch so many micro-batches complete."""
        whole = micro_batches // -(-self.step // self.micro_batch)
        return self.optimizer_steps if micro_batches >= len(self) else whole

    def __iter__(self) -> Iterator[Draw]:
        start, self.start = self.start, 0
        for step in self._steps()[start:]:
            step_tokens = int(self.responses[step].sum())
            for first in range(0, len(step), self.micro_batch):
                together = step[first : first + self.micro_batch]
                yield Draw(together[self.rank :: self.world].tolist(), step_tokens)

    def _steps(self) -> list[Ints]:
        """The chats of each optimizer step: shuffled, then those of similar length put together.

        Chats are shuffled; ``bucket`` steps' worth of them at a time is sorted by length and cut into steps; then the
        order of the steps is shuffled. The last, incomplete step stays last.
        """
        if self.seed is None:
            return _cut(self.rows, self.step)
        rng = np.random.default_rng((self.seed, self.epoch))
        order = rng.permutation(self.rows)
        in_whole_steps = len(order) - len(order) % self.step
        pools = _cut(order[:in_whole_steps], self.step * self.bucket)
        by_length = [pool[np.argsort(self.lengths[pool], kind="stable")] for pool in pools]
        steps = [step for pool in by_length for step in _cut(pool, self.step)]
        shuffled = [steps[i] for i in rng.permutation(len(steps))]
        return shuffled + _cut(order[in_whole_steps:], self.step)


def _cut(rows: Ints, size: int) -> list[Ints]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]
