"""What merge.py puts together: inputs, fingerprint, disk check, the whole directory with card, record and heatmap."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

from omegaconf import DictConfig

from fusechat.app.command import experiment_of, plain, provenance
from fusechat.app.errors import UserError, one_of
from fusechat.app.outputs import fingerprint, whole_directory
from fusechat.app.tracking import log_made, wandb_run
from fusechat.merging.delta import compress, open_checkpoint
from fusechat.merging.stream import NAMES, Merge, check_shapes, copy_companions, describe
from fusechat.models import load as models
from fusechat.models.cards import command_line, write_card
from fusechat.models.checkpoints import LazyCheckpoint

LOG = logging.getLogger(__name__)
COMMON = {"name", "method", "weights", "patterns", "dtype", "max_shard_size", "dry_run"}


class MergeRun:
    """One merge as its config describes it."""

    def __init__(self, cfg: DictConfig) -> None:
        self.cfg, self.output, self.options = cfg, Path(cfg.output_dir), plain(cfg.merge)
        one_of(cfg.merge.method, (*NAMES, "compress"), "merge.method")
        self.compressing = cfg.merge.method == "compress"
        if self.compressing and not cfg.target:
            raise UserError("merge=compress needs the target to store: add target=DIR")
        self.pivot, self.targets = (
            Path(cfg.pivot.path),
            [Path(p) for p in ([cfg.target] if self.compressing else cfg.targets)],
        )
        for path in self.targets:
            if not path.is_dir():
                raise UserError(
                    f"the target {path} does not exist; make it with: python train.py {experiment_of(cfg)} source={path.name}"
                )
            if self.output.resolve() == path.resolve() or path.resolve() in self.output.resolve().parents:
                raise UserError(f"output_dir={self.output} lies inside the input {path}; choose another")
        if not self.pivot.is_dir():
            raise UserError(
                f"pivot.path={self.pivot} is no directory; merging reads local checkpoints: download it with `hf download`"
            )
        settings = {k: v for k, v in self.options.items() if k not in ("dry_run", "name")}
        self.hashes = {str(path): models.model_identity(str(path)) for path in (self.pivot, *self.targets)}
        self.mark = fingerprint(merge=settings, inputs=list(self.hashes.values()), seed=cfg.seed)

    @property
    def finished(self) -> bool:
        """Whether the merged model is there. Raises `UserError` where other settings made it."""
        file = self.output / "fusechat.json"
        if self.cfg.merge.dry_run or self.cfg.overwrite or not file.exists():
            return False
        held = json.loads(file.read_text()).get("fingerprint")
        if held != self.mark:
            raise UserError(
                f"{self.output} holds another model (fingerprint {held}, now {self.mark}); add overwrite=true, or choose another output_dir"
            )
        LOG.info("skip: %s is merged already (fingerprint %s)", self.output, self.mark)
        return True

    def merge(self) -> Merge:
        """Opens the checkpoints, checks that they belong together, and measures the change where the method needs it."""
        settings = {k: v for k, v in self.options.items() if k not in COMMON}
        pivot = LazyCheckpoint(self.pivot)
        merge = Merge(
            pivot,
            [open_checkpoint(path, pivot) for path in self.targets],
            self.options["method"],
            settings,
            weights=self.options["weights"],
            patterns=self.options["patterns"],
            dtype=self.options["dtype"],
            seed=self.cfg.seed,
        )
        if merge.method == "varm":
            merge.measure(self.hashes)
        return merge

    def compress(self) -> None:
        """Stores the target as pivot + compressed delta."""
        pivot, target = LazyCheckpoint(self.pivot), LazyCheckpoint(self.targets[0])
        check_shapes(pivot, [target], [{}])
        with whole_directory(self.output, self.cfg.overwrite) as directory:
            copy_companions(self.targets[0], directory, None)
            measured = compress(pivot, target, directory, self.options["ratio"])
            record = {
                "fingerprint": self.mark,
                "stage": "compress",
                "name": self.output.name,
                "inputs": self.hashes,
                "measured": measured,
            }
            (directory / "fusechat.json").write_text(
                json.dumps(record | provenance(self.cfg), indent=1, default=str) + "\n"
            )
        share = measured["bytes"] / measured["target_bytes"]
        LOG.info(
            "%s: %.1f MB, %.1f %% of the target; relative error of the deltas %.3f",
            self.output,
            measured["bytes"] / 1e6,
            100 * share,
            measured["relative_error"],
        )

    def show(self, merge: Merge) -> None:
        """Prints the plan."""
        print(describe(merge, self.options["max_shard_size"]))

    def write(self, merge: Merge) -> None:
        """Writes the merged model, whole or not at all."""
        self._check_room(merge)
        with whole_directory(self.output, self.cfg.overwrite) as directory:
            copy_companions(self.pivot, directory, self.options["dtype"])
            merge.write(directory, self.options["max_shard_size"])
            record = {
                "fingerprint": self.mark,
                "stage": "merge",
                "name": self.output.name,
                "method": merge.method,
                "inputs": self.hashes,
                "targets": [path.name for path in self.targets],
                "weights": merge.groups,
                **provenance(self.cfg),
            }
            (directory / "fusechat.json").write_text(json.dumps(record, indent=1, default=str) + "\n")
            inputs = {"pivot": str(self.pivot)} | {f"target {n + 1}": str(path) for n, path in enumerate(self.targets)}
            write_card(directory, self.output.name, f"Merged by {merge.method}.", inputs, command_line())
            if merge.groups:
                from fusechat.report.figures import weight_heatmap

                weight_heatmap(merge.groups, [path.name for path in self.targets], directory / "merge_weights.png")
        LOG.info("merged %d targets by %s into %s", len(self.targets), merge.method, self.output)
        self._log(merge, self.output / "merge_weights.png")

    def _log(self, merge: Merge, heatmap: Path) -> None:
        run = wandb_run(self.cfg, f"merge-{self.output.name}")
        if run is None:
            return
        if merge.groups:
            import wandb

            rows = [
                [group, *(weights or [float("nan")] * len(self.targets))] for group, weights in merge.groups.items()
            ]
            table = wandb.Table(columns=["group", *(path.name for path in self.targets)], data=rows)
            run.log({"merge/weights": table, "merge/heatmap": wandb.Image(str(heatmap))})
        log_made(self.cfg, run, ("merged", self.output), [("target", path) for path in self.targets])

    def _check_room(self, merge: Merge) -> None:
        import torch

        need = sum(int(torch.Size(shape).numel()) * dtype.itemsize for shape, dtype in merge.plan.values())
        self.output.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.output.parent).free
        if need > free:
            raise UserError(
                f"{self.output.parent} has {free / 1e9:.2f} GB free, the merged model needs {need / 1e9:.2f} GB; choose another output_dir"
            )


def plan(cfg: DictConfig) -> MergeRun:
    """The merge that a config describes."""
    return MergeRun(cfg)
