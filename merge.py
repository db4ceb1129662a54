"""Merge: several targets of the pivot's shape -> one model, by VaRM and the methods it is compared with.

python merge.py experiment=tiny
python merge.py merge=varm merge.granularity=matrix pivot.path=DIR 'targets=[DIR,DIR]' output_dir=DIR
python merge.py merge.recipe=FILE output_dir=DIR
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from omegaconf import DictConfig

from fusechat.app.command import entry, experiment_of, imported, plain, provenance

if TYPE_CHECKING:
    from fusechat.merging.recipe import Recipe
    from fusechat.merging.run import Merged


def run(cfg: DictConfig) -> None:
    """config -> objects -> run."""
    from fusechat.merging.recipe import Recipe
    from fusechat.merging.run import make

    inputs = {"pivot": cfg.pivot.get("path"), "targets": plain(cfg.targets), "target": cfg.target}
    train = f"python train.py {experiment_of(cfg)}"
    recipe = Recipe.of(plain(cfg.merge), **inputs, seed=cfg.seed, imports=imported(cfg), made_by=train)
    merged = make(recipe, cfg.output_dir, overwrite=cfg.overwrite, dry_run=cfg.merge.dry_run, record=provenance(cfg))
    if merged.description:
        print(merged.description)
    if merged.made and not recipe.storing:
        follow(cfg, recipe, merged)


def follow(cfg: DictConfig, recipe: Recipe, merged: Merged) -> None:
    """The weights that were measured, as table and picture, and the lineage, to wandb."""
    from fusechat.app.tracking import log, log_made, wandb_run
    from fusechat.merging.folder import HEATMAP
    from fusechat.models.hub import called

    run = wandb_run(cfg, f"merge-{merged.path.name}")
    if run is None:
        return
    if merged.groups:
        names = [called(path) for path in recipe.target_paths]
        rows = [[group, *(weights or [float("nan")] * len(names))] for group, weights in merged.groups.items()]
        table = {"merge/weights": (["group", *names], rows)}
        log(run, tables=table, pictures={"merge/heatmap": merged.path / HEATMAP})
    log_made(cfg, run, ("merged", merged.path), [("target", path) for path in recipe.target_paths])


main = entry("merge")(run)
if __name__ == "__main__":
    main()
