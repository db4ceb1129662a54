"""Two processes on one output: who holds it is told, waiting waits, and a dead process holds nothing."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fusechat.app import locks
from fusechat.app.errors import HELD, UserError
from fusechat.app.locks import OWN, held, waiting
from fusechat.app.outputs import whole_directory
from tests.conftest import ROOT

HOLD = """
import sys
from pathlib import Path
from fusechat.app.locks import held
with held(Path(sys.argv[1])) as first:
    print(first, flush=True)
    sys.stdin.readline()
"""


@contextmanager
def holder(output: Path, **environment: str) -> Iterator["subprocess.Popen[str]"]:
    """Another process that holds ``output`` until a line comes in."""
    command = [sys.executable, "-c", HOLD, str(output)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True, cwd=ROOT, env=os.environ | environment) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == ("False\n" if environment else "True\n")
            yield process
        finally:
            process.kill()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_second_is_told_who_holds_the_output(tmp_path: Path) -> None:
    output = tmp_path / "deep/down/a"
    with holder(output) as process:
        said = rf"a is being written by another process \(host \S+, pid {process.pid}, since [-\d]+ [:\d]+\); wait=true"
        with pytest.raises(UserError, match=said) as caught, held(output):
            pass
        assert caught.value.code == HELD == 3
        with pytest.raises(UserError, match="being written"), whole_directory(output):
            pass
        with held(output.with_name("b")) as first:
            assert first, "another output of the same experiment"
        process.communicate("\n")
    assert names(tmp_path) == [], "neither the lock nor the folders made for it are left"


def test_waiting_waits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with holder(tmp_path / "a") as process, waiting(True):
        assert process.stdin is not None
        threading.Timer(1.0, process.stdin.write, ["\n"]).start()
        threading.Timer(1.1, process.stdin.flush).start()
        with held(tmp_path / "a") as first:
            assert first
            assert process.wait() == 0, "the other one has ended before"
    assert re.search(r"waiting: \S+/a is being written by another process \(host", caplog.text)
    assert names(tmp_path) == []


@pytest.mark.parametrize("ahead", [0, 10**6, -(10**6)])  # seconds: the clock may have been set since
def test_a_killed_process_holds_nothing(ahead: int, tmp_path: Path) -> None:
    with holder(tmp_path / "a") as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert names(tmp_path) == [".a.lock"]
    os.utime(tmp_path / ".a.lock", (time.time() + ahead,) * 2)
    with held(tmp_path / "a") as first:
        assert first
    assert names(tmp_path) == []


def test_a_lock_of_another_host_is_alive(tmp_path: Path) -> None:
    (tmp_path / ".a.lock").write_text("1\nelsewhere\n")
    with pytest.raises(UserError, match=r"host elsewhere, pid 1, since .* remove \S+/\.a\.lock"), held(tmp_path / "a"):
        pass


@pytest.mark.parametrize("rank", ["RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK"])
def test_children_and_other_ranks_work_under_the_first_ones_lock(
    rank: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with held(tmp_path / "a"):
        with held(tmp_path / "a") as again:
            assert not again
        with holder(tmp_path / "a", **{OWN: os.environ[OWN]}):
            pass
    monkeypatch.setenv(rank, "1")
    with held(tmp_path / "a") as first:
        assert not first
        assert names(tmp_path) == []


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    message = r"file/x/a cannot be written \(Not a directory: .*\); choose another place"
    with pytest.raises(UserError, match=message), held(tmp_path / "file/x/a"):
        pass


def test_a_lock_that_was_never_filled_is_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "UNFILLED", 0.1)
    for ahead in (0, 10**6):  # seconds: the clock may have been set back since
        (tmp_path / ".out.lock").touch()  # killed between making the file and writing into it
        os.utime(tmp_path / ".out.lock", (time.time() + ahead,) * 2)
        with held(tmp_path / "out") as first:
            assert first
    assert not list(tmp_path.iterdir())
