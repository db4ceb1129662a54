"""Signals end a command wherever they come: as it starts, within an import, and where a library loses the exception."""

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from fusechat.app import ending
from fusechat.app.ending import Ended, heeded
from fusechat.app.verbs import VERBS, module_of
from tests.conftest import ROOT

COMMANDS = [*(["-m", module_of(verb)] for verb in VERBS), ["train.py"], ["merge.py"], ["-m", "fusechat"]]
AT_ONCE = """
import os, signal, sys
def look(event, arguments):
    if event == "import" and arguments[0] == "fusechat.app.errors":  # what every command imports first
        os.kill(os.getpid(), signal.{number})
sys.addaudithook(look)
"""
IMPORTED = """
import os, signal
os.kill(os.getpid(), signal.SIGINT)
print("imported")
"""
COMMAND = """
from pathlib import Path
from fusechat.app import ending, locks
with ending.heeded(), locks.held(Path("new/output")):
    {first}
    import imported
    for _ in range(10**9): pass
"""


@pytest.fixture
def handlers() -> Iterator[None]:
    """What this process heeds is as it was, after a test."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
    before, hook = {number: signal.getsignal(number) for number in numbers}, sys.unraisablehook
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    sys.unraisablehook = hook
    ending._come.clear()
    ending._on_its_way.clear()


def interrupted() -> NoReturn:
    os.kill(os.getpid(), signal.SIGINT)
    while True:
        pass


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_command_that_begins_ends_without_a_word(command: list[str], tmp_path: Path) -> None:
    number = "SIGTERM" if command == ["train.py"] else "SIGINT"
    (tmp_path / "sitecustomize.py").write_text(AT_ONCE.format(number=number))
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (128 + getattr(signal, number), "", "")


def test_a_program_that_imports_the_package_keeps_its_own_ways(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        "import signal; before = signal.getsignal(signal.SIGINT)\nimport fusechat; print(signal.getsignal(signal.SIGINT) == before)"
    )
    for own in (["train.py"], ["-c", "import train"], ["-m", "train"]):
        done = subprocess.run(
            [sys.executable, *own],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.stdout == "True\n"


def started(folder: Path, first: str) -> "subprocess.CompletedProcess[str]":
    (folder / "imported.py").write_text(IMPORTED)
    (folder / "command.py").write_text(COMMAND.format(first=first))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "command.py"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_within_an_import_it_ends_at_once_and_leaves_nothing(tmp_path: Path) -> None:
    done = started(tmp_path, "pass")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", f"interrupted; {ending.WHOLE}\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["command.py", "imported.py"]


def test_it_waits_for_an_import_where_wandb_is_to_be_told(tmp_path: Path) -> None:
    (tmp_path / "wandb.py").touch()
    done = started(tmp_path, "import wandb")
    assert (done.returncode, done.stdout, done.stderr) == (130, "imported\n", f"interrupted; {ending.WHOLE}\n")
    assert not (tmp_path / "new").exists()


@pytest.mark.usefixtures("handlers")
def test_an_exception_that_is_taken_is_raised_again(capsys: pytest.CaptureFixture[str]) -> None:
    taken = []
    with pytest.raises(Ended, match="interrupted"), heeded():
        try:
            interrupted()
        except BaseException as error:
            taken.append(type(error))
        while True:
            pass
    assert taken == [Ended]
    assert capsys.readouterr().err == f"interrupted; {ending.WHOLE}\n"


@pytest.mark.usefixtures("handlers")
def test_an_exception_that_is_lost_in_a_finaliser_is_raised_again(capsys: pytest.CaptureFixture[str]) -> None:
    class Finalised:
        def __del__(self) -> None:
            interrupted()

    gc.collect()
    held = [Finalised()]
    with pytest.raises(Ended), heeded():
        held.clear()
        while True:
            pass
    assert capsys.readouterr().err == f"interrupted; {ending.WHOLE}\n"


@pytest.mark.usefixtures("handlers")
def test_another_error_made_of_it_is_the_signals() -> None:
    with pytest.raises(Ended), heeded():
        try:
            interrupted()
        except BaseException:
            raise ValueError from None


@pytest.mark.usefixtures("handlers")
def test_one_that_is_on_its_way_is_not_raised_again() -> None:
    ended = []
    with pytest.raises(Ended), heeded():
        try:
            interrupted()
        finally:
            for _ in range(3):
                signal.sigtimedwait([], 2 * ending.AGAIN)
                ended.append(True)
    assert ended == [True] * 3
