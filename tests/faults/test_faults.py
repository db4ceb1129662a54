"""A part of `make faults`: some kills, full disks and changed bytes, each followed by the same command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.faults.cases import Case
from tests.faults.trace import possible


def disturb(folder: Path, way: str, *more: str) -> list[Case]:
    command = [sys.executable, "-m", "tests.faults", "--folder", str(folder), "--part", "0", "--processes", "1"]
    done = subprocess.run([*command, "--way", way, *more], cwd=ROOT, env=os.environ, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return [Case(**json.loads(line)) for line in (folder / "0.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("way", ["strace" if possible() else "hooks"])
def test_kills_full_disks_and_damage(way: str, tmp_path: Path) -> None:
    cases = disturb(tmp_path, way, "--stages", "extract", "--every", "20", "--flips", "4", "--shares", "0.5")
    assert not [case for case in cases if not case.equal or not case.told]
    assert {"SIGKILL", "ENOSPC", "EIO", "EDQUOT", "damage"} <= {case.fault for case in cases}
    assert any(case.met for case in cases if case.fault == "ENOSPC")
