"""The pictures of README: from the published numbers alone, and the same each time."""

import importlib.util
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from fusechat.report import forests
from tests.conftest import ROOT

PUBLISHED = ROOT / "fusechat/tiny/published.csv"


@pytest.fixture(scope="module")
def pictures() -> Any:
    spec = importlib.util.spec_from_file_location("pictures", ROOT / "docs/pictures.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_differences_are_those_of_the_published_table(pictures: Any) -> None:
    """One model by hand, with Student's factor for two degrees of freedom."""
    table = pd.read_csv(PUBLISHED).set_index(["model", "seed"])["bits per byte"]
    gaps = [table["target a", s] - sum(table[f"target sft_{n}", s] for n in (1, 2, 3)) / 3 for s in range(3)]
    mean = sum(gaps) / 3
    half = 4.30265 * math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / 2) / math.sqrt(3)
    found = pictures.differences(pd.read_csv(PUBLISHED)).set_index("model").loc["target a"]
    assert (found["difference"], found["low"], found["high"]) == pytest.approx(
        (mean, mean - half, mean + half), abs=1e-6
    )
    assert found["verdict"] == ("better" if mean + half < 0 else "within noise")
    assert found["against"] == "target sft_* (mean of 3)"


def test_pictures_are_drawn_the_same_each_time(pictures: Any, tmp_path: Path) -> None:
    drawn = []
    for _ in range(2):
        pictures.draw(tmp_path)
        drawn.append({file.name: file.read_bytes() for file in tmp_path.iterdir()})
    assert drawn[0] == drawn[1]
    assert set(drawn[0]) == {"demo.png", "pipeline.svg"}
    assert all(
        f"<!-- {word} -->".encode() in drawn[0]["pipeline.svg"] for word in ("extract", "align", "train", "merge")
    )
    assert all((ROOT / "docs" / name).stat().st_size > 10_000 for name in drawn[0])


def test_a_forest_is_readable_whatever_its_numbers() -> None:
    """Small differences' ticks stand apart; intervals of few seeds do not stretch the axis beyond what there can be."""
    about = {"model": "target a", "kind": "targets", "against": "sft", "verdict": "within noise"}
    long = {**about, "model": "seed1: merged varm_matrix"}
    small = pd.DataFrame([{**long, "difference": -0.0047, "low": -0.0138, "high": 0.0038}])
    (axis,) = forests.forest(small, "bits per byte").axes
    axis.figure.canvas.draw()
    boxes = [label.get_window_extent() for label in axis.get_xticklabels()]
    shown = [box for box in boxes if axis.bbox.x0 <= box.x0 + box.width / 2 <= axis.bbox.x1]
    assert len(shown) > 2
    assert all(left.x1 < right.x0 for left, right in pairwise(shown))
    wide = pd.DataFrame([{**about, "skill": "all", "seeds": 2, "n": 8, "difference": 0.1, "low": -3.0, "high": 3.2}])
    (axis,) = forests.skills(wide).axes
    assert axis.get_xlim() == (-102, 102)
