"""Where extraction runs: processes that share shards, killed ones, spread models, and what the device is asked for."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fusechat.app.errors import UserError
from fusechat.extract.summary import totals
from fusechat.models.devices import device_of, devices_of
from fusechat.stores.store import DistributionStore
from tests.conftest import ROOT, Mini

TWO = ["extract.trainer.accelerator=cpu", "extract.trainer.devices=2"]


def files(path: Path) -> dict[str, bytes]:
    """Everything that a store holds."""
    return {file.name: file.read_bytes() for file in path.iterdir()}


def children(pid: int) -> list[int]:
    """The processes that extraction has started for its devices, once they are at work."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def start(world: Mini, *overrides: str) -> subprocess.Popen[str]:
    """The command, with threads that an earlier run of one process had too."""
    command = [sys.executable, "-m", "fusechat.extract", *world.base, *TWO, *overrides]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | threads, start_new_session=True, **pipes)


def until(process: subprocess.Popen[str], done: Any) -> None:
    """Waits for a process to come so far."""
    deadline = time.time() + 120
    while not done():
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.005)


def test_two_processes_write_the_bytes_of_one_also_after_a_kill(fresh: Mini) -> None:
    """Work is unequal: an odd number of shards, the last of them of one chat."""
    path = fresh.experiment / "distributions/b"
    small = ["source=b", "extract.rows_per_shard=8", "chat.limit=65"]
    fresh.run("extract", *small, "overwrite=true")
    wanted = files(path)
    shutil.rmtree(path)
    process = start(fresh, *small)
    until(process, lambda: list(path.glob("shard-*.json")))
    workers = children(process.pid)
    os.kill(workers[1], signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "the process of cpu ended by signal SIGKILL; what is whole is kept: run the same command again" in output
    assert "Traceback" not in output
    assert not any(alive(worker) for worker in workers), "none is left at work"
    assert 0 < len(list(path.glob("shard-*.json"))) < 9
    process = start(fresh, *small)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert files(path) == wanted
    assert [entry["rows"] for entry in DistributionStore(path).manifest["shards"]] == [8] * 8 + [1]


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_processes_end_with_the_command(stop: signal.Signals, fresh: Mini) -> None:
    """Killed, or interrupted alone, without the terminal's Ctrl-C to all."""
    process = start(fresh, "source=b", f"output_dir={fresh.root}/other", "extract.rows_per_shard=1")
    until(process, lambda: list((fresh.root / "other").glob("shard-*.json")))
    workers = children(process.pid)
    assert len(workers) == 2
    process.send_signal(stop)
    process.communicate(timeout=60)
    deadline = time.time() + 60
    while any(alive(worker) for worker in workers) and time.time() < deadline:
        time.sleep(0.02)
    assert not any(alive(worker) for worker in workers)


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_mistake_in_a_process_is_the_commands(mini: Mini) -> None:
    with pytest.raises(UserError, match=r"^chat\.max_length=4096 exceeds the context of .*set chat\.max_length=512$"):
        mini.run("extract", "source=a", *TWO, "chat.max_length=4096", f"output_dir={mini.root}/long")


def test_a_model_larger_than_its_device_is_told(mini: Mini, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(transformers.PreTrainedModel, "to", full)
    with pytest.raises(
        UserError, match=r"models/a does not fit in the memory of cpu; spread it with source\.device_map"
    ):
        mini.run("extract", "source=a", f"output_dir={mini.root}/large")


def test_what_a_model_is_loaded_in_is_in_the_fingerprint(mini: Mini, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a kind of quantization that does not exist is refused, as bitsandbytes is where it cannot run."""
    with pytest.raises(UserError, match=r"source\.load_in='3bit' is unknown; use one of: 8bit, 4bit"):
        mini.run("extract", "source=a", "source.load_in=3bit", f"output_dir={mini.root}/three")
    monkeypatch.setattr("fusechat.app.needs.PACKAGES", {})  # whether or not bitsandbytes is here
    with pytest.raises(UserError, match=r"holds a store made with other settings"):
        mini.run("extract", "source=a", "source.load_in=8bit")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["extract.trainer.devices=0"], r"extract\.trainer\.devices=0: expected a whole number from 1 on or auto"),
        (
            ["extract.trainer.devices=many"],
            r"extract\.trainer\.devices='many': expected a whole number from 1 on or auto",
        ),
        (
            ["extract.trainer.accelerator=gpu"],
            r"extract\.trainer\.accelerator='gpu': expected auto, cpu, cuda, cuda:1 or mps",
        ),
    ],
)
def test_bad_devices(overrides: list[str], message: str, mini: Mini) -> None:
    with pytest.raises(UserError, match=message):
        mini.run("extract", "source=a", *overrides)


def test_devices_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with two cards, as torch would show it."""
    assert devices_of("cpu", "auto", "x") == [torch.device("cpu")]
    assert devices_of("cpu", 3, "x") == [torch.device("cpu")] * 3
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert device_of("auto", "x") == torch.device("cuda")
    assert device_of("cuda:1", "x") == torch.device("cuda:1")
    assert devices_of("auto", "auto", "x") == [torch.device("cuda:0"), torch.device("cuda:1")]
    assert devices_of("cuda", 1, "x") == [torch.device("cuda:0")]
    with pytest.raises(UserError, match=r"^x\.devices=3: this machine has 2 \(cuda\)$"):
        devices_of("auto", 3, "x")
    with pytest.raises(UserError, match=r"^x=cuda:2: no such device here; this machine has: cpu, cuda \(2\); x=auto"):
        device_of("cuda:2", "x")


def test_a_spread_model_runs_in_one_process(mini: Mini) -> None:
    output = f"output_dir={mini.root}/spread"
    mini.run("extract", "source=a", "source.device_map=auto", *TWO, output)
    spread, usual = (DistributionStore(p) for p in (mini.root / "spread", mini.experiment / "distributions/a"))
    assert spread.fingerprint == usual.fingerprint
    assert totals(spread.manifest)["nats"] == pytest.approx(totals(usual.manifest)["nats"], rel=1e-6)
