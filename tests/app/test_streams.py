"""What is piped into a program that ends before, or onto a full disk: no traceback, and an exit code that says so."""

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
    done = subprocess.run(run, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_the_disk_is_full(command: list[str], unbuffered: str) -> None:
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "w") as full:
        run = [sys.executable, *command]
        done = subprocess.run(run, cwd=ROOT, env=environment, stdout=full, stderr=subprocess.PIPE, text=True)
    told = "error: No space left on device; what was finished is whole: make room and run the same command again\n"
    assert (done.returncode, done.stderr) == (1, told)
