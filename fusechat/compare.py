"""Compare two result files sample by sample: paired bootstrap per metric and skill.

python -m fusechat.compare first=runs/x/evaluation/targets-a.json second=runs/x/evaluation/merged-varm_matrix.json
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from fusechat.errors import UserError
from fusechat.runtime import entry

LOG = logging.getLogger(__name__)


def run(cfg: DictConfig) -> None:
    """Prints second - first with interval and p for every metric both files have; writes CSV where ``output_file`` says so."""
    from fusechat.evaluation.results import compared, markdown

    frame = compared(read(cfg.first, "first"), read(cfg.second, "second"))
    print(markdown(frame))
    if cfg.output_file:
        Path(cfg.output_file).parent.mkdir(parents=True, exist_ok=True)
        frame.to_csv(cfg.output_file, index=False)
        LOG.info("comparison: %s", cfg.output_file)


def read(path: str | None, key: str) -> dict[str, Any]:
    """A result file of evaluate or judge. Raises `UserError` where it is none."""
    if not path or not Path(path).is_file():
        raise UserError(f"{key}={path} is no result file; give one that python -m fusechat.evaluate has written")
    try:
        content: dict[str, Any] = json.loads(Path(path).read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is half-written; remove it and evaluate again") from error
    if "samples" not in content or "metrics" not in content:
        raise UserError(f"{key}={path} has no samples; give a file that python -m fusechat.evaluate has written")
    return content


main = entry("compare")(run)
if __name__ == "__main__":
    main()
