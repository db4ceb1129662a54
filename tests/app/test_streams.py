"""What is piped into a program that ends before: no traceback, the exit code of any program of a pipe."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

READERLESS = (
    "import os, subprocess, sys; r, w = os.pipe(); os.close(r); sys.exit(subprocess.call(sys.argv[1:], stdout=w))"
)
COMMANDS = [
    ["merge.py", "--help"],
    ["-m", "fusechat.status", "--help"],
    ["-m", "fusechat"],
    ["-m", "fusechat.new", "-h"],
]
COMMANDS += [["-m", "fusechat.compare", "--cfg", "job"]]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_nobody_reads(command: list[str]) -> None:
    run = [sys.executable, "-c", READERLESS, sys.executable, *command]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}  # argparse
    done = subprocess.run(run, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (141, "")
