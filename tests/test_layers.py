"""Imports point down only, and entries import nothing heavy before they run."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fusechat"
FAMILIES = ("alignment", "fusion", "merging", "evaluation", "tiny")
ENTRIES = {
    "train", "merge", "extract", "align", "evaluate", "report", "pipeline", "inspect", "publish", "merge_search", "judge", "compare",
    "training", "merge_run", "tracking",
}  # fmt: skip
FILES = [*PACKAGE.rglob("*.py"), ROOT / "train.py", ROOT / "merge.py"]


def imports(file: Path) -> set[str]:
    tree = ast.parse(file.read_text())
    named = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    named |= {f"{n.module}.{a.name}" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module == "fusechat" for a in n.names}
    return named | {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}


def is_entry(file: Path) -> bool:
    return (file.stem in ENTRIES and file.parent in (PACKAGE, ROOT)) or file.name == "__main__.py"


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_layers(file: Path) -> None:
    used = imports(file)
    if is_entry(file):
        return
    assert not any(name.split(".")[0] == "hydra" for name in used) or file.stem == "runtime", "only entries know hydra"
    assert not any(name.startswith("fusechat.runtime") for name in used), "only entries use the runtime"
    family = file.parent.name if file.parent != PACKAGE and file.parent != ROOT else None
    others = [f for f in FAMILIES if f != family]
    if file.stem not in ("reporting",):
        crossing = [name for name in used for other in others if name.startswith(f"fusechat.{other}")]
        assert not crossing, f"{file.name} reaches into {crossing}"


@pytest.mark.parametrize(
    "module",
    [
        "train",
        "merge",
        "fusechat.extract",
        "fusechat.align",
        "fusechat.evaluate",
        "fusechat.report",
        "fusechat.pipeline",
        "fusechat.merge_search",
    ],
)
def test_entries_start_light(module: str) -> None:
    code = f"import {module}, sys; print([m for m in ('torch', 'transformers', 'lightning', 'datasets', 'wandb', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"
