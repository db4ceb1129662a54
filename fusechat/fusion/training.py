"""What a training is: its inputs and settings, and the fingerprint that they make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fusechat.app.errors import UserError
from fusechat.app.outputs import file_hash, fingerprint
from fusechat.app.places import stage_of
from fusechat.fusion.fingerprint import earlier, settings_fingerprint
from fusechat.fusion.losses import FusionLoss
from fusechat.fusion.options import Data, Optimizer
from fusechat.fusion.rules import FusionRule
from fusechat.models.load import model_identity
from fusechat.models.whole import ADAPTER_WEIGHTS
from fusechat.stores.store import DistributionStore

ADAPTER = "adapter"  # folder of a target


@dataclass(frozen=True)
class Training:
    """What `fusechat.fusion.train` has been given, checked. stores: the pivot's first, then one for each of sources.

    dtype: what weights are held in. validation: chats of one's own, a `datasets.Dataset`. own_callbacks: name ->
    ``_target_`` and arguments.
    """

    pivot: str
    sources: Sequence[str]
    stores: Sequence[DistributionStore]
    rule: FusionRule
    loss: FusionLoss
    optimizer: Optimizer
    data: Data
    lora: Mapping[str, Any]
    trainer: Mapping[str, Any]
    dtype: str
    revision: str | None
    trust_remote_code: bool
    attn_implementation: str | None
    load_in: str | None
    gradient_checkpointing: bool
    max_length: int
    seed: int
    validation: Any
    imports: Mapping[str, str] | None
    own_callbacks: Mapping[str, Mapping[str, Any]]
    early_stopping: int | None

    @cached_property
    def parts(self) -> dict[str, Any]:
        """All that decides the target, by name. Raises `UserError` where an adapter to go on from is not there."""
        lora, adapter = dict(self.lora), self.lora.get("adapter")
        lora.pop("adapter", None)
        if adapter is not None and not (Path(adapter) / ADAPTER_WEIGHTS).is_file():
            raise UserError(f"lora.adapter={adapter} holds no {ADAPTER_WEIGHTS}; {_instead(Path(adapter))}")
        return {
            "pivot": model_identity(self.pivot, self.revision),
            "stores": [store.fingerprint for store in self.stores],
            "dtype": self.dtype,
            **self._objective,
            "optimizer": self.optimizer.settings,
            "data": asdict(self.data),
            "lora": {**lora, **({"load_in": self.load_in} if self.load_in else {})},
            **({} if adapter is None else {"adapter": file_hash(Path(adapter) / ADAPTER_WEIGHTS)}),
            "trainer": self.trainer,
            "seed": self.seed,
            **({} if self.validation is None else {"validation": fingerprint(ids=list(self.validation["id"]))}),
            **({"callbacks": self._beside} if self._beside else {}),
        }

    @property
    def _objective(self) -> dict[str, Any]:
        """What is minimised, in the config's sections; of plain SFT only what decides: its λ is 1."""
        if self.rule.needs_sources:
            return self._sections
        return {"fusion": {"rule": self.rule.rule}, "loss": {"chunked": self.loss.chunked}}

    @property
    def _sections(self) -> dict[str, Any]:
        return {"fusion": asdict(self.rule), "loss": asdict(self.loss)}

    @property
    def _beside(self) -> dict[str, Any]:
        """The callbacks that may decide a target; nothing where there are none."""
        stopping = {} if self.early_stopping is None else {"early_stopping": self.early_stopping}
        return {**stopping, **self.own_callbacks}

    @cached_property
    def mark(self) -> str:
        """The fingerprint of the target."""
        return settings_fingerprint(self.imports, self.parts)

    def mark_of(self, record: Path) -> str:
        """The fingerprint of the target, or the one that it has from an earlier version, by its record."""
        return earlier(record, self.imports, self.parts, self._sections) or self.mark

    def checkpoints(self, output: Path) -> Path:
        """The folder of checkpoints while the target is being made: that of an earlier version, where one began."""
        then = settings_fingerprint(self.imports, {**self.parts, **self._sections})
        begun, now = (output.parent.parent / "checkpoints" / f"{output.name}-{mark}" for mark in (then, self.mark))
        return begun if begun.exists() else now


def _instead(adapter: Path) -> str:
    """What to do where a folder is no adapter: targets keep theirs in one, but for those of earlier versions."""
    if (adapter / ADAPTER / ADAPTER_WEIGHTS).is_file():
        return f"that target's adapter is {adapter / ADAPTER}"
    target = next((place for place in (adapter, adapter.parent) if stage_of(place) == "train"), None)
    if target is None:
        return f"give a target's folder {ADAPTER}/, or null"
    return (
        f"{target} was trained without one, or by a version that merged it into the weights alone: train it again with "
        f"lora.enabled=true overwrite=true, or go on from its weights with pivot.path={target} lora.adapter=null"
    )
