"""What a merge and a search say while one waits, and at their end."""

import logging
import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from fusechat.app import progress
from tests.conftest import Mini

MODELS = "targets=[{x}/world/models/pivot,{x}/targets/other]"


def told(caplog: pytest.LogCaptureFixture, name: str = "") -> list[str]:
    return [record.message for record in caplog.records if record.name.startswith(name)]


@pytest.fixture(autouse=True)
def other(fresh: Mini) -> None:
    """A target: the pivot's weights, moved."""
    place = Path(shutil.copytree(fresh.experiment / "world/models/pivot", fresh.experiment / "targets/other"))
    (place / "fusechat.json").unlink()
    weights = load_file(place / "model.safetensors")
    moved = {name: tensor + 0.01 for name, tensor in weights.items()}
    save_file(moved, place / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(autouse=True)
def at_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line for each step."""
    caplog.set_level(logging.INFO, "fusechat")
    monkeypatch.setattr(progress, "LINES", 0.0)
    monkeypatch.setattr(progress, "MEGABYTE", 1000)


@pytest.mark.parametrize(
    ("overrides", "steps", "end"),
    [
        (
            ["merge=varm"],
            ("measure target 2", "merge by varm"),
            r"merged varm_\w+: varm of 2 targets, \d+ parameters, "
            r"\d+ kB; weights 0\.00 to 0\.00, 1\.00 to 1\.00; in \d\.\d s, /\S+$",
        ),
        (["merge=linear"], ("merge by linear",), r"merged linear\w*: linear of 2 targets, \d+ parameters, \d+ kB; in "),
        (
            ["merge=compress", "target={x}/targets/other"],
            ("compress",),
            r"compressed \w+: .* % of the target; relative error",
        ),
    ],
)
def test_a_merge(
    overrides: list[str], steps: tuple[str, ...], end: str, fresh: Mini, caplog: pytest.LogCaptureFixture
) -> None:
    fresh.run("merge", *(text.format(x=fresh.experiment) for text in (MODELS, *overrides)))
    lines = told(caplog, progress.__name__)
    for step in steps:
        mine = [line for line in lines if line.startswith(f"{step}: ")]
        assert mine and re.match(rf"{step}: [\d,]+ of [\d,]+ MB \(100 %\), [\d,.]+ MB/s, ", mine[-1]), lines
    assert re.match(end, told(caplog)[-1]), told(caplog)[-1]


def test_a_search(fresh: Mini, caplog: pytest.LogCaptureFixture) -> None:
    from fusechat.merging.recipe import Recipe
    from fusechat.merging.search import search

    models = [fresh.experiment / name for name in ("world/models/pivot", "targets/other")]
    recipe = lambda method, settings: (Recipe(method, models[0], models, {}, **settings), {})
    places = fresh.root / "search", fresh.root / "merged/best"
    places[1].parent.mkdir()
    space = {"linear": {"dtype": ["float32", "bfloat16"]}}
    search(recipe, lambda path: 1.5, space, *places, trials=2, seed=0)
    lines = [line for line in told(caplog, progress.__name__) if line.startswith("search: ")]
    assert re.match(r"search: 2 of 2 merges \(100 %\), .* merges/s, best 1\.5000 bits per byte, 0\.0 s left", lines[-1])
    end = rf"the best of \d merge\(s\): linear, 1\.5000 held-out bits per byte; in \d+(\.\d)? s, {places[1]}$"
    assert re.match(end, told(caplog)[-1]), told(caplog)[-1]
