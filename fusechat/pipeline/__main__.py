"""Run all stages of an experiment in order, skipping what is there and fits.

python -m fusechat.pipeline experiment=tiny
"""

from __future__ import annotations

import importlib
import logging
import shlex
import time
from typing import Any

from omegaconf import DictConfig, OmegaConf

from fusechat.app.command import entry, run_stage
from fusechat.app.errors import UserError

LOG = logging.getLogger(__name__)
STEPS = ("extract", "align", "evaluate", "report", "judge", "publish", "tiny")
ENTRIES = {name: f"fusechat.{name}.__main__" for name in STEPS} | {
    "compare": "fusechat.compare",
    "merge_search": "fusechat.merge_search",
    "train": "train",
    "merge": "merge",
}


def run(cfg: DictConfig) -> None:
    """Every step of ``pipeline.steps`` is an entry with overrides; commas make a sweep, as on the command line."""
    from hydra.core.hydra_config import HydraConfig

    own = [o for o in HydraConfig.get().overrides.task if not o.lstrip("+~").startswith("pipeline")]
    steps = OmegaConf.to_container(cfg.pipeline.steps, resolve=False)
    commands = [command for step in steps for command in expand(str(step))]  # type: ignore[union-attr]
    started = time.perf_counter()
    for number, (name, overrides) in enumerate(commands, 1):
        LOG.info("[%d/%d] %s %s", number, len(commands), name, " ".join(overrides))
        run_step(name, [*own, *overrides])
    LOG.info("pipeline finished in %.0f s", time.perf_counter() - started)


def run_step(name: str, overrides: list[str]) -> Any:
    """Composes the stage's config as its own command would, and runs it."""
    from hydra import compose

    if name not in ENTRIES:
        raise UserError(f"pipeline.steps: {name!r} is no stage; use one of: {', '.join(sorted(ENTRIES))}")
    module = importlib.import_module(ENTRIES[name])
    return run_stage(module.run, compose(name, overrides))


def expand(step: str) -> list[tuple[str, list[str]]]:
    """``train source=a,b seed=1`` -> one command per combination, in the order of a grid sweep."""
    from itertools import product

    from hydra.core.override_parser.overrides_parser import OverridesParser

    name, *overrides = shlex.split(step)
    parser = OverridesParser.create()
    choices = []
    for override, text in zip(parser.parse_overrides(overrides), overrides, strict=True):
        if override.is_sweep_override():
            key = override.get_key_element()
            choices.append(
                [f"{key}={value}".replace("\\{", "{").replace("\\}", "}") for value in override.sweep_string_iterator()]
            )
        else:
            choices.append([text])
    return [(name, list(combination)) for combination in product(*choices)]


main = entry("pipeline")(run)
if __name__ == "__main__":
    main()
