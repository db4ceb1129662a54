"""Collect an experiment's results into tables, figures and one self-contained page.

python -m fusechat.report experiment=tiny
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from fusechat.app.command import entry, experiment_of
from fusechat.app.errors import UserError
from fusechat.app.tracking import wandb_run

LOG = logging.getLogger(__name__)


def run(cfg: DictConfig) -> None:
    """Writes ``report/``: results.csv, results.md, comparisons.csv, PNGs and index.html; prints the table."""
    from fusechat.report import results
    from fusechat.report.page import figures_of, page, print_table

    folders = [Path(folder) for folder in (cfg.runs or [cfg.paths.experiment])]
    rows = results.collect(folders)
    if not rows:
        raise UserError(
            f"{folders[0]} holds no evaluations; make one with: python -m fusechat.evaluate {experiment_of(cfg)} model=DIR"
        )
    rows = results.ordered(rows, cfg.report.metric)
    output = Path(cfg.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    table = results.table(rows)
    comparisons = results.comparisons(rows, cfg.report.baseline, cfg.report.metric)
    table.to_csv(output / "results.csv", index=False)
    comparisons.to_csv(output / "comparisons.csv", index=False)
    (output / "results.md").write_text(results.markdown(table))
    pictures = figures_of(folders, rows, output)
    (output / "index.html").write_text(page(cfg.experiment_name, table, comparisons, pictures), encoding="utf-8")
    print_table(table)
    LOG.info("report: %s", output / "index.html")
    _log(cfg, table, pictures)


def _log(cfg: DictConfig, table: Any, pictures: list[tuple[str, Path]]) -> None:
    run = wandb_run(cfg, "report")
    if run is None:
        return
    import wandb

    words = {name: str for name, column in table.items() if column.dtype == object}
    figures = {f"report/{path.stem}": wandb.Image(str(path)) for _, path in pictures}
    run.log({"report/results": wandb.Table(dataframe=table.astype(words)), **figures})


main = entry("report")(run)
if __name__ == "__main__":
    main()
