"""Run all stages of an experiment in order, skipping what is there and fits.

python -m fusechat.pipeline experiment=tiny
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from fusechat.app.children import QUIET, ended, passed_on, run_child
from fusechat.app.command import entry, plain
from fusechat.app.errors import HELD, UserError
from fusechat.app.verbs import module_of, typed
from fusechat.pipeline.configs import Compose, check, composer, models_of
from fusechat.pipeline.plan import planned, tests_of
from fusechat.pipeline.steps import Step, is_sweep, parse

LOG = logging.getLogger(__name__)
UNTESTED = "no evaluation and no report: evaluation.chats=FILE names the chats to test with"


def run(cfg: DictConfig) -> None:
    """Every line of ``pipeline.steps`` is a command with overrides, run as a process of its own.

    So no result depends on what ran before. Commas make a sweep, as on the command line. The pipeline is one process:
    training starts ranks, extraction a process for each device, all else is one process. ``auto`` makes the lines
    (`plan`). Raises `UserError` that names the step where one fails; the step itself has told the cause.
    """
    _alone()
    own, options = passed_on("pipeline")
    compose = composer(own)
    steps = steps_of(cfg, compose)
    check(steps, compose)
    if cfg.pipeline.dry_run:
        from fusechat.pipeline.table import print_plan, rows_of

        folder = Path(cfg.paths.experiment)
        return print_plan(rows_of(steps, compose, folder), folder)
    started = time.perf_counter()
    for number, (verb, overrides) in enumerate(steps, 1):
        sweep = ["-m"] if is_sweep(overrides) else []
        told = f"{typed(verb)} {shlex.join([*sweep, *own, *overrides, *options])}"
        LOG.info("[%d/%d] %s", number, len(steps), told)
        command = [sys.executable, "-m", module_of(verb), *sweep, *own, *overrides, *QUIET, *options]
        if code := run_child(command):
            raise UserError(f"step {number} of {len(steps)} {ended(code)}: {told}", code=code if code == HELD else 1)
    LOG.info("pipeline finished in %.0f s", time.perf_counter() - started)
    return None


def steps_of(cfg: DictConfig, compose: Compose) -> list[Step]:
    """What ``pipeline.steps`` lists, or ``auto`` plans, and ``pipeline.add`` beside it."""
    lines: Any = OmegaConf.to_container(cfg.pipeline, resolve=False)
    if lines["steps"] != "auto":
        return [parse(str(line)) for line in [*lines["steps"], *lines["add"]]]
    values = plain(cfg) | {"pipeline": lines}
    if not tests_of(values):
        LOG.info(UNTESTED)
    return planned(values, lambda step: models_of(step, compose))


def _alone() -> None:
    """Raises `UserError` where a launcher has started several pipelines, which would write over each other."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            f"the pipeline is one process, this is one of WORLD_SIZE={os.environ['WORLD_SIZE']}: start it without "
            "torchrun; trainer.devices and extract.trainer.devices say what training and extraction start"
        )


main = entry("pipeline")(run)
if __name__ == "__main__":
    main()
