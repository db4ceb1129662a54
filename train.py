"""Fuse: train a target from the pivot's weights on one or several aligned sources.

python train.py experiment=tiny source=a
python train.py -m experiment=tiny source=a,b,c loss.lm_weight=0.5,0.9
"""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from fusechat.app.command import entry, experiment_of, imported, plain, provenance
from fusechat.app.errors import UserError
from fusechat.app.parts import TARGET, own_modules, split
from fusechat.app.ranks import launch
from fusechat.app.tracking import log_made, make_logger, open_run


def run(cfg: DictConfig) -> float | None:
    """config -> objects -> run; returns the validation bits per byte, which searches minimise."""
    from fusechat.fusion import Callbacks, Data, FusionLoss, FusionRule, Optimizer, train
    from fusechat.fusion.checks import check_chats

    rule, experiment, output = FusionRule(**plain(cfg.fusion)), Path(cfg.paths.experiment), Path(cfg.output_dir)
    sources = _sources(cfg) if rule.needs_sources else []
    pivot_store, aligned = experiment / "distributions/pivot", {s: experiment / "aligned" / s for s in sources}
    stage = experiment_of(cfg)
    pivot = {key: value for key, value in plain(cfg.pivot).items() if key not in ("name", "path")}
    (callbacks, own), optimizer = split(plain(cfg.callbacks)), plain(cfg.optimizer)
    targets = [*own.values(), *(part for part in (optimizer, optimizer.get("schedule", "")) if TARGET in part)]
    remedies = [
        f"python -m fusechat.extract {stage} source=pivot",
        *(f"python -m fusechat.align {stage} source={source}" for source in sources),
    ]
    check_chats(pivot_store, plain(cfg.chat), remedies[0])
    value = train(
        cfg.pivot.path,
        pivot_store,
        aligned,
        output,
        rule=rule,
        loss=FusionLoss(**plain(cfg.loss)),
        optimizer=Optimizer.of(optimizer),
        data=Data(**plain(cfg.data)),
        callbacks=Callbacks(**callbacks),
        own_callbacks=own,
        lora=plain(cfg.lora),
        trainer=plain(cfg.trainer),
        **pivot,
        precision_loss=cfg.precision_loss,
        gradient_checkpointing=cfg.gradient_checkpointing,
        max_length=cfg.chat.max_length,
        seed=cfg.seed,
        resume=cfg.ckpt_path,
        overwrite=cfg.overwrite,
        validation=plain(cfg.validation)["path"],
        logger=lambda step: make_logger(cfg, f"{cfg.stage}-{output.name}", step),
        record=provenance(cfg),
        imports=imported(cfg) | own_modules(targets),
        remedies=remedies,
        launch=lambda processes: launch("train", cfg, processes),
    )
    if (tracker := open_run()) is not None:  # in the one process that trained
        inputs = [("distributions", pivot_store), *(("aligned", path) for path in aligned.values())]
        log_made(cfg, tracker, ("target", output), inputs)
    return value


def _sources(cfg: DictConfig) -> list[str]:
    if None in cfg.sources or not cfg.sources:
        raise UserError("no source takes part in the fusion; name one with source=NAME, or set fusion=sft")
    return list(cfg.sources)


main = entry("train")(run)
if __name__ == "__main__":
    main()
