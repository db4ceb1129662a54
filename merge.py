"""Merge: several targets of the pivot's shape -> one model, by VaRM and the methods it is compared with.

python merge.py experiment=tiny
python merge.py merge=varm merge.granularity=matrix pivot.path=DIR 'targets=[DIR,DIR]' output_dir=DIR
"""

from __future__ import annotations

from omegaconf import DictConfig

from fusechat.app.command import entry


def run(cfg: DictConfig) -> None:
    """config -> objects -> run."""
    from fusechat.merging import run as merge_run

    plan = merge_run.plan(cfg)
    if plan.finished:
        return
    if plan.compressing:
        return plan.compress()
    merge = plan.merge()
    if cfg.merge.dry_run:
        plan.show(merge)
    else:
        plan.write(merge)
    return None


main = entry("merge")(run)
if __name__ == "__main__":
    main()
