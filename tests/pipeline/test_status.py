"""`fusechat status`: of a root, of an experiment, of nothing; and the cause that a failed command leaves."""

import subprocess
import sys
from pathlib import Path

import pytest

from fusechat import status
from fusechat.app import failures
from tests.conftest import ROOT, Mini
from tests.pipeline.conftest import FINISHED


def test_the_status_of_a_root_and_of_an_experiment(
    world: Mini, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert status.experiments(world.root) == [world.experiment] == status.experiments(world.experiment)
    monkeypatch.setattr(sys, "argv", ["status", str(world.root)])
    status.main()
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].strip() == str(world.experiment)
    names = [line.split()[0] for line in printed[2:-1]]
    assert set(FINISHED) <= set(names) and names[-1] == "report"
    assert next(line for line in printed if line.startswith("distributions/a")).split("; ")[1].startswith("96 chats, ")
    assert printed[-1] == f"{len(names)} done"


@pytest.mark.parametrize(("folder", "what"), [("nowhere", "does not exist"), ("", "holds no experiment")])
def test_a_status_of_nothing(
    folder: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / folder
    monkeypatch.setattr(sys, "argv", ["status", str(place)])
    with pytest.raises(SystemExit) as ended:
        status.main()
    assert ended.value.code == 1
    expected = f"error: {place} {what}; give an experiment's folder, e.g. runs/tiny/seed0, or one above"
    assert capsys.readouterr().err.strip() == expected


def test_a_command_that_fails_leaves_its_cause(world: Mini) -> None:
    command = [sys.executable, "-m", "fusechat.align", *world.all("source=b", "token_map=ms")]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 1
    store = world.experiment / "aligned/b"
    failure = failures.last(world.experiment / "logs")[str(store.resolve())]
    assert failure.cause in done.stderr
    assert "token_map" in failure.cause
    assert failure.command.startswith("python -m fusechat.align ")
