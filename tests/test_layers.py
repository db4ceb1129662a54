"""Imports point down only, steps do not know each other, and commands import nothing heavy before they run."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.conftest import ROOT

LAYERS = [  # the floor first; a room imports from the layers below its own, never from its neighbours
    {"app"},
    {"models", "chats"},
    {"stores"},
    {"report"},
    {"evaluate", "tiny"},
    {"extract", "align", "fusion", "merging", "judge", "publish", "compare", "inspect"},
    {"new"},  # what an experiment will take, which a pipeline's plan shows
    {"train", "merge", "pipeline", "mutual", "preview", "merge_search", "status", "__main__"},
]
PACKAGE = ROOT / "fusechat"
FILES = [*(f for f in PACKAGE.rglob("*.py") if not f.is_symlink()), ROOT / "train.py", ROOT / "merge.py"]
COMMANDS = ["train", "merge", "fusechat.compare", "fusechat.inspect", "fusechat.merge_search", "fusechat.status"]
COMMANDS += [f"fusechat.{f.parent.name}.__main__" for f in PACKAGE.glob("*/__main__.py")]


def room(file: Path) -> str:
    """The folder of a file below fusechat/, or the file itself."""
    parts = file.relative_to(PACKAGE if file.is_relative_to(PACKAGE) else ROOT).parts
    return parts[0].removesuffix(".py")


def imports(file: Path) -> set[str]:
    tree = ast.parse(file.read_text())
    named = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    named |= {
        f"{n.module}.{a.name}"
        for n in ast.walk(tree)
        if isinstance(n, ast.ImportFrom) and n.module == "fusechat"
        for a in n.names
    }
    return named | {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}


def test_the_house_has_few_rooms() -> None:
    rooms = {f.stem for f in PACKAGE.iterdir() if not f.name.startswith("__")}
    assert len(rooms) <= 22, "a new room goes into one of those that are there"


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_point_down(file: Path) -> None:
    own = room(file)
    if own == "__init__":
        return
    height = {name: n for n, layer in enumerate(LAYERS) for name in layer}
    used = {name.split(".")[1] for name in imports(file) if name.startswith("fusechat.")} - {own}
    upward = {name for name in used if height[name] >= height[own]}
    assert not upward, f"{file.name} reaches up or sideways into {upward}"


def test_no_module_needs_itself() -> None:
    """Where two import each other, it depends on which comes first whether either can be imported."""
    modules = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in FILES}
    needs = {
        module: {
            name
            for node in ast.parse(file.read_text()).body  # what is imported when it is asked for needs no order
            if isinstance(node, ast.ImportFrom)
            for name in (node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names))
            if name in modules
        }
        for module, file in modules.items()
    }
    TopologicalSorter(needs).prepare()  # raises CycleError, which names them


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_hydra_stays_at_the_door(file: Path) -> None:
    if file.stem in ("__main__", "run", "search") or room(file) in (
        "app",
        "compare",
        "merge_search",
        "pipeline",
        "train",
        "merge",
    ):
        return
    known = {name.split(".")[0] for name in imports(file)}
    assert not known & {"hydra", "omegaconf"}, "only commands know Hydra"


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_wandb_is_known_to_app_alone(file: Path) -> None:
    if room(file) != "app":
        known = {name.split(".")[0] for name in imports(file)}
        assert not known & {"wandb", "wandb_workspaces"}, "fusechat.app.tracking logs for all"


@pytest.mark.parametrize("module", COMMANDS)
def test_commands_start_light(module: str) -> None:
    code = f"import {module}, sys; print([m for m in ('torch', 'transformers', 'lightning', 'datasets', 'wandb', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
