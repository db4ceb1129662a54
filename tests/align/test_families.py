"""The families beside their config groups, members of a user's own, and the Python interface of the stage."""

import multiprocessing
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

from fusechat.align import align
from fusechat.align.maps import TOKEN_MAPS
from fusechat.align.sequence import SEQUENCES
from fusechat.align.stage import check_table, make_alignment
from fusechat.app.errors import UserError
from fusechat.app.registry import Family, choices, import_modules
from fusechat.stores.store import DistributionStore
from tests.conftest import Mini, composed

OWN = """
import numpy as np
from fusechat.align.maps import TOKEN_MAPS, em
from fusechat.align.sequence import SEQUENCES, align_offsets

@TOKEN_MAPS.register("roles_only", "special tokens alone")
def roles_only(source, pivot, roles):
    table = np.full(len(source), -1)
    for own, theirs in roles:
        table[own] = theirs
    return table

@SEQUENCES.register("pairwise", "position n with position n", needs=("texts",))
def pairwise(pivot, source):
    n, m = len(pivot), len(source)
    return np.where(np.arange(n) < m, np.arange(n), -1), np.where(np.arange(n) < m, 0, 3).astype(np.uint8)
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """A user's module in the working folder, imported; the families are as they were afterwards."""
    (tmp_path / "my_alignment.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for family in (TOKEN_MAPS, SEQUENCES):
        monkeypatch.setattr(family, "_members", dict(family._members))
    yield import_modules(["my_alignment"])
    del sys.modules["my_alignment"]


@pytest.fixture
def spawned() -> Iterator[None]:
    """Processes that begin with nothing imported, as on every system but Linux."""
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("spawn", force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


def hashes(manifest: dict[str, Any]) -> list[str]:
    return [entry["xxh3_128"] for entry in manifest["shards"]]


@pytest.mark.parametrize("family", [TOKEN_MAPS, SEQUENCES], ids=lambda f: f.key)
def test_the_config_group_lists_the_members(family: Family) -> None:
    assert choices(family.key) == {name: member.help for name, member in family.items()}


def test_a_sequence_is_chosen_by_group_or_by_key() -> None:
    by_group, by_key = composed("align", ["alignment=dtw"]), composed("align", ["alignment.sequence=dtw"])
    assert OmegaConf.to_container(by_group.alignment) == OmegaConf.to_container(by_key.alignment)
    assert dict(by_group.alignment) == {"sequence": "dtw", "unmatched": "gold", "num_proc": 1}


def test_members_of_a_users_own_reach_new_processes(
    own: dict[str, str], spawned: None, mini: Mini, tmp_path: Path
) -> None:
    stores = mini.experiment / "distributions/pivot", mini.experiment / "distributions/a"
    names = {"token_map": "roles_only", "sequence": "pairwise", "imports": own}
    one, two = align(*stores, tmp_path / "one", **names), align(*stores, tmp_path / "two", **names, num_proc=2)
    assert hashes(one) == hashes(two)
    assert (one["token_map"], one["sequence"]) == ("roles_only", "pairwise")
    changed = align(*stores, tmp_path / "changed", **{**names, "imports": {"my_alignment": "another source"}})
    assert (changed["fingerprint"] != one["fingerprint"]) and hashes(changed) == hashes(one)
    store, pivot = DistributionStore(tmp_path / "one"), DistributionStore(stores[0])
    for row in range(len(store)):
        counts, ids = store.row(row, "counts", "ids")
        assert len(counts) == len(pivot.gold(row))
        assert set(ids.tolist()) <= set(pivot.manifest["special_ids"])


def test_the_command_takes_members_of_a_users_own(own: dict[str, str], mini: Mini, tmp_path: Path) -> None:
    chosen = ["imports=[my_alignment]", "token_map.name=roles_only", "alignment.sequence=pairwise"]
    mini.run("align", "source=a", *chosen, f"output_dir={tmp_path}/out")
    stores = mini.experiment / "distributions/pivot", mini.experiment / "distributions/a"
    wanted = align(*stores, tmp_path / "python", token_map="roles_only", sequence="pairwise", imports=own)
    assert DistributionStore(tmp_path / "out").manifest == wanted


def test_from_python_it_makes_what_the_command_makes(mini: Mini, tmp_path: Path) -> None:
    made: list[dict[str, Any]] = []
    stores = mini.experiment / "distributions/pivot", mini.experiment / "distributions/a"
    manifest = align(*stores, tmp_path / "a", when_made=made.append)
    assert manifest == DistributionStore(mini.experiment / "aligned/a").manifest
    assert align(*stores, tmp_path / "a", when_made=made.append) == manifest
    assert made == [manifest], "the second call leaves the store as it is"
    with pytest.raises(
        UserError, match=r"holds a store made with other settings .*; add overwrite=true .*output_dir=DIR"
    ):
        align(*stores, tmp_path / "a", unmatched="gold")
    assert align(*stores, tmp_path / "a", unmatched="gold", overwrite=True)["fingerprint"] != manifest["fingerprint"]


def test_an_unfinished_store_of_other_settings_is_refused(mini: Mini, tmp_path: Path) -> None:
    stores = mini.experiment / "distributions/pivot", mini.experiment / "distributions/a"
    align(*stores, tmp_path / "a")
    (tmp_path / "a/manifest.json").unlink()
    with pytest.raises(
        UserError, match=r"unfinished store made with other settings \(.*\); add overwrite=true .*output_dir=DIR"
    ):
        align(*stores, tmp_path / "a", token_map="em")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            np.zeros(4, np.int64),
            r"token_map=mine gives int64 \[4\]; expected int64 \[3\]: for every source token one of",
        ),
        (np.zeros(3), r"gives float64 \[3\]; expected int64 \[3\]"),
        (np.array([0, 1, 5]), r"one of the pivot's ids, at most 4, or -1"),
        (np.array([0, 1, -2]), r"one of the pivot's ids, at most 4, or -1"),
    ],
)
def test_a_table_that_is_none_is_refused(table: np.ndarray, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_table(table, "mine", 3, 5)
    check_table(np.array([-1, 0, 4]), "mine", 3, 5)


def test_prefix_wants_a_pivot_that_reports_offsets(mini: Mini) -> None:
    store, slow = DistributionStore(mini.experiment / "distributions/pivot"), SimpleNamespace(is_fast=False)
    settings = {"token_map": "prefix", "sequence": "dtw", "unmatched": "skip", "logprobs": "float16"}
    with pytest.raises(
        UserError, match=r"token_map=prefix asks .* it is a slow one; use one of: em, hybrid, mined, ms, uld"
    ):
        make_alignment(store, store, (slow, slow), **settings)
