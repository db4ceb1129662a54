"""Ctrl-C, SIGTERM and SLURM's requeue signal end a training at an optimizer step, with a checkpoint of it."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback

from fusechat.app.ending import Ended

LOG = logging.getLogger(__name__)


class StopOnSignal(Callback):
    """Notes a signal, ends after the step that it came in, on all ranks at the same one; a second signal ends at once.

    Between steps nothing is lost: the run that goes on takes the same way as one that was not stopped. SLURM sends its
    requeue signal ahead of a job's end (``#SBATCH --signal=USR1@90``); the job is then put into the queue again.
    """

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self.step = 0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Takes the signals; Lightning gives them back at its end."""
        self.step, numbers = trainer.global_step, {signal.SIGINT}
        numbers |= (
            {signal.SIGTERM} if "SUBMITIT_EXECUTOR" not in os.environ else set()
        )  # whose launcher requeues itself
        numbers |= {signal.SIGUSR1} if "SLURM_JOB_ID" in os.environ else set()
        if threading.current_thread() is threading.main_thread():
            for number in numbers:
                signal.signal(number, self._note)

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: Any, *args: Any) -> None:
        """After a whole step: ends, if a signal has come to any rank."""
        if trainer.global_step == self.step:  # gradients are being accumulated
            return
        self.step, asked = trainer.global_step, self.asked is not None
        if trainer.world_size > 1:
            asked = trainer.strategy.reduce_boolean_decision(asked, all=False)
        if asked:
            raise Ended(self._number(), self._save(trainer))

    def _note(self, number: int, frame: Any) -> None:
        if self.asked is not None:
            raise Ended(self._number())
        self.asked = signal.Signals(number)
        LOG.warning("%s: ending after this step; once more ends at once", self.asked.name)

    def _number(self) -> int:
        return signal.SIGINT if self.asked == signal.SIGINT else signal.SIGTERM

    def _save(self, trainer: lightning.Trainer) -> str:
        """Writes a checkpoint; returns what is kept, as a line."""
        saver: Any = trainer.checkpoint_callback
        place = Path(saver.dirpath) / f"step={trainer.global_step}.ckpt"
        saver._save_checkpoint(trainer, str(place))
        kept = f"step {trainer.global_step} of {trainer.estimated_stepping_batches} is kept in {place}"
        if self.asked in (None, signal.SIGINT, signal.SIGTERM):
            return f"{kept}; the same command goes on from there"
        return f"{kept}; {_requeue() if trainer.is_global_zero else 'requeued'}"


def _requeue() -> str:
    """Puts this SLURM job into the queue again."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60)
        reason = done.stderr.strip() if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = str(error)
    return f"SLURM cannot requeue job {job} ({reason})" if reason else f"SLURM has put job {job} into the queue again"
