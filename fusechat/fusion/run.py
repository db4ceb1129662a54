"""What train.py puts together: names, fingerprint, data, module, trainer, and the target's description."""

from __future__ import annotations

import json
import logging
import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from fusechat.app.command import experiment_of, make_trainer, plain, provenance, seed_everything
from fusechat.app.errors import UserError
from fusechat.app.outputs import fingerprint, write_json
from fusechat.app.tracking import log_made, make_logger, wandb_run
from fusechat.fusion.callbacks import SavePretrained, latest_checkpoint, make_callbacks, step_of
from fusechat.fusion.data import FusionDataModule
from fusechat.fusion.module import FusionModule
from fusechat.models import load as models
from fusechat.models.cards import command_line, write_card
from fusechat.stores.store import DistributionStore

LOG = logging.getLogger(__name__)


class Training:
    """One training run as its config describes it; nothing is loaded before it is asked for."""

    def __init__(self, cfg: DictConfig) -> None:
        self.cfg, self.output = cfg, Path(cfg.output_dir)
        self.sft = cfg.fusion.rule == "sft"
        self.sources = [] if self.sft else [str(name) for name in cfg.sources]
        self.pivot_store = Path(cfg.paths.experiment) / "distributions/pivot"
        self.aligned = [Path(cfg.paths.experiment) / "aligned" / name for name in self.sources]
        stage = experiment_of(cfg)
        self.remedies = [f"python -m fusechat.extract {stage} source=pivot"]
        self.remedies += [f"python -m fusechat.align {stage} source={name}" for name in self.sources]

    @cached_property
    def mark(self) -> str:
        """Fingerprint of everything that decides the target."""
        cfg = self.cfg
        stores = [
            DistributionStore(p, r).fingerprint
            for p, r in zip([self.pivot_store, *self.aligned], self.remedies, strict=True)
        ]
        keys = ("fusion", "loss", "optimizer", "data", "lora", "trainer", "seed", "gradient_checkpointing")
        ignored = {"devices", "num_nodes", "accelerator", "log_every_n_steps", "enable_model_summary"}
        parts = {key: plain(cfg[key]) for key in keys}
        parts["trainer"] = {k: v for k, v in parts["trainer"].items() if k not in ignored}
        return fingerprint(
            pivot=models.model_identity(cfg.pivot.path, cfg.pivot.revision),
            stores=stores,
            dtype=cfg.pivot.dtype,
            **parts,
        )

    @cached_property
    def held(self) -> dict[str, Any]:
        """What the output directory says of itself, or nothing."""
        file = self.output / "fusechat.json"
        return json.loads(file.read_text()) if file.exists() else {}

    @property
    def finished(self) -> bool:
        """Whether the target is there. Raises `UserError` where other settings made it."""
        mark = self.mark  # first of all: it names the command for a store that is missing
        if not self.held or self.cfg.overwrite:
            return False
        if self.held["fingerprint"] != mark:
            raise UserError(
                f"{self.output} holds a target made with other settings (fingerprint {self.held['fingerprint']}, now {self.mark}); "
                "add overwrite=true, or choose another run_name=NAME"
            )
        LOG.info("skip: %s is trained already (fingerprint %s)", self.output, self.mark)
        return True

    @property
    def metric(self) -> float | None:
        """Validation bits per byte of the finished target."""
        value = self.held.get("metrics", {}).get("validation/bits_per_byte")
        return None if value is None else float(value)

    @property
    def checkpoints(self) -> Path:
        return self.output.parent.parent / "checkpoints" / f"{self.output.name}-{self.mark}"

    @property
    def checkpoint(self) -> str | None:
        """``ckpt_path=last``: where an earlier run of the same settings stopped, if it did."""
        if self.cfg.ckpt_path != "last":
            return self.cfg.ckpt_path  # type: ignore[no-any-return]
        found = latest_checkpoint(self.checkpoints)
        if found:
            LOG.info("resuming %s", found)
        return str(found) if found else None

    def data(self) -> FusionDataModule:
        """The stores, zipped."""
        cfg = self.cfg
        self.tokenizer = models.load_tokenizer(
            cfg.pivot.path, revision=cfg.pivot.revision, trust_remote_code=cfg.pivot.trust_remote_code
        )
        seed_everything(cfg.seed)
        pad = self.tokenizer.pad_token_id
        self._data = FusionDataModule(
            str(self.pivot_store),
            [str(path) for path in self.aligned],
            batch_size=cfg.data.batch_size,
            bucket=cfg.data.bucket,
            validation_fraction=cfg.data.validation_fraction,
            split_seed=cfg.data.split_seed,
            shuffle_seed=cfg.data.shuffle_seed,
            max_tokens=cfg.data.max_tokens or cfg.chat.max_length,
            pad_token_id=0 if pad is None else pad,
            vocab_size=self._vocab_size(),
            num_workers=cfg.data.num_workers,
            remedies=self.remedies,
        )
        return self._data

    def module(self) -> FusionModule:
        """The model and its loss."""
        cfg = self.cfg
        lora = {k: v for k, v in plain(cfg.lora).items() if k != "enabled"} if cfg.lora.enabled else None
        fusion, loss, optimizer = plain(cfg.fusion), plain(cfg.loss), plain(cfg.optimizer)
        if self.sft:
            loss["lm_weight"], fusion["rule"], loss["schedule"] = 1.0, "min_ce", "hard"
        optimizer["lr_schedule"] = optimizer.pop("schedule")
        return FusionModule(
            cfg.pivot.path,
            self.sources,
            dtype=cfg.pivot.dtype,
            revision=cfg.pivot.revision,
            trust_remote_code=cfg.pivot.trust_remote_code,
            attn_implementation=cfg.pivot.attn_implementation,
            gradient_checkpointing=cfg.gradient_checkpointing,
            lora=lora,
            **fusion,
            **loss,
            **optimizer,
        )

    def trainer(self) -> Any:
        """Lightning's Trainer with our callbacks and the logger that the config names."""
        cfg, calls = self.cfg, self.cfg.callbacks
        logger = make_logger(cfg, f"{cfg.stage}-{self.output.name}", step_of(self.checkpoint))
        callbacks = make_callbacks(
            self.checkpoints, calls.checkpoint_every_n_steps, calls.early_stopping, calls.progress_bar, bool(logger)
        )
        self._saver = SavePretrained(self.output, self.describe)
        return make_trainer(
            cfg,
            [*callbacks, self._saver],
            logger,
            enable_progress_bar=calls.progress_bar,
            use_distributed_sampler=False,
        )

    def describe(self, directory: Path, module: FusionModule, trainer: Any) -> None:
        """Adds tokenizer, model card and fusechat.json to a target that is being written."""
        self.tokenizer.save_pretrained(directory)
        metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
        content = {
            "fingerprint": self.mark,
            "stage": "train",
            "name": self.output.name,
            "sources": self.sources,
            "stores": dict(zip(["pivot", *self.sources], self._data.fingerprints, strict=True)),
            "metrics": metrics,
            "coverage": dict(zip(self.sources, self._data.coverage(), strict=True)),
            "wins": module.win_rates(),
            "steps": trainer.global_step,
            **provenance(self.cfg),
        }
        (directory / "fusechat.json").write_text(json.dumps(content, indent=1, default=str) + "\n")
        self._write_card(directory, metrics)

    def _write_card(self, directory: Path, metrics: dict[str, float]) -> None:
        inputs = {"pivot": str(self.cfg.pivot.path)} | {f"source {n + 1}": name for n, name in enumerate(self.sources)}
        made = f"A fusion target (rule {self.cfg.fusion.rule}, lambda {self.cfg.loss.lm_weight})."
        shown = {k: v for k, v in metrics.items() if k.startswith("validation/")}
        write_card(
            directory,
            self.output.name,
            "Supervised fine-tuning alone." if self.sft else made,
            inputs,
            command_line(),
            shown,
        )

    def close(self, trainer: Any) -> float | None:
        """Removes the checkpoints of a finished run unless they are to stay; returns the metric."""
        if trainer.interrupted:
            raise KeyboardInterrupt
        name, file = "validation/bits_per_byte", self.output / "fusechat.json"
        if (
            len(self._data.validation_rows) and trainer.lightning_module.validated_at != trainer.global_step
        ):  # ended in mid-epoch
            trainer.validate(trainer.lightning_module, self._data, verbose=False)
        if not file.exists():  # killed between the last checkpoint and the export
            self._saver.save(trainer, trainer.lightning_module, self.output)
        if trainer.is_global_zero:
            content = json.loads(file.read_text())
            content["metrics"] |= {key: float(value) for key, value in trainer.callback_metrics.items()}
            write_json(file, content)
            self._write_card(self.output, content["metrics"])
            if run := wandb_run(self.cfg, ""):
                inputs = [("distributions", self.pivot_store), *(("aligned", path) for path in self.aligned)]
                log_made(self.cfg, run, ("target", self.output), inputs)
            if not self.cfg.callbacks.keep_checkpoints:
                shutil.rmtree(self.checkpoints, ignore_errors=True)
        value = trainer.callback_metrics.get(name)
        return None if value is None else float(value)

    def _vocab_size(self) -> int:
        from transformers import AutoConfig

        cfg = self.cfg.pivot
        config = AutoConfig.from_pretrained(cfg.path, revision=cfg.revision, trust_remote_code=cfg.trust_remote_code)
        return int(config.get_text_config().vocab_size)


def plan(cfg: DictConfig) -> Training:
    """The run that a config describes."""
    return Training(cfg)
