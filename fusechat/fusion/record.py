"""What a target says of itself: tokenizer, fusechat.json and model card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusechat.app.outputs import stamp
from fusechat.chats.mixture import paths_of
from fusechat.fusion.training import Training
from fusechat.models.cards import Made, write_card
from fusechat.models.whole import write_record

if TYPE_CHECKING:
    from fusechat.fusion.data import FusionDataModule
    from fusechat.fusion.module import FusionModule

METRIC = "validation/bits_per_byte"


@dataclass(frozen=True)
class Description:
    """made: for the card; about: what is known before training; record: the caller's."""

    tokenizer: Any
    made: Made
    about: Mapping[str, Any]
    record: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        training: Training,
        name: str,
        module: FusionModule,
        data: FusionDataModule,
        tokenizer: Any,
        record: Mapping[str, Any] | None,
    ) -> Description:
        """From the objects of a training that is about to begin."""
        fused = f"A fusion target (rule {module.rule.rule}, lambda {module.loss.lm_weight})."
        about: dict[str, Any] = {**stamp(training.mark), "stage": "train", "name": name}
        sources, stores = training.sources, [store.fingerprint for store in training.stores]
        about["sources"] = list(sources)
        about["stores"] = dict(zip(["pivot", *sources], stores, strict=True))
        about["coverage"] = dict(zip(sources, data.coverage(), strict=True))
        fusing = module.rule.needs_sources
        models = [str(s.manifest.get("path", n)) for n, s in zip(sources, training.stores[1:], strict=True)]
        parts = ", ".join(f"{part} {n:,}" for part, n in training.stores[0].manifest.get("parts", {}).items())
        made = Made(
            (fused if fusing else "Supervised fine-tuning alone.") + (f" Chats: {parts}." if parts else ""),
            {"pivot": training.pivot} | {f"source {n}": model for n, model in enumerate(models, 1)},
            [training.pivot],
            paths_of((record or {}).get("config", {}).get("chat", {}).get("path") or []),
            ["distillation", module.rule.rule] if fusing else ["sft"],
        )
        return cls(tokenizer, made, about, record or {})

    @staticmethod
    def facts(module: FusionModule, trainer: Any) -> dict[str, Any]:
        """What there is to say of a training; every rank must ask."""
        return {"metrics": measured(trainer), "wins": module.wins.rates(), "steps": trainer.global_step}

    def write(self, directory: Path, facts: Mapping[str, Any]) -> None:
        """Adds all of it to a target that is being written."""
        self.tokenizer.save_pretrained(directory)
        # what was measured on the way depends on where a killed run was taken up
        final = {name: value for name, value in facts["metrics"].items() if name.startswith("validation/")}
        write_record(directory, {**self.about, **facts, "metrics": final, **self.record})
        write_card(directory, str(self.about["name"]), self.made, final)


def measured(trainer: Any) -> dict[str, float]:
    """The metrics of the trainer's last loop."""
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def metric_of(held: Mapping[str, Any]) -> float | None:
    """The validation bits per byte that a target's record tells."""
    value = held.get("metrics", {}).get(METRIC)
    return None if value is None else float(value)
