"""A part of `make faults`: some kills, full disks and changed bytes, each followed by the same command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.faults.cases import Case, in_turn
from tests.faults.trace import FAULTS, Boundary, possible


def disturb(folder: Path, way: str, *more: str) -> list[Case]:
    command = [sys.executable, "-m", "tests.faults", "--folder", str(folder), "--part", "0", "--processes", "1"]
    done = subprocess.run([*command, "--way", way, *more], cwd=ROOT, env=os.environ, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return [Case(**json.loads(line)) for line in (folder / "0.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("way", ["strace" if possible() else "hooks"])
def test_kills_full_disks_and_damage(way: str, tmp_path: Path) -> None:
    cases = disturb(tmp_path, way, "--stages", "extract", "--every", "20", "--all", "--flips", "4", "--shares", "0.5")
    assert not [case for case in cases if not case.equal or not case.told]
    assert {"SIGKILL", "ENOSPC", "EIO", "EDQUOT", "damage"} <= {case.fault for case in cases}
    assert all(any(case.met for case in cases if case.fault == fault) for fault in ("ENOSPC", "RLIMIT_FSIZE"))


def test_every_error_takes_its_turn_at_every_call() -> None:
    found = [Boundary(call, n, "f") for call, count in (("write", 7), ("rename", 2)) for n in range(count)]
    struck = {(found[n].call, fault) for n in range(len(found)) for fault in in_turn(found, n)}
    assert struck == {(call, fault) for call in ("write", "rename") for fault in FAULTS}
    assert [len(in_turn(found, n)) for n in range(len(found))] == [2] * 7 + [4] * 2
    assert all("SIGKILL" in in_turn(found, n) for n in range(len(found)))
