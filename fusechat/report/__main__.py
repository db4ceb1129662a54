"""Collect an experiment's results into tables, figures and one self-contained page.

python -m fusechat.report experiment=tiny
"""

from __future__ import annotations

import logging
from typing import Any

from omegaconf import DictConfig

from fusechat.app.command import entry, experiment_of, plain
from fusechat.app.labels import labels
from fusechat.app.tracking import log, wandb_run
from fusechat.app.verbs import command_line

LOG = logging.getLogger(__name__)


def run(cfg: DictConfig) -> None:
    """Writes ``report/``: tables, figures and index.html; prints the table and what follows from it."""
    from fusechat.report.page import print_rows, print_table
    from fusechat.report.published import beside
    from fusechat.report.stage import report

    options = {"metric": cfg.report.metric, "baseline": cfg.report.baseline, "labels": plain(cfg.report.labels)}
    options["title"] = " and ".join(options["labels"] or labels(cfg.runs)) if cfg.runs else cfg.experiment_name
    hint = f"python -m fusechat.evaluate {experiment_of(cfg)} model=DIR"
    made = report(cfg.runs or [cfg.paths.experiment], cfg.output_dir, hint=hint, made_by=command_line(), **options)
    print_table(made.table)
    print(made.conclusion)
    if cfg.report.published:
        rows = beside(made.table, cfg.report.published, cfg.seed).to_dict("records")
        print_rows(rows, f"beside those published for seed {cfg.seed}; docs/demo.md says what moves")
    LOG.info("report: %s", made.page)
    _follow(cfg, made)
    if cfg.report.workspace:
        from fusechat.app.workspace import save_views

        experiment = None if cfg.runs else cfg.experiment_name
        for address in save_views(cfg.logger.entity, cfg.logger.project, experiment):
            LOG.info("view: %s", address)


def _follow(cfg: DictConfig, made: Any) -> None:
    if (run := wandb_run(cfg, "report")) is None:
        return
    words = {name: str for name, column in made.table.items() if column.dtype == object}
    table = made.table.astype(words)
    pictures = {f"report/{picture.name}": picture.path for picture in made.pictures}
    log(run, tables={"report/results": ([*table.columns], table.to_numpy().tolist())}, pictures=pictures)


main = entry("report")(run)
if __name__ == "__main__":
    main()
