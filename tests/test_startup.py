"""What a command imports to find that its output is there: nothing that only the work itself needs."""

import os
import subprocess
import sys

import pytest

from fusechat.app.verbs import module_of
from tests.conftest import ROOT, Mini

TRAINS = {"lightning", "torchmetrics", "peft", "torch._dynamo"}
MODELS = TRAINS | {"transformers", "numba"}
NEEDLESS = {
    "tiny": MODELS | {"torch", "datasets"},
    "extract": TRAINS | {"numba"},
    "align": MODELS | {"torch", "datasets"},
    "train": MODELS | {"datasets"},
    "merge": MODELS | {"datasets", "pandas"},
    "evaluate": MODELS | {"torch"},
}
NEEDLESS["align"].remove("numba")  # its families are compiled
ALWAYS = {"wandb", "matplotlib", "scipy.stats", "optuna", "accelerate"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, mini: Mini) -> Mini:
    """The miniature world with a target and a merged model, which a second run finds there."""
    import shutil

    folder = tmp_path_factory.mktemp("startup") / "runs"
    shutil.copytree(mini.root, folder)
    world = Mini(folder, "trainer.max_steps=1")
    world.run("extract", "source=pivot", "overwrite=true")  # a store knows where its chats lay: elsewhere they are read
    world.run("train", "source=a", "validation.path=null")
    world.run("merge", "merge=linear", *targets(world))
    world.run("evaluate", *scored(world))
    return world


def targets(world: Mini) -> list[str]:
    return [f"targets=[{world.experiment}/targets/a,{world.experiment}/world/models/pivot]"]


def scored(world: Mini) -> list[str]:
    return [f"model={world.experiment}/targets/a"]


@pytest.mark.parametrize("verb", NEEDLESS)
def test_what_is_there_is_found_without_what_makes_it(verb: str, made: Mini) -> None:
    own = {"train": ["validation.path=null"], "merge": ["merge=linear", *targets(made)], "tiny": []}
    own["evaluate"] = scored(made)
    overrides = [
        *made.base,
        "experiment=tiny",
        *own.get(verb, []),
        *(["source=a"] if verb not in ("merge", "tiny", "evaluate") else []),
    ]
    command = [sys.executable, "-X", "importtime", "-m", module_of(verb), *overrides]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, env=os.environ)
    lines = done.stderr.splitlines()
    assert done.returncode == 0, lines[-1]
    assert verb == "tiny" or any("skip: " in line for line in lines), "it was made again"
    loaded = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    assert "hydra" in loaded, "the list of imports is read"
    assert not loaded & (NEEDLESS[verb] | ALWAYS)
