"""How ranks are started and how they end: a sweep, torchrun on two nodes, SLURM, a rank that fails, memory that runs
out.
"""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fusechat.app import ranks
from fusechat.app.errors import UserError
from fusechat.app.rank import rank
from fusechat.app.trainer import quiet_trainer
from fusechat.fusion.failures import Explained
from fusechat.fusion.module import FusionModule
from fusechat.fusion.ranks import Share, share, starts_ranks
from tests.conftest import ROOT, Mini

STEPS = ["trainer.max_steps=2", "callbacks.progress_bar=false", "trainer.precision=32-true", "trainer.accelerator=cpu"]


def record(world: Mini, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((world.experiment / "targets" / name / "fusechat.json").read_text())
    return found


def alike(world: Mini, name: str, source: str) -> None:
    """A target of several ranks is that of one."""
    world.run("train", f"source={source}", "run_name=alone", "overwrite=true", *STEPS)
    one, several = record(world, "alone"), record(world, name)
    assert several["steps"] == 2
    assert several["fingerprint"] == one["fingerprint"]
    assert several["metrics"]["validation/loss"] == pytest.approx(one["metrics"]["validation/loss"], rel=1e-4)


def test_a_sweep_of_two_ranks_runs_every_job_once(fresh: Mini) -> None:
    command = [sys.executable, "train.py", "-m", *fresh.base, "source=a,b", "trainer=fsdp", "trainer.devices=2", *STEPS]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    saved = re.findall(r"target (\w+): 2 steps", done.stderr)
    assert saved == ["a", "b"], done.stderr
    alike(fresh, "b", "b")


def test_torchrun_on_two_nodes(fresh: Mini) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-id=fusechat"]
    torchrun += ["--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", "--local-addr=localhost"]
    ours = ["train.py", *fresh.base, "source=a", "trainer=ddp", "trainer.devices=1", "trainer.num_nodes=2", *STEPS]
    nodes = [
        subprocess.Popen([*torchrun, *ours], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]
    told = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], told
    assert "".join(told).count("target a: ") == 1
    alike(fresh, "a", "a")


def test_under_slurm_ranks_are_there_already(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = {
        "NTASKS": "4",
        "NTASKS_PER_NODE": "2",
        "JOB_ID": "1",
        "JOB_NAME": "train",
        "PROCID": "3",
        "LOCALID": "1",
        "NODEID": "1",
    }
    for name, value in ours.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    trainer = quiet_trainer({"accelerator": "cpu", "devices": 2, "num_nodes": 2, "strategy": "fsdp"}, [])
    assert (trainer.world_size, trainer.global_rank, starts_ranks(trainer), rank()) == (4, 3, False, 3)
    assert trainer.strategy._data_parallel_size == 4


def test_several_nodes_are_started_from_outside() -> None:
    trainer = quiet_trainer({"accelerator": "cpu", "devices": 1, "num_nodes": 2, "strategy": "ddp"}, [])
    with pytest.raises(
        UserError, match=r"trainer\.num_nodes=2 needs torchrun or SLURM on every node; see docs/ranks\.md"
    ):
        starts_ranks(trainer)
    with pytest.raises(
        UserError, match=r"trainer\.strategy='fsdp_cpu_offload' is not supported; use one of: auto, ddp"
    ):
        quiet_trainer({"strategy": "fsdp_cpu_offload"}, [])


FAILING = """
from fusechat.app.errors import UserError
from fusechat.fusion.module import FusionModule

original = FusionModule.training_step


def training_step(self, batch):
    if self.global_rank == 1:
        raise UserError("rank 1 has had enough; give it a rest")
    return original(self, batch)


FusionModule.training_step = training_step
"""


def test_a_rank_that_fails_ends_the_others_and_is_the_commands_message(
    fresh: Mini, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "failing_rank.py").write_text(FAILING)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(FusionModule, "training_step", FusionModule.training_step)  # the module is imported here too
    before = dict(os.environ)
    with pytest.raises(UserError, match="^rank 1 has had enough; give it a rest$"):
        fresh.run("train", "source=a", "trainer.devices=2", "imports=[failing_rank]", *STEPS)
    assert dict(os.environ) == before, "the next job of a sweep starts from a clean environment"
    assert not (fresh.experiment / "targets/a").exists()


def test_what_is_said_of_a_rank_that_was_killed() -> None:
    failure = SimpleNamespace(message="Signal 9 received", exitcode=-9, global_rank=3, signal_name=lambda: "SIGKILL")
    assert ranks._said(failure) == "rank 3 was ended by signal 9 (SIGKILL)"


def test_a_rank_does_not_wait_for_ever() -> None:
    stage = SimpleNamespace(value="validate")
    trainer = SimpleNamespace(world_size=2, global_rank=1, global_step=7, state=SimpleNamespace(stage=stage))
    failures = Explained()
    failures.on_exception(trainer, None, RuntimeError())
    told = r"rank 1 of 2 waited in vain for the others while validating, step 7; the one that stopped says why"
    for cause in ("[gloo] Timed out waiting 1800000ms for recv", "Connection closed by peer [127.0.0.1]:1"):
        with pytest.raises(UserError, match=told), failures.around(trainer, None):
            raise RuntimeError(cause)
    with pytest.raises(RuntimeError, match="^something else$"), failures.around(trainer, None):
        raise RuntimeError("something else")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            ["data.batch_size=4"],
            r"out of memory while training, step 0, with 4 chats of at most \d+ tokens at a time on a device, "
            r"gradient_checkpointing=false, lora=false; gradient_checkpointing=true frees about [\d.]+ [GMk]B of activations, "
            r"data.batch_size=2 about [\d.]+ [GMk]B, lora.enabled=true about [\d.]+ [GMk]B of gradients and optimizer state, ",
        ),
        (
            ["data.batch_size=1", "gradient_checkpointing=true", "lora.enabled=true"],
            r"with 1 chats .* gradient_checkpointing=true, lora=true; trainer=fsdp shares weights",
        ),
    ],
    ids=["all remedies", "none but more devices"],
)
def test_out_of_memory_names_what_would_help(
    options: list[str], told: str, fresh: Mini, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(self: Any, batch: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(FusionModule, "training_step", step)
    with pytest.raises(UserError, match=told):
        fresh.run("train", "source=a", *options)


def test_a_step_is_shared_evenly() -> None:
    assert share(128, 4, 8) == Share(4, 4)
    assert share(128, None, 8) == Share(16, 1)
    assert share(8, 32, 2) == Share(4, 1), "at most so many at a time"
    with pytest.raises(UserError, match=r"data\.global_batch=128 is no multiple of 3 ranks; set .*=126 or 129"):
        share(128, 4, 3)
    with pytest.raises(
        UserError, match=r"data\.batch_size=5 does not divide the 16 chats of a rank; use one of: 1, 2, 4, 8"
    ):
        share(128, 5, 8)


def test_what_follows_from_a_step_is_not_set(mini: Mini) -> None:
    with pytest.raises(UserError, match=r"trainer\.accumulate_grad_batches follows from data\.global_batch"):
        mini.run("train", "source=a", "+trainer.accumulate_grad_batches=2", f"output_dir={mini.root}/bad/bad")
