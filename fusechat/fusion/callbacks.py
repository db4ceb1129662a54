"""Lightning callbacks of training: throughput, resumable checkpoints, and the Hugging Face directory at the end."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback, EarlyStopping, LearningRateMonitor, ModelCheckpoint
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from fusechat.app import checksums
from fusechat.app.outputs import whole_directory, write_json
from fusechat.app.progress import spell
from fusechat.app.steps import StepsTold
from fusechat.fusion.adapters import merged_adapters, save_adapters
from fusechat.fusion.checkpoints import list_of
from fusechat.fusion.options import Callbacks
from fusechat.fusion.samples import Samples
from fusechat.fusion.sharding import whole_weights
from fusechat.fusion.stopping import StopOnSignal
from fusechat.fusion.training import ADAPTER

LOG = logging.getLogger(__name__)


class Throughput(Callback):
    """Logs tokens per second over all ranks since it was last logged, and the gradient's norm before clipping."""

    def __init__(self) -> None:
        self.last = time.perf_counter()
        self.counted = 0.0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Starts the clock."""
        self.last = time.perf_counter()

    def on_before_optimizer_step(self, trainer: lightning.Trainer, pl_module: Any, optimizer: Any) -> None:
        """Norm of the whole step's gradient, gathered where it is in shards."""
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            norm = get_total_norm([p.grad for p in pl_module.parameters() if p.grad is not None])
            pl_module.log(
                "train/gradient_norm", norm.full_tensor() if isinstance(norm, DTensor) else norm, batch_size=1
            )

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """tokens/s of the steps since the last that was logged."""
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if pl_module.sums is None and trainer.global_step % every == 0:
            now, tokens = time.perf_counter(), float(pl_module.tokens)
            rate = (tokens - self.counted) / max(1e-9, now - self.last)
            pl_module.log("train/tokens_per_second", rate, batch_size=1)
            self.last, self.counted = now, tokens


NEVER = 0.001  # share of the response tokens below which a source is never chosen
LOST = (
    "source %s spoke for %.2f %% of the response tokens: the pivot alone is likelier almost everywhere, and nothing of "
    "the source is learned; see its bits per byte, or set fusion.include_pivot=false"
)


class FusionShares(Callback):
    """Logs how much of the response each source covers, and, per epoch and tag, how often each model was chosen."""

    def __init__(self) -> None:
        self.lost: set[str] = set()  # sources that were warned of

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Coverage is a property of the stores: logged once."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        named = zip(pl_module.source_names, data.coverage(), strict=True)
        shares = {f"coverage/{name}": share for name, share in named}
        for logger in trainer.loggers:
            logger.log_metrics(shares, step=trainer.global_step)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Shares since training began; a warning of sources that never win against the pivot."""
        found = pl_module.wins.rates()
        rates = {f"wins/{tag}/{name}": r for tag, of in found.items() for name, r in of.items()}
        for name, share in found.get("all", {}).items():
            if name != "pivot" and "pivot" in pl_module.names and share < NEVER and name not in self.lost:
                self.lost.add(name)
                LOG.warning(LOST, name, 100 * share)
        for logger in trainer.loggers:
            logger.log_metrics(rates, step=trainer.global_step)


class SavePretrained:
    """Writes the model as a Hugging Face directory, in the precision it is held in.

    describe(directory, facts) adds tokenizer, card and fusechat.json before the directory gets its name.
    """

    def __init__(self, output_dir: Path, describe: Callable[[Path, Mapping[str, Any]], None]) -> None:
        self.output_dir, self.describe, self.began = output_dir, describe, time.monotonic()

    def save(self, pl_module: Any, facts: Mapping[str, Any]) -> None:
        """Every rank calls it: shards are gathered, adapters merged into the pivot's weights. The first one writes."""
        state: dict[str, Any] | None = whole_weights(pl_module.model, trained_only=bool(pl_module.lora))
        if pl_module.global_rank:
            return
        model, adapters = pl_module.model, state if pl_module.lora else None
        if adapters is not None:
            model, state = merged_adapters(pl_module.path, pl_module.loading, pl_module.lora, adapters), None
        with whole_directory(self.output_dir, overwrite=True) as directory:
            model.save_pretrained(directory, state_dict=state)
            if adapters is not None:
                save_adapters(pl_module.model, adapters, directory / ADAPTER)
            self.describe(directory, facts)
        LOG.info(closing(self.output_dir, facts, float(pl_module.tokens), time.monotonic() - self.began))


NAMES = {"train/sft": "SFT loss", "train/fusion": "fusion loss", "validation/sft": "held-out SFT loss"}
NAMES |= {"validation/fusion": "held-out fusion loss", "validation/bits_per_byte": "held-out bits per byte"}


def closing(place: Path, facts: Mapping[str, Any], tokens: float, seconds: float) -> str:
    """A training in a line: what was made, the numbers that matter, how long, where. tokens: of this run."""
    numbers = ", ".join(f"{NAMES[name]} {value:.4f}" for name, value in facts["metrics"].items() if name in NAMES)
    speed = f"{tokens:,.0f} tokens at {tokens / max(1e-9, seconds):,.0f} a second" if tokens else "no step in this run"
    return f"target {place.name}: {facts['steps']} steps, {speed}; {numbers}; in {spell(seconds)}, {place}"


class Checkpoints(ModelCheckpoint):
    """Checkpoints with a list of their files' checksums beside each; a resume compares them (`checkpoints`)."""

    def _save_checkpoint(self, trainer: lightning.Trainer, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        if trainer.is_global_zero:
            place = Path(filepath)
            files = [place] if place.is_file() else sorted(f for f in place.rglob("*") if f.is_file())
            write_json(list_of(place), {str(f.relative_to(place.parent)): checksums.entry(f) for f in files})

    def _remove_checkpoint(self, trainer: lightning.Trainer, filepath: str) -> None:
        super()._remove_checkpoint(trainer, filepath)
        if trainer.is_global_zero:
            list_of(Path(filepath)).unlink(missing_ok=True)


def make_callbacks(settings: Callbacks, checkpoints: Path, logged: bool, tokenizer: Any) -> list[Callback]:
    """Lightning's callbacks for these settings; ``checkpoints`` is their folder; tokenizer: the pivot's."""
    every = settings.checkpoint_every_n_steps
    saver = Checkpoints(
        dirpath=checkpoints,
        filename="{step}",
        every_n_train_steps=every,
        save_top_k=1,
        monitor="step",
        mode="max",
        save_on_train_epoch_end=every is None or None,
        enable_version_counter=False,
    )
    told = StepsTold(f"train {checkpoints.name.rpartition('-')[0]}", bar=settings.progress_bar)
    found: list[Callback] = [Throughput(), FusionShares(), StopOnSignal(), told, saver]
    if settings.early_stopping:
        found.append(EarlyStopping("validation/bits_per_byte", patience=settings.early_stopping))
    if settings.samples:
        found.append(Samples(settings.samples, tokenizer))
    if logged:
        found.append(LearningRateMonitor("step"))
    return found
