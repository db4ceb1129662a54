"""What an experiment's stages will take: arithmetic, from parameters, tokens, and one measured speed.

    seconds   extract  s + 2 P D / r        train  s + 6 P D E / r        evaluate  2 P D / r of each model
              align    s + D · 4 µs + V · 20 µs        merge  s + 4 P (J + 1) / (0.3 GB/s)        report  s
    bytes     a store  (k (i + 2) + 3) R + i D        a target  4 P        merged  P · its dtype's
    memory    train  16 P + 68 L d B T        extract  dtype · P + 80 d B        both + 0.6 GB

P parameters that a token meets (bytes: all), D tokens of all chats, R those of answers, E epochs, k kept of each, i = 2
bytes an id up to 65,536 tokens, else 4, V vocabulary, J targets, L layers, d width, B T tokens at a time. r: FLOP/s of
the pivot's forward pass, measured here; s: seconds that a process takes to start. Activations after arXiv 2205.05198
(34 bytes a token, layer and width in 16 bits). Long chats' attention, and answers that are generated, are not counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fusechat.new.facts import Lengths, Model

K, EPOCHS = 10, 3  # of conf/extract/top_k.yaml and conf/trainer/cpu.yaml
ALIGNED, MAPPED, READ = 4e-6, 2e-5, 0.3e9  # seconds a token, seconds a token of the vocabulary, bytes a second
LIBRARIES, TRAINED, PER_LAYER, PER_TOKEN = 0.6e9, 16, 68, 80  # bytes, see above
REPORT = 3.0  # seconds beside its start
Expected = dict[str, float | None]  # seconds (None where no speed is known) and bytes


@dataclass(frozen=True)
class Work:
    """pivot and sources with the lengths of their chats; chats and tests: how many; start: seconds; speed: FLOP/s of
    the pivot, None where it was not measured; baselines: SFT runs; merges: merged models; dtype: bytes of a weight;
    epochs: of a training, k: kept of each position.
    """

    pivot: Model
    sources: Sequence[Model]
    lengths: Mapping[str, Lengths]
    chats: int
    tests: int
    start: float
    speed: float | None
    baselines: int = 3
    merges: int = 2
    dtype: int = 4
    epochs: float = EPOCHS
    k: int = K

    def outputs(self) -> dict[str, Expected]:
        """Output -> what it will take; a folder's where all in it are alike: each of ``targets``, ``merged``, …"""
        pivot, own = self.pivot, self.lengths["pivot"]
        found: dict[str, Expected] = {}
        for model in (pivot, *self.sources):
            lengths = self.lengths[model.name]
            reading = self._passes(2 * model.active, self.chats * lengths.tokens)
            found[f"distributions/{model.name}"] = self._of(reading, self._store(model, lengths))
        for model in self.sources:
            aligning = self.chats * own.tokens * ALIGNED + model.vocabulary * MAPPED
            found[f"aligned/{model.name}"] = self._of(aligning, self._store(pivot, own))
        training = self._passes(6 * pivot.active, self.chats * own.tokens * self.epochs)
        found["targets"] = self._of(training, 4 * pivot.total)
        merging = 4 * pivot.total * (1 + len(self.sources)) / READ
        found["merged"] = self._of(merging, self.dtype * pivot.total)
        testing = self._passes(2 * pivot.active, self.tests * own.tokens)
        evaluation = None if testing is None else testing + 4 * pivot.total / READ
        return found | {
            "evaluation": {"seconds": evaluation, "bytes": 400 * self.tests},
            "report": self._of(REPORT, 1e6),
        }

    def stages(self) -> dict[str, Expected]:
        """Stage -> the sum of its outputs."""
        merged = self.merges + (self.baselines > 1)
        targets = len(self.sources) + self.baselines
        times = {"targets": targets, "merged": merged, "evaluation": 1 + len(self.sources) + targets + merged}
        found: dict[str, Expected] = {}
        for output, expected in self.outputs().items():
            stage = output.partition("/")[0]
            one = {key: None if value is None else value * times.get(output, 1) for key, value in expected.items()}
            before = found.get(stage, {"seconds": 0.0, "bytes": 0.0})
            found[stage] = {key: _sum(before[key], one[key]) for key in one}
        return found

    def memory(self, micro_batch: int) -> dict[str, float]:
        """Bytes that the largest process of a stage needs. micro_batch: chats at a time in training."""
        train = TRAINED * self.pivot.total + self.per_chat * micro_batch
        largest = max((self.pivot, *self.sources), key=lambda model: model.total)
        extract = self.dtype * largest.total + PER_TOKEN * largest.width * 16384
        return {"train": LIBRARIES + train, "extract": LIBRARIES + extract}

    @property
    def per_chat(self) -> float:
        """Bytes that the longest chat takes in training."""
        return PER_LAYER * self.pivot.layers * self.pivot.width * self.lengths["pivot"].longest

    def micro_batch(self, step: int, room: float) -> int:
        """As many chats of a step as fit into half of the room, at least one."""
        left = room / 2 - LIBRARIES - TRAINED * self.pivot.total
        return max(1, min(step, int(left / self.per_chat)))

    def _passes(self, flops: float, tokens: float) -> float | None:
        return None if self.speed is None else flops * tokens / self.speed

    def _of(self, seconds: float | None, size: float) -> Expected:
        return {"seconds": None if seconds is None else self.start + seconds, "bytes": size}

    def _store(self, model: Model, lengths: Lengths) -> float:
        ids = 2 if model.vocabulary <= 1 << 16 else 4
        return self.chats * (lengths.positions * (self.k * (ids + 2) + 3) + lengths.tokens * ids)


def _sum(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else first + second
