"""Where runs are followed: CSV files and wandb, and the lineage of what they make. Nothing heavy at import."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from omegaconf import DictConfig

from fusechat.app.columns import columns, seeded, tags
from fusechat.app.errors import UserError
from fusechat.app.outputs import read_json
from fusechat.app.parts import made, split
from fusechat.app.session import plain
from fusechat.app.states import record_of
from fusechat.app.trees import flatten, nested

BEST = "validation/bits_per_byte"  # what searches over trainings minimise
STEP = "trainer/global_step"  # the axis of every curve
ANSWERS = "evaluation/answers"  # the table of an evaluation
MEASURED = ("evaluation/bits_per_byte/all", "evaluation/accuracy/all")
SUMMARIES = {BEST: "min", "validation/loss": "min", "train/tokens_per_second": "max"}
Made = tuple[str, Path]  # kind (distributions, aligned, target, merged) and folder


def make_logger(cfg: DictConfig, name: str, resumed_at: int = 0) -> Any:
    """The Lightning loggers that the ``logger`` group names: CSV and wandb beside it, or none; and the user's own.

    A resumed run has a CSV of its own.
    """
    kind, own = cfg.logger.kind, split(plain(cfg.logger))[1]
    found = [_wandb_logger(cfg, name)] if kind == "wandb" else []
    if kind != "none":
        from lightning.pytorch.loggers import CSVLogger

        found.append(CSVLogger(cfg.paths.logs, name=name, version=f"from_step_{resumed_at}"))
    others = [*found[kind == "wandb" :], *made("logger", own)]
    for logger in others:
        logger.log_hyperparams(columns(flatten(plain(cfg))))
    return [*found[: kind == "wandb"], *others] or False


def _wandb_logger(cfg: DictConfig, name: str) -> Any:
    """group = experiment with its seed, job_type = stage, the keys that decide the job as columns.

    Sections are nested, as wandb's own groups and filters expect: they find no key with a dot in its name.
    """
    if not cfg.logger.offline:
        check_account()
    from lightning.pytorch.loggers import WandbLogger

    os.environ.setdefault("WANDB_SILENT", "true")
    Path(cfg.paths.logs).mkdir(parents=True, exist_ok=True)
    values = flatten(plain(cfg))
    config: Any = nested(columns(values))
    wandb = WandbLogger(
        name=seeded(name, values),
        project=cfg.logger.project,
        entity=cfg.logger.entity,
        save_dir=cfg.paths.logs,
        offline=cfg.logger.offline,
        group=seeded(cfg.experiment_name, values),
        job_type=cfg.stage,
        tags=tags(values),
        config=config,
    )
    wandb._wandb_init.pop("anonymous", None)  # given as None, wandb warns of it
    for metric, best in SUMMARIES.items():
        wandb.experiment.define_metric(metric, step_metric=STEP, summary=best)
    return wandb


def check_account() -> None:
    """Raises `UserError` where there is no wandb account to log to."""
    if not (os.environ.get("WANDB_API_KEY") or _netrc_has_wandb()):
        raise UserError(
            "logger=wandb needs an account: run 'wandb login', set WANDB_API_KEY, or use logger=wandb_offline"
        )


def wandb_run(cfg: DictConfig, name: str) -> Any:
    """The run that is open, or a new one; None where the ``logger`` group names another logger."""
    if cfg.logger.kind != "wandb":
        return None
    import wandb

    return wandb.run or _wandb_logger(cfg, name).experiment


def open_run() -> Any:
    """The wandb run that is open in this process, or None."""
    wandb = sys.modules.get("wandb")
    return wandb.run if wandb is not None else None


def log(
    run: Any,
    values: Mapping[str, Any] = MappingProxyType({}),
    *,
    tables: Mapping[str, tuple[Sequence[str], Sequence[Sequence[Any]]]] = MappingProxyType({}),
    pictures: Mapping[str, Path] = MappingProxyType({}),
) -> None:
    """One step of a wandb run: numbers, tables by their columns and rows, pictures by their files."""
    import wandb

    shown = {name: wandb.Table(columns=list(columns), data=list(rows)) for name, (columns, rows) in tables.items()}
    run.log({**values, **shown, **{name: wandb.Image(str(file)) for name, file in pictures.items()}})


def log_made(cfg: DictConfig, run: Any, made: Made | None, inputs: Sequence[Made]) -> None:
    """Lineage in wandb: the run used ``inputs`` and made ``made``; by reference, or uploaded with logger.upload=true.

    wandb cannot note a use while offline; the inputs' fingerprints are in the artifact's metadata in any case.
    """
    used = {f"{kind}-{path.name}": _fingerprint(path) for kind, path in inputs}
    if not run.offline:
        for entry in inputs:
            run.use_artifact(_artifact(entry, {}, upload=False))
    if made is not None:
        run.log_artifact(_artifact(made, used, cfg.logger.upload))


def _artifact(made: Made, inputs: dict[str, str | None], upload: bool) -> Any:
    import wandb

    kind, path = made
    artifact = wandb.Artifact(
        f"{kind}-{path.name}", type=kind, metadata={"fingerprint": _fingerprint(path), "inputs": inputs}
    )
    if upload:
        artifact.add_dir(str(path))
    else:
        artifact.add_reference(f"file://{path.resolve()}", checksum=False)
    return artifact


def _fingerprint(path: Path) -> str | None:
    record = record_of(path)
    return None if record is None else str(read_json(record)["fingerprint"])


def _netrc_has_wandb() -> bool:
    file = Path.home() / ".netrc"
    return file.exists() and "wandb" in file.read_text()
