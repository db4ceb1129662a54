"""What every entry shares: the command line, and errors for people. Nothing heavy at import."""

from __future__ import annotations

import functools
import json
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fusechat.app import checksums, disk, ending, failures, help, registry, remembered, session, streams
from fusechat.app.errors import HELD, UserError
from fusechat.app.hints import config_folders, experiment_of, is_typed, task_overrides, with_near_names
from fusechat.app.labels import report_place
from fusechat.app.locks import waiting
from fusechat.app.naming import SWEPT, label, named, swept
from fusechat.app.session import imported, plain, provenance
from fusechat.app.trainer import quiet_trainer, seed_everything
from fusechat.app.verbs import as_typed, command_line, plainly

__all__ = ["entry", "experiment_of", "imported", "label", "make_trainer", "plain", "provenance", "seed_everything"]

CONF = str(registry.CONF)
LOG = logging.getLogger("fusechat")
Run = Callable[[DictConfig], Any]
NO_JOBS = "error: the sweep has no jobs: one of its choices is empty; see the overrides with commas or range()"
UNREADABLE = 2  # exit code where Hydra cannot parse or compose
FAILED = "FUSECHAT_FAILED"  # of a sweep: names the file of its jobs begun and failed, in whatever process
TRACEBACK = "FUSECHAT_TRACEBACK"  # HYDRA_FULL_ERROR as it was given
PARENT = "FUSECHAT_PARENT"  # the process id of the pipeline that a command is a step of
MULTIRUN = {"-m", "--multirun"}
_noted: list[dict[str, Any]] = []  # jobs begun and failed in this process
WITHOUT_JOBS = {"--cfg", "-c", "--hydra-help", "--info", "-i"}  # flags that look and run nothing


OmegaConf.register_new_resolver("label", label, replace=True)
OmegaConf.register_new_resolver("named", named, replace=True)
OmegaConf.register_new_resolver("stem", lambda path: Path(path).stem, replace=True)
OmegaConf.register_new_resolver("report_place", report_place, replace=True)
OmegaConf.register_new_resolver("recipe_name", lambda file, name: Path(file).stem if file else name, replace=True)
OmegaConf.register_new_resolver("basename", lambda path: Path(path or "target").name, replace=True)
OmegaConf.register_new_resolver("case", lambda key, cases, otherwise: cases.get(key, otherwise), replace=True)


def entry(config_name: str) -> Callable[[Run], Callable[[], None]]:
    """Makes ``run(cfg)`` a command: ``main()`` composes the config, runs each job, and prints a mistake as one line."""

    def wrap(run: Run) -> Callable[[], None]:
        @functools.wraps(run)
        def job(cfg: DictConfig) -> Any:
            _note()
            session.log_to_stderr()
            several = HydraConfig.get().mode == RunMode.MULTIRUN
            try:
                with _environment(HYDRA_FULL_ERROR=os.environ.get(TRACEBACK, "0")):  # as given, for child processes
                    return run_stage(run, cfg)
            except Exception as error:
                ending.check_ended()
                overrides = " ".join(task_overrides()) or "(no overrides)"
                readable = isinstance(error, UserError) or is_typed(error)
                code = getattr(error, "code", UNREADABLE if readable else 1)
                _note(job=overrides, code=code, cause=_one_line(error))
                if code not in (HELD, UNREADABLE):  # of what cannot be read nobody knows the output
                    failures.note(cfg, _one_line(error), command_line())
                if not readable:
                    raise
                LOG.error("%s%s", _one_line(error), f"  [{overrides}]" if several else "")
                if several or os.environ.get(TRACEBACK) == "1":
                    raise
                return None  # hydra has nothing to add

        command = hydra.main(config_path=CONF, config_name=config_name, version_base="1.3")(job)

        def main() -> None:
            plainly(lambda: help.main(config_name) if help.wanted(sys.argv[1:]) else _command(command))

        return main

    return wrap


