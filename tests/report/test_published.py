"""One's own results beside published ones."""

from pathlib import Path

import pandas as pd
import pytest

from fusechat.app.errors import UserError
from fusechat.report.published import PACKAGE, beside

FILE = "tiny/published.csv"


def test_the_published_seeds_agree_with_themselves() -> None:
    published = pd.read_csv(PACKAGE / FILE)
    assert set(published["seed"]) == {0, 1, 2}
    for seed, table in published.groupby("seed"):
        found = beside(table.drop(columns="seed"), FILE, int(str(seed)))
        assert len(found) == 2 * len(table)
        assert (found["difference"] == 0).all()
        assert set(found["within"]) == {"yes"}


def test_a_value_outside_its_interval_is_said() -> None:
    table = pd.read_csv(PACKAGE / FILE).query("seed == 0 and model == 'target a'").drop(columns="seed")
    table["bits per byte"] += 0.1
    bits, accuracy = beside(table, FILE, 0).to_dict("records")
    assert (bits["metric"], bits["difference"], bits["within"]) == ("bits per byte", 0.1, "NO")
    assert (accuracy["difference"], accuracy["within"]) == (0, "yes")


def test_a_seed_without_published_results_has_none() -> None:
    assert beside(pd.read_csv(PACKAGE / FILE), FILE, 7).empty


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"report.published=.*none.csv does not exist; give a CSV of published results, or null"
    ):
        beside(pd.DataFrame(), tmp_path / "none.csv", 0)
