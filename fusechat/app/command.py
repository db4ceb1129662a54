"""What every entry shares: the command line, and errors for people. Nothing heavy at import."""

from __future__ import annotations

import functools
import logging
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fusechat.app import registry, session
from fusechat.app.errors import UserError
from fusechat.app.hints import config_folders, experiment_of, with_near_names
from fusechat.app.session import imported, plain, provenance
from fusechat.app.trainer import quiet_trainer, seed_everything

__all__ = ["entry", "experiment_of", "imported", "label", "make_trainer", "plain", "provenance", "seed_everything"]

CONF = str(registry.CONF)
LOG = logging.getLogger("fusechat")
Run = Callable[[DictConfig], Any]
NO_JOBS = "error: the sweep has no jobs: one of its choices is empty; see the overrides with commas or range()"
FAILED = "FUSECHAT_FAILED"  # names a file of jobs begun and failed, shared with the processes of a sweep


def label(path: str | None) -> str:
    """A short name for a model: its folder and the one above, or the Hub id, joined by a dash."""
    return "-".join(Path(path).parts[-2:]) if path else "none"


OmegaConf.register_new_resolver("label", label, replace=True)
OmegaConf.register_new_resolver("stem", lambda path: Path(path).stem, replace=True)
OmegaConf.register_new_resolver("basename", lambda path: Path(path or "target").name, replace=True)


def entry(config_name: str) -> Callable[[Run], Callable[[], None]]:
    """Makes ``run(cfg)`` a command: ``main()`` composes the config, runs each job, and prints a mistake as one line."""

    def wrap(run: Run) -> Callable[[], None]:
        @functools.wraps(run)
        def job(cfg: DictConfig) -> Any:
            _note("")
            try:
                return run_stage(run, cfg)
            except Exception as error:
                overrides = " ".join(HydraConfig.get().overrides.task)
                _note(overrides or "(no overrides)")
                if isinstance(error, UserError):
                    LOG.error("%s%s", error, f"  [{overrides}]" if overrides else "")
                raise

        command = hydra.main(config_path=CONF, config_name=config_name, version_base="1.3")(job)
        return lambda: _command(command)

    return wrap


def _command(command: Callable[[], None]) -> None:
    traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # hydra then lets exceptions through, to be told here
    with tempfile.NamedTemporaryFile("r", prefix="fusechat-failed-") as noted:
        os.environ[FAILED] = noted.name
        try:
            command()
        except KeyboardInterrupt:
            print("interrupted; the same command goes on from what is whole", file=sys.stderr)
            sys.exit(130)
        except (UserError, HydraException, OmegaConfBaseException) as error:
            if traceback:
                raise
            failed = [line for line in noted.read().splitlines() if line]
            if not (failed and isinstance(error, UserError)):
                print(f"error: {with_near_names(error)}", file=sys.stderr)
        else:
            lines = noted.read().splitlines()
            failed = [line for line in lines if line]
            if (
                (lines and not failed)
                or not {"-m", "--multirun"} & set(sys.argv)
                or {"--cfg", "-c", "--help", "--info", "-i"} & set(sys.argv)
            ):
                return
            if not lines:
                print(NO_JOBS, file=sys.stderr)
        if failed:
            print(f"{len(failed)} job(s) failed: " + "; ".join(failed), file=sys.stderr)
    sys.exit(1)


def _note(line: str) -> None:
    """A job has begun (an empty line) or failed (its overrides)."""
    with open(os.environ.get(FAILED, os.devnull), "a") as file:
        file.write(line + "\n")


def run_stage(run: Run, cfg: DictConfig) -> Any:
    """Runs one stage inside its session; the user's own modules are imported and the families' choices checked first.

    Every process that runs a job comes through here: a sweep's, a rank's, a pipeline's step.
    """
    imports = imported(cfg)
    named = {key: OmegaConf.select(cfg, key) for key in registry.GROUPS}
    registry.check_choices(named, folders=config_folders(), open=bool(imports))
    with session.session():
        return run(cfg)


def make_trainer(cfg: DictConfig, callbacks: list[Any], logger: Any = False, **overrides: Any) -> Any:
    """A quiet Trainer from the config's ``trainer`` group; every key there is one of Trainer's own."""
    return quiet_trainer({**plain(cfg.trainer), **overrides}, callbacks, logger)
