"""Several processes for one stage: started here as a group that ends together, or by torchrun, SLURM or MPI.

`launch` starts a group for every job, also of a sweep, whose own process stays free of ranks, ports and process groups.
``python -m fusechat.app.ranks FILE`` is what each of its processes runs.
"""

from __future__ import annotations

import json
import logging
import logging.config
import os
import signal
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusechat.app.ending import WHOLE, Ended, with_care
from fusechat.app.errors import UserError
from fusechat.app.rank import rank
from fusechat.app.session import log_to_stderr
from fusechat.app.threads import count

if TYPE_CHECKING:
    from torch.distributed.launcher.api import LaunchConfig

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)  # that a group passes on while it runs
KEPT = "kept"  # beside a job's file: what the first rank says is kept, when a signal has ended it
GRACE = 30  # seconds that the others have to end by themselves when one has failed


def launch(verb: str, cfg: Any, processes: int) -> None:
    """Runs a stage with this config in so many processes on this machine, which are its ranks; returns when all ended.

    When one fails the others are ended. Raises `UserError` with what the first of them said that failed.
    """
    assert "TORCHELASTIC_RUN_ID" not in os.environ, "a rank starts no ranks"
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    for name in [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed")]:
        logging.getLogger(name).setLevel(logging.CRITICAL)  # it would show every rank's traceback once more
    with tempfile.TemporaryDirectory(prefix="fusechat-ranks-") as folder, _as_before():
        job = Path(folder, "job.json")
        job.write_text(json.dumps({"verb": verb, "config": _resolved(cfg), "logging": _logging()}))
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, count() // processes)))
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # every rank warns of what it was told to do
        try:
            elastic_launch(_group(processes, folder), sys.executable)("-m", "fusechat.app.ranks", str(job))
        except ChildFailedError as error:
            _, failure = error.get_first_failure()
            raise UserError(_said(failure)) from error
        except SignalException as error:
            kept = job.with_name(KEPT)
            raise Ended(error.sigval, kept.read_text() if kept.exists() else WHOLE) from error


def _group(processes: int, logs: str) -> LaunchConfig:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig

    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=logs),
        shutdown_timeout=GRACE,
    )


@contextmanager
def _as_before() -> Iterator[None]:
    """What the launcher changes in this process, environment and signal handlers, is as it was after the block."""
    environment, main_thread = dict(os.environ), threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in SIGNALS if main_thread}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.environ.clear()
        os.environ.update(environment)


def _said(failure: Any) -> str:
    """What a rank said that failed; its traceback, where it is no user's mistake, is in its own lines."""
    message = failure.message.get("message", "") if isinstance(failure.message, dict) else str(failure.message)
    kind, _, rest = message.partition(": ")
    if kind == UserError.__name__:
        return rest
    if failure.exitcode < 0:
        return f"rank {failure.global_rank} was ended by signal {-failure.exitcode} ({failure.signal_name()})"
    return f"rank {failure.global_rank} failed: {message or f'exit code {failure.exitcode}'}"


def _resolved(cfg: Any) -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(cfg, resolve=True)


def _logging() -> Any:
    """How this process logs, for its ranks to do likewise."""
    from hydra.core.hydra_config import HydraConfig

    return _resolved(HydraConfig.get().job_logging) if HydraConfig.initialized() else None


def _main(job: str) -> None:
    """One rank: the job's verb runs with its config; the first one logs as the command does."""
    from torch.distributed.elastic.multiprocessing.errors import record

    with_care()
    content = json.loads(Path(job).read_text())
    if content["logging"]:
        logging.config.dictConfig(content["logging"])
        log_to_stderr()
    if rank():
        logging.getLogger().setLevel(logging.WARNING)
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # transformers heeds it too
    try:
        record(lambda: _run(content["verb"], content["config"]))()
    except UserError:  # recorded, for the process that started this one
        sys.exit(1)
    except Ended as ended:
        if not rank():
            Path(job).with_name(KEPT).write_text(ended.kept)
        raise


def _run(verb: str, config: Any) -> None:
    import importlib

    from omegaconf import OmegaConf

    from fusechat.app.command import run_stage
    from fusechat.app.verbs import VERBS

    run_stage(importlib.import_module(VERBS[verb]).run, OmegaConf.create(config))


if __name__ == "__main__":
    _main(sys.argv[1])
