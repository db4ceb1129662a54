"""Fixtures: a miniature tiny world, and a way to run an entry in this process as its command would."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SCRATCH = Path(
    tempfile.mkdtemp(prefix="fusechat-tests-")
)  # other libraries' caches, and temporary files of child processes
atexit.register(shutil.rmtree, SCRATCH, ignore_errors=True)
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_WAIT_POLICY": "PASSIVE",  # how threads wait, not how many they are: workers of pytest-xdist share the cores
    "TMPDIR": str(SCRATCH),
    "FUSECHAT_ROOT": f"{SCRATCH}/runs",  # of commands that are given no paths.root
    "FUSECHAT_CACHE": f"{SCRATCH}/checksums",
    "HF_HOME": f"{SCRATCH}/huggingface",
    "HYPOTHESIS_STORAGE_DIRECTORY": f"{SCRATCH}/hypothesis",
    **dict.fromkeys(("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"), f"{SCRATCH}/wandb"),
}

import hypothesis
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from fusechat.app.command import CONF, run_stage
from fusechat.app.verbs import VERBS

# A deadline is a timed assertion; a database would outlive the run, and what failed is printed as code that repeats it.
hypothesis.settings.register_profile("tests", deadline=None, database=None, print_blob=True)
hypothesis.settings.load_profile("tests")
MINI = [
    "tiny.fusion_chats=96",
    "tiny.test_chats=24",
    "tiny.validation_chats=16",
    "tiny.train_chats=256",
    "tiny.width=32",
    "tiny.layers=2",
    "tiny.heads=2",
    "tiny.models.pivot.steps=6",
    "tiny.models.a.steps=6",
    "tiny.models.b.steps=6",
    "tiny.models.c.steps=6",
    "extract.rows_per_shard=32",
    "extract.tokens_per_batch=1024",
    "trainer.max_steps=6",
    "data.global_batch=8",
    "logger=csv",
]
ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests/golden"


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """No test leaves anything in the repository's root, where commands write unless told otherwise."""
    listing = lambda: {path.name for path in ROOT.iterdir()} - {".pytest_cache"}
    before = listing()
    yield
    assert not (left := listing() - before), f"a test left {left}"


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same draws, loggers that tell from warnings on, and the only rank, for a test whatever ran before it.

    Hydra's quiet settings disable all loggers; a trainer that was told that it is another rank tells all of Lightning.
    """
    import torch

    torch.manual_seed(0)
    if "lightning" in sys.modules:
        from lightning.pytorch.utilities import rank_zero_only

        rank_zero_only.rank = 0
    for logger in logging.root.manager.loggerDict.values():
        if isinstance(logger, logging.Logger):
            logger.disabled = False
    logging.root.setLevel(logging.WARNING)


def composed(config: str, overrides: list[str]) -> Any:
    """The config an entry would get."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(CONF, version_base="1.3"):
        return compose(config, overrides)


def run_entry(name: str, overrides: list[str]) -> Any:
    """Runs an entry's stage in this process."""
    import importlib

    module = importlib.import_module(VERBS[name])
    return run_stage(module.run, composed(name, overrides))


class Mini:
    """A miniature world in a folder of its own."""

    def __init__(self, root: Path, *overrides: str) -> None:
        self.root = root
        self.base = ["experiment=tiny", *MINI, f"paths.root={root}", *overrides]
        self.experiment = root / "tiny" / "seed0"

    def run(self, name: str, *overrides: str) -> Any:
        return run_entry(name, self.all(*overrides))

    def cfg(self, name: str, *overrides: str) -> Any:
        return composed(name, self.all(*overrides))

    def all(self, *overrides: str) -> list[str]:
        """What is given to a command: of the experiment `tiny` unless another is named."""
        other = any(override.startswith("experiment=") for override in overrides)
        return [*self.base[other:], *overrides]


@pytest.fixture(scope="session")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Mini:
    """World, distributions and aligned stores, made once."""
    world = Mini(tmp_path_factory.mktemp("runs"))
    world.run("tiny")
    for source in ("pivot", "a", "b", "c"):
        world.run("extract", f"source={source}")
    for source in ("pivot", "a", "b", "c"):
        world.run("align", f"source={source}")
    return world


@pytest.fixture
def fresh(tmp_path: Path, mini: Mini) -> Mini:
    """A copy of the miniature world that a test may spoil; its paths are its own."""
    import shutil

    shutil.copytree(mini.root, tmp_path / "runs")
    return Mini(tmp_path / "runs")


@pytest.fixture(scope="session")
def tokenizers(mini: Mini) -> Callable[[str], Any]:
    """Tokenizers of the miniature world by model name."""
    from transformers import AutoTokenizer

    return lambda name: AutoTokenizer.from_pretrained(mini.experiment / "world/models" / name)
