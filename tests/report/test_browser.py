"""The report in a real browser, wide and as on a phone: every row of a figure's CSV is a mark, and nothing overflows."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from fusechat.app.outputs import read_json, write_json
from fusechat.report import report
from tests.conftest import Mini

pytestmark = pytest.mark.browser
QUIET = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
QUIET += [
    "--disable-background-networking",
    "--disable-component-update",
    "--hide-scrollbars",
    "--virtual-time-budget=5000",
]
LOOK = """<script>addEventListener('load', () => {
  const figures = {}
  for (const svg of document.querySelectorAll('svg[data-name]')) {
    const box = svg.getBoundingClientRect()
    const groups = [...svg.querySelectorAll('[id*="-points-"]')]
    const points = groups.map(group => group.querySelectorAll(group.querySelector('use') ? 'use' : 'path').length)
    figures[svg.dataset.name] = {
      marks: svg.querySelectorAll('[id*="-mark-"]').length + points.reduce((sum, n) => sum + n, 0),
      width: box.width, height: box.height}
  }
  const page = document.documentElement
  parent.postMessage({figures, width: page.clientWidth, needed: page.scrollWidth,
    asked: performance.getEntriesByType('resource').map(entry => entry.name)}, '*')
})</script>"""
FRAME = """<!doctype html><meta charset=utf-8><pre id=seen></pre><script>
addEventListener('message', event => document.getElementById('seen').textContent = JSON.stringify(event.data))
</script><iframe width=%d height=900 style='border:0' src=%s></iframe>"""


def look(page: Path, width: int, folder: Path) -> dict[str, Any]:
    """What a browser of that width makes of the page."""
    browser = shutil.which("chromium")
    assert browser, "this test needs Chromium: apt-get install chromium"
    (folder / "looked.html").write_text(page.read_text().replace("</body>", f"{LOOK}</body>"))
    (folder / "frame.html").write_text(FRAME % (width, "looked.html"))
    command = [browser, *QUIET, f"--user-data-dir={folder}/browser", "--dump-dom", f"file://{folder}/frame.html"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    seen = re.search(r'<pre id="seen">(\{.*?\})</pre>', done.stdout)
    assert seen, done.stdout[-500:] + done.stderr[-500:]
    return dict(json.loads(seen[1]))


@pytest.fixture(scope="module")
def world(mini: Mini, tmp_path_factory: pytest.TempPathFactory) -> Mini:
    """Two targets, SFT, a merge, and their evaluations."""
    world = Mini(shutil.copytree(mini.root, tmp_path_factory.mktemp("browser") / "runs"))
    world.run("train", "source=a")
    world.run("train", "source=b")
    world.run("train", "fusion=sft", "run_name=sft_1")
    world.run("merge", "merge=varm", f"targets=[{world.experiment}/targets/a,{world.experiment}/targets/b]")
    for name in ("world/models/pivot", "targets/a", "targets/b", "targets/sft_1", "merged/varm_matrix"):
        world.run("evaluate", f"model={world.experiment}/{name}")
    return world


@pytest.fixture(scope="module")
def single(world: Mini) -> Path:
    """A report with every figure."""
    return report([world.experiment], world.root / "report", baseline="targets-sft_1").page


@pytest.fixture(scope="module")
def pooled(world: Mini) -> Path:
    """A report of two seeds: the second answers every fourth question otherwise, in more nats."""
    seeds = [Path(shutil.copytree(world.experiment, world.root / f"seeds/seed{seed}")) for seed in range(2)]
    for number, file in enumerate(sorted((seeds[1] / "evaluation").glob("*.json"))):
        content = read_json(file)
        for at, sample in enumerate(content["samples"]):
            sample["nats"] += 0.1 + 0.01 * ((at + number) % 7)
            sample["correct"] ^= (at + number) % 4 == 0
        write_json(file, content)
    return report(seeds, world.root / "both", baseline="targets-sft_1").page


BOTH = ["skills", "training", "objective", "wins", "alignment"]
ONE = [*BOTH, "comparisons", "merge_weights_varm_matrix"]
SEVERAL = [*BOTH, "comparisons_pooled", "comparisons_1", "skills_pooled"]
SEVERAL += [f"merge_weights_seed{seed}_varm_matrix" for seed in range(2)]


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize(("made", "figures"), [("single", ONE), ("pooled", SEVERAL)])
def test_marks_are_rows_and_nothing_overflows(
    made: str, figures: list[str], width: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    page: Path = request.getfixturevalue(made)
    seen = look(page, width, tmp_path)
    assert seen["width"] == width
    assert seen["needed"] <= width, "the page itself never scrolls sideways"
    assert not [name for name in seen["asked"] if not name.startswith("file:")]
    tables = ("results", "cost", "answers")
    rows = {file.stem: pd.read_csv(file) for file in page.parent.glob("*.csv") if file.stem not in tables}
    drawn = {name: len(frame.dropna(subset="weight") if "weight" in frame else frame) for name, frame in rows.items()}
    assert {name: figure["marks"] for name, figure in seen["figures"].items()} == drawn
    assert {*drawn} == {*figures}
    assert all(figure["width"] > 300 and figure["height"] > 80 for figure in seen["figures"].values())
    assert all(drawn.values())
