"""Mutual training in the report: every row of a figure's CSV is one mark."""

import re
from pathlib import Path

import pandas as pd
import pytest

from fusechat.app.outputs import write_json
from fusechat.report import figures, rounds

LINES = """round,side,stage,steps,bits_per_byte,learned,from_server,from_a,sent_bytes
1,server,learned,5,0.5,0.25,,0.25,1000000
1,a,practised,5,0.9,,,,500000
2,a,learned,5,0.8,1.0,1.0,,0
"""


@pytest.fixture
def places(tmp_path: Path) -> dict[str, Path]:
    for name, stage in (("fedmkt", "mutual"), ("other", "train")):
        record = {"stage": stage, "rounds": [{"bytes": {"server": 1_000_000, "a": 500_000}}]}
        write_json(tmp_path / name / "fusechat.json", record)
        (tmp_path / name / "rounds.csv").write_text(LINES)
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished/rounds.csv").write_text(LINES)
    return {"seed0": tmp_path}


def test_rounds_are_read_of_mutual_trainings_alone(places: dict[str, Path]) -> None:
    assert set(rounds.tables(places)["run"]) == {"fedmkt"}
    assert set(rounds.tables({**places, "again": places["seed0"]})["run"]) == {"seed0: fedmkt", "again: fedmkt"}
    assert not len(rounds.tables({"seed0": places["seed0"] / "fedmkt"}))


def test_every_line_is_a_mark(places: dict[str, Path], tmp_path: Path) -> None:
    lines = rounds.tables(places)
    held = rounds.held_out(lines)
    drawn = figures.save(rounds.rounds(held), tmp_path / "rounds.png")
    groups = re.split(r'(?=id="mutual_rounds-points-)', drawn)[1:]
    assert sum(group.split("</g>\n   </g>")[0].count("<use ") for group in groups) == len(held) == 3
    assert "fedmkt (1.5 MB sent)" in drawn
    heard = rounds.heard(lines)
    expected = [
        ("fedmkt: server", "round 1", "itself", 0.75),
        ("fedmkt: server", "round 1", "a", 0.25),
        ("fedmkt: a", "round 2", "server", 1.0),
    ]
    assert [tuple(row) for row in heard.itertuples(index=False)] == expected
    drawn = figures.save(figures.wins(heard, "mutual_heard"), tmp_path / "heard.png")
    assert len(set(re.findall(r'id="(mutual_heard-mark-\d+)"', drawn))) == len(heard)


def test_a_report_without_mutual_training_has_neither_figure() -> None:
    assert not len(rounds.held_out(pd.DataFrame())) and not len(rounds.heard(pd.DataFrame()))
