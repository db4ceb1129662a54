"""A signal ends a training at an optimizer step, with a checkpoint; the same command then ends with the same weights."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from fusechat.app.ending import Ended
from fusechat.fusion.module import FusionModule
from tests.conftest import Mini

SHORT = ["train", "source=a", "data.global_batch=4", "trainer.max_steps=4"]


def signalled(monkeypatch: pytest.MonkeyPatch, number: int, *calls: int) -> None:
    """Sends this process a signal in these micro-batches of the training to come."""
    original, done = FusionModule.training_step, []

    def step(self: Any, batch: Any) -> Any:
        done.append(1)
        if len(done) in calls:
            os.kill(os.getpid(), number)
        return original(self, batch)

    monkeypatch.setattr(FusionModule, "training_step", step)


def checkpoints(world: Mini) -> list[str]:
    return sorted(path.name for path in (world.experiment / "checkpoints").glob("a-*/*.ckpt"))


@pytest.fixture
def accumulating(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two micro-batches a step: a signal in the first of them must not lose its gradient."""
    return [*SHORT, "data.global_batch=8", "data.batch_size=4"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_keeps_the_step_and_the_same_command_goes_on(
    number: signal.Signals, fresh: Mini, monkeypatch: pytest.MonkeyPatch, accumulating: list[str]
) -> None:
    fresh.run(*accumulating, "run_name=undisturbed")
    before = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    signalled(monkeypatch, number, 3)
    with pytest.raises(
        Ended, match=r"step 2 of 4 is kept in .*step=2\.ckpt; the same command goes on from there"
    ) as caught:
        fresh.run(*accumulating)
    assert caught.value.code == 128 + number
    assert {name: signal.getsignal(name) for name in before} == before
    assert checkpoints(fresh) == ["step=2.ckpt"]
    assert [path.name for path in (fresh.experiment / "targets").iterdir()] == ["undisturbed"]
    monkeypatch.undo()
    fresh.run(*accumulating)
    one, two = (load_file(fresh.experiment / "targets" / name / "model.safetensors") for name in ("a", "undisturbed"))
    assert all(one[name].equal(two[name]) for name in two)
    assert checkpoints(fresh) == []
    assert sorted(path.name for path in (fresh.experiment / "targets").iterdir()) == ["a", "undisturbed"]


def test_a_second_signal_ends_at_once(fresh: Mini, monkeypatch: pytest.MonkeyPatch, accumulating: list[str]) -> None:
    signalled(monkeypatch, signal.SIGINT, 1, 2)
    with pytest.raises(Ended, match="^interrupted; the same command goes on from what is whole$"):
        fresh.run(*accumulating)
    assert checkpoints(fresh) == []


@pytest.mark.parametrize("works", [True, False])
def test_slurms_signal_requeues_the_job(
    works: bool, fresh: Mini, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = tmp_path / "bin/scontrol"
    command.parent.mkdir()
    command.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n' + ("" if works else "echo no such job >&2; exit 1\n")
    )
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
    slurm = {"JOB_ID": "7", "JOB_NAME": "fuse", "NTASKS": "1", "NTASKS_PER_NODE": "1", "PROCID": "0", "LOCALID": "0"}
    for name, value in {**slurm, "NODEID": "0", "ARRAY_JOB_ID": "5", "ARRAY_TASK_ID": "3"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    signalled(monkeypatch, signal.SIGUSR1, 2)
    told = "SLURM has put job 5_3 into the queue again" if works else r"SLURM cannot requeue job 5_3 \(no such job\)"
    with pytest.raises(Ended, match=rf"step 2 of 4 is kept in .*step=2\.ckpt; {told}"):
        fresh.run(*SHORT)
    assert (tmp_path / "asked").read_text() == "requeue 5_3\n"
    assert checkpoints(fresh) == ["step=2.ckpt"]
    monkeypatch.undo()
    fresh.run(*SHORT)
    assert (fresh.experiment / "targets/a/fusechat.json").exists()


@pytest.mark.parametrize("after", ["whole", "validated"])
def test_a_kill_at_the_end_leaves_no_target_without_its_metrics(
    after: str, fresh: Mini, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = [*SHORT, "callbacks.checkpoint_every_n_steps=2"]
    if after == "whole":  # the target has its name, the checkpoints are still there
        monkeypatch.setattr("shutil.rmtree", killed)
    else:
        monkeypatch.setattr("fusechat.app.outputs.replace", killed)
    with pytest.raises(SystemExit):
        fresh.run(*short)
    monkeypatch.undo()
    target, kept = fresh.experiment / "targets/a", sorted(fresh.experiment.glob("checkpoints/a-*"))
    assert (target.exists(), len(kept)) == (after == "whole", 1)
    again = fresh.run(*short)
    assert again is not None
    assert json.loads((target / "fusechat.json").read_text())["metrics"]["validation/bits_per_byte"] == again
    assert not [path for path in kept if path.exists()]
    assert [path.name for path in target.parent.iterdir()] == ["a"]


def killed(*args: Any, **options: Any) -> None:
    raise SystemExit(9)
