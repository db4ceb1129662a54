"""How a pipeline ends before its time: with its steps, and with the step and the cause named."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from fusechat.app.errors import UserError
from tests.conftest import run_entry
from tests.pipeline.runs import start


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def child_of(process: subprocess.Popen[str]) -> int:
    """The step that a pipeline runs now, once it has begun its work."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not (found := children.read_text().split()):
        assert process.poll() is None
        time.sleep(0.01)
    return int(found[0])


@pytest.mark.parametrize(("stop", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 143)])
def test_a_step_does_not_outlive_its_pipeline(tmp_path: Path, stop: signal.Signals, code: int) -> None:
    process = start(tmp_path)
    child = child_of(process)
    while not list(tmp_path.glob("tiny/seed0/world/chats/*.jsonl")):
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, stop)
    process.communicate(timeout=60)
    assert process.returncode == code
    deadline = time.time() + 60
    while alive(child) and time.time() < deadline:
        time.sleep(0.05)
    assert not alive(child)


def test_ctrl_c_ends_the_step_and_the_pipeline(tmp_path: Path) -> None:
    process = start(tmp_path)
    child = child_of(process)
    while not list(tmp_path.glob("tiny/seed0/world/chats/*.jsonl")):
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert not alive(child)
    assert "Traceback" not in output


def test_a_failing_step_is_named_after_its_cause(tmp_path: Path) -> None:
    process = start(tmp_path, "pipeline.steps=['align source=a']")
    output, _ = process.communicate(timeout=120)
    lines = output.splitlines()
    assert process.returncode == 1
    assert "python -m fusechat.extract experiment=tiny source=pivot" in lines[-2] + lines[-3]
    shown = "step 1 of 1 failed (exit code 1): python -m fusechat.align experiment=tiny "
    assert shown in lines[-1]
    assert lines[-1].endswith(" source=a"), "nothing of Hydra's own"
    assert "Traceback" not in output


def test_unknown_steps_are_refused_before_any_work(tmp_path: Path) -> None:
    process = start(tmp_path, "pipeline.steps=[tiny,'evalute model=x']")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "pipeline.steps: 'evalute' is no stage; use one of: tiny, preview, extract," in output
    assert "did you mean evaluate?" in output
    assert not (tmp_path / "tiny").exists()


def test_a_pipeline_started_by_torchrun_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(
        UserError, match=r"this is one of WORLD_SIZE=8: start it without torchrun; trainer\.devices and"
    ):
        run_entry("pipeline", ["experiment=tiny"])
