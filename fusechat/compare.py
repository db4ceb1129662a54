"""Compare two result files sample by sample: paired bootstrap per metric and skill.

python -m fusechat.compare first=runs/x/evaluation/targets-a.json second=runs/x/evaluation/merged-varm_matrix.json
"""

from __future__ import annotations

import logging
from pathlib import Path

from omegaconf import DictConfig

from fusechat.app.command import entry
from fusechat.app.errors import UserError

LOG = logging.getLogger(__name__)


def run(cfg: DictConfig) -> None:
    """Prints second - first with interval and p for every metric both files have; CSV where ``output_file`` says so."""
    from fusechat.report.results import markdown
    from fusechat.report.stage import compare

    for key in ("first", "second"):
        if not cfg[key] or not Path(cfg[key]).is_file():
            hint = "give one that python -m fusechat.evaluate has written"
            raise UserError(f"{key}={cfg[key]} is no result file; {hint}")
    print(markdown(compare(cfg.first, cfg.second, cfg.output_file)))
    if cfg.output_file:
        LOG.info("comparison: %s", cfg.output_file)


main = entry("compare")(run)
if __name__ == "__main__":
    main()
