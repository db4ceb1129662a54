"""Fuse: train a target from the pivot's weights on one or several aligned sources.

python train.py experiment=tiny source=a
python train.py -m experiment=tiny source=a,b,c loss.lm_weight=0.5,0.9
"""

from __future__ import annotations

from omegaconf import DictConfig

from fusechat.app.command import entry


def run(cfg: DictConfig) -> float | None:
    """config -> objects -> run; returns the validation bits per byte, which searches minimise."""
    from fusechat.fusion import run as training

    plan = training.plan(cfg)
    if plan.finished:
        return plan.metric
    data, module = plan.data(), plan.module()
    trainer = plan.trainer()
    trainer.fit(module, datamodule=data, ckpt_path=plan.checkpoint)
    return plan.close(trainer)


main = entry("train")(run)
if __name__ == "__main__":
    main()
