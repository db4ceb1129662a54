"""Ctrl-C in every stage: exit code 130, one line, and the same command ends as if nothing had been."""

import json
import os
import subprocess
import sys
from pathlib import Path

from fusechat.app.ending import WHOLE
from tests.conftest import ROOT
from tests.faults.stages import STAGES

TOLD = f"interrupted; {WHOLE}"


def test_ctrl_c_in_every_stage(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.faults.interrupts", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [stage for stage, *_ in found] == [stage.name for stage in STAGES if stage.disturbed]
    for stage, code, said, differing in found:
        assert (code, said[-1], differing) == (130, TOLD, ""), stage
        assert not [line for line in said if "Traceback" in line or "Error" in line], stage
