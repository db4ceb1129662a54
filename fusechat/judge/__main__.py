"""Judge answer files with a language model behind an OpenAI-compatible endpoint.

python -m fusechat.judge answers=FILE questions=FILE judge.base_url=http://localhost:8000/v1 judge.model=NAME
"""

from __future__ import annotations

import logging
import os

from omegaconf import DictConfig

from fusechat.app.command import entry, plain, provenance

LOG = logging.getLogger(__name__)


def run(cfg: DictConfig) -> float:
    """Writes ``output_file``: mean grade (or win rate) per category, its spread over repeats. Returns the mean."""
    from fusechat.judge.stage import judge

    options = {key: value for key, value in plain(cfg.judge).items() if key not in ("key_env", "suffix")}
    files = {"questions": cfg.questions, "baseline": cfg.baseline}
    key, record = os.environ.get(cfg.judge.key_env), provenance(cfg)
    result = judge(cfg.answers, cfg.output_file, key=key, overwrite=cfg.overwrite, record=record, **files, **options)
    name, entries = next(iter(result["metrics"].items()))
    value, answers = float(entries["all"]["value"]), len(result["samples"])
    told = "%s: %s %.3f over %d answers, spread %.3f over %d repeats; %s"
    LOG.info(told, cfg.answers, name, value, answers, result["spread"], cfg.judge.repeats, cfg.output_file)
    return value


main = entry("judge")(run)
if __name__ == "__main__":
    main()