def _command(command: Callable[[], None]) -> None:
    """Runs a command of Hydra's and tells its mistakes; exits with 0, or as docs/safety.md lists it."""
    _end_with_parent()
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda text: text not in MULTIRUN)  # argparse wants it before overrides
    asked = os.environ.get("HYDRA_FULL_ERROR", "0")
    _noted.clear()
    several = bool(MULTIRUN & set(sys.argv)) and not WITHOUT_JOBS & set(sys.argv)
    with _notes() if several else nullcontext("") as notes:
        # with full errors hydra lets exceptions through, to be told here
        shared = {"HYDRA_FULL_ERROR": "1", TRACEBACK: asked, FAILED: notes, SWEPT: json.dumps(swept(sys.argv[1:]))}
        with _environment(**shared):
            mistake = _mistake(command, traceback=asked == "1")
        jobs = [json.loads(line) for line in Path(notes).read_text().splitlines()] if notes else [*_noted]
    failed = [job for job in jobs if job]
    if mistake and not (
        failed and isinstance(mistake, (UserError, OmegaConfBaseException))
    ):  # a job's own mistake is logged already
        print(f"error: {_one_line(mistake)}", file=sys.stderr)
    elif several and not jobs:
        print(NO_JOBS, file=sys.stderr)
    if several and failed:
        told = "".join(f"\n  {job['job']}: {job['cause']}" for job in failed)
        print(f"{len(failed)} job(s) failed:{told}", file=sys.stderr)
    if codes := {job["code"] for job in failed}:
        sys.exit(min(codes))
    if mistake or (several and not jobs):
        sys.exit(getattr(mistake, "code", UNREADABLE))


def _one_line(error: BaseException) -> str:
    """What an exception says, as one line; its kind before it where it is no message to people."""
    if is_typed(error):
        return " ".join(as_typed(with_near_names(error)).split())
    text = " ".join(str(error).split())
    return as_typed(text) if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def _mistake(command: Callable[[], None], traceback: bool) -> Exception | None:
    """What a person got wrong, or nothing; errors of ours, and all where a traceback was asked for, go through."""
    try:
        command()
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # ours are of the last kind
        ending.check_ended()
        if traceback or not (isinstance(error, UserError) or is_typed(error)):
            raise
        return error
    except OSError as error:  # Hydra's, which makes a folder for the job's config before that begins
        ending.check_ended()
        if traceback or _noted or not error.filename:
            raise
        told = f"{error.filename} cannot be made ({error.strerror}), where a job's config is kept"
        return UserError(f"{told}; give another place with paths.root=DIR")
    return None


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Environment variables for the time of a block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _end_with_parent() -> None:
    """A step ends when its pipeline is gone, also where that was killed: Linux sends SIGTERM then."""
    parent = os.environ.pop(PARENT, None)
    if parent is None or sys.platform != "linux":
        return
    import ctypes

    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
    if os.getppid() != int(parent):  # gone before the call above
        sys.exit(1)


@contextmanager
def _notes() -> Iterator[str]:
    """A file of jobs begun and failed, for the time of a sweep."""
    with tempfile.NamedTemporaryFile(prefix="fusechat-failed-") as file:
        ending.to_undo.append(lambda: os.unlink(file.name))
        yield file.name


def _note(**failed: Any) -> None:
    """A job has begun (nothing given) or failed: its overrides, exit code and cause."""
    _noted.append(failed)
    if notes := os.environ.get(FAILED):
        with open(notes, "a", encoding="utf-8") as file:
            file.write(json.dumps(failed) + "\n")


def run_stage(run: Run, cfg: DictConfig) -> Any:
    """Runs one stage inside its session; the user's own modules are imported and the whole config checked first.

    Every process that runs a job comes through here: a sweep's, a rank's, a pipeline's step.
    """
    from fusechat.app import door

    values = door.check_config(cfg, config_folders())
    imported(cfg)
    door.check_surroundings(values)
    remembered.verify(cfg.get("verify", "always"))
    checksums.accept_changes(bool(cfg.get("accept_changes")))
    with session.session(), waiting(bool(cfg.get("wait"))), disk.told(), streams.read():
        return run(cfg)


def make_trainer(cfg: DictConfig, callbacks: list[Any], logger: Any = False, **overrides: Any) -> Any:
    """A quiet Trainer from the config's ``trainer`` group; every key there is one of Trainer's own."""
    return quiet_trainer({**plain(cfg.trainer), **overrides}, callbacks, logger)
