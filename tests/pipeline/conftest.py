"""The miniature world with what a pipeline of it leaves."""

import shutil
from pathlib import Path

import pytest

from tests.conftest import Mini

FINISHED = ["world/models/pivot", "world/models/a", "world/models/b", "world/models/c", "distributions/pivot"]
FINISHED += ["distributions/a", "aligned/a", "targets/a", "evaluation/targets-a.json", "report"]


@pytest.fixture(scope="session")
def finished(mini: Mini, tmp_path_factory: pytest.TempPathFactory) -> Mini:
    """The miniature world with a target, its evaluation and a report."""
    root = tmp_path_factory.mktemp("finished") / "runs"
    shutil.copytree(mini.root, root)
    world = Mini(root, "trainer.max_steps=1", "evaluation.limit=4", "evaluation.generate=false")
    world.run("train", "source=a")
    world.run("evaluate", f"model={world.experiment}/targets/a")
    world.run("report")
    return world


@pytest.fixture
def world(finished: Mini, tmp_path: Path) -> Mini:
    """A copy that a test may spoil."""
    shutil.copytree(finished.root, tmp_path / "runs")
    return Mini(tmp_path / "runs", *finished.base[-3:])
