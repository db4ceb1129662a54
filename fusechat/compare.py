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
    """Prints second - first with interval and p for every metric both files have; writes CSV where ``output_file`` says so."""
    from fusechat.report.results import compared, markdown, read_result

    for key in ("first", "second"):
        if not cfg[key] or not Path(cfg[key]).is_file():
            raise UserError(
                f"{key}={cfg[key]} is no result file; give one that python -m fusechat.evaluate has written"
            )
    frame = compared(read_result(Path(cfg.first)), read_result(Path(cfg.second)))
    print(markdown(frame))
    if cfg.output_file:
        Path(cfg.output_file).parent.mkdir(parents=True, exist_ok=True)
        frame.to_csv(cfg.output_file, index=False)
        LOG.info("comparison: %s", cfg.output_file)


main = entry("compare")(run)
if __name__ == "__main__":
    main()
