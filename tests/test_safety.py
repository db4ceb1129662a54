"""No command destroys what it did not make, with ``overwrite=true`` or without."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from fusechat.app.errors import UserError
from fusechat.stores.store import DistributionStore
from tests.conftest import Mini

TARGETS = "targets=[{x}/world/models/pivot,{x}/world/models/a]"
MERGE = ["merge=linear", "pivot.path={x}/world/models/pivot", "targets=[{x}/targets/one,{x}/targets/two]"]
REFUSED = [  # stage, overrides ({x}: the experiment's folder), message
    ("merge", [*MERGE, "output_dir={x}"], "lies above the input"),
    ("merge", [*MERGE, "output_dir={x}/world/models/pivot"], "is an input of this command"),
    ("merge", [*MERGE, "output_dir={x}/targets/one/merged"], "lies inside the input"),
    ("merge", [*MERGE, "output_dir={x}/aligned/a"], "holds what align has made, and merge replaces only its own"),
    ("train", ["source=a", "output_dir={x}/aligned/b"], "holds what align has made, and train replaces only its own"),
    ("train", ["source=a", "output_dir={x}/aligned/a"], "is an input of this command"),
    ("train", ["source=a", "output_dir={x}"], "lies above the input"),
    ("align", ["source=a", "output_dir={x}/distributions/a"], "is an input of this command"),
    ("align", ["source=a", "output_dir={x}/distributions"], "lies above the input"),
    ("extract", ["source=a", "output_dir={x}/world/models/b"], "holds what tiny has made, and extract replaces only"),
    ("extract", ["source=a", "output_dir={x}/aligned/b"], "holds what align has made"),
    ("extract", ["source=a", "output_dir={x}/notes"], "holds what fusechat has not made"),
    ("evaluate", ["model={x}/world/models/a", "output_file={x}/world/models/a/result.json"], "lies inside the input"),
    ("evaluate", ["model={x}/world/models/a", "output_file={x}/world/chats/test.jsonl"], "is an input of this command"),
    ("evaluate", ["model={x}/world/models/a", "output_file={x}/notes/a.json"], "holds what fusechat has not made"),
    ("evaluate", ["model={x}/world/models/a", "output_file={x}/notes"], "is a folder; choose another with output_file"),
    ("tiny", ["output_dir={x}/notes"], "holds what fusechat has not made, and world replaces only its own"),
    ("tiny", ["output_dir={x}/aligned/a"], "holds what align has made"),
    ("report", ["output_dir={x}"], "lies above the input"),
    ("report", ["output_dir={x}/notes"], "holds what fusechat has not made"),
    ("compare", ["first={x}/notes/a.json", "second={x}/notes/b.json", "output_file={x}/notes/b.json"], "is an input"),
    ("compare", ["first={x}/notes/a.json", "second={x}/notes/b.json", "output_file={x}/notes/c.csv"], "has not made"),
    ("judge", ["answers={x}/notes/a.json", "output_file={x}/notes/a.json"], "is an input of this command"),
    ("judge", ["answers={x}/notes/a.json", "output_file={x}/notes/c.csv"], "holds what fusechat has not made"),
    ("preview", ["output_file={x}/world/chats/fusion.jsonl"], "is an input of this command"),
    ("preview", ["output_file={x}/notes/c.csv"], "holds what fusechat has not made"),
    ("merge_search", [*MERGE, "output_dir={x}/targets/one"], "is an input of this command"),
    ("merge_search", [*MERGE, "search.folder={x}/notes"], "and merge_search replaces only its own"),
]


def contents(folder: Path) -> dict[str, str]:
    """Every file's hash."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(scope="module")
def experiment(mini: Mini, tmp_path_factory: pytest.TempPathFactory) -> Mini:
    """The miniature world, two targets, and a folder of the user's own."""
    root = tmp_path_factory.mktemp("safety")
    world = Mini(Path(shutil.copytree(mini.root, root / "runs")))
    for name in ("one", "two"):
        shutil.copytree(world.experiment / "world/models/a", world.experiment / "targets" / name)
    (world.experiment / "notes").mkdir()
    for name in ("a.json", "b.json", "c.csv", "thesis.txt"):
        (world.experiment / "notes" / name).write_text('{"mine": 1}')
    return world


@pytest.mark.parametrize("overwrite", ["overwrite=true", "overwrite=false"])
@pytest.mark.parametrize(("stage", "overrides", "message"), REFUSED, ids=[f"{s} {o[-1]}" for s, o, _ in REFUSED])
def test_nothing_of_others_is_replaced(
    stage: str, overrides: list[str], message: str, overwrite: str, experiment: Mini
) -> None:
    before = contents(experiment.root)
    judging = ["judge.base_url=http://localhost:1/v1", "judge.model=x"] if stage == "judge" else []
    with pytest.raises(UserError, match=message):
        experiment.run(stage, *[o.format(x=experiment.experiment) for o in overrides], overwrite, *judging)
    assert contents(experiment.root) == before


def test_a_store_is_replaced_when_the_new_one_is_whole(fresh: Mini, monkeypatch: pytest.MonkeyPatch) -> None:
    from fusechat.stores.writer import StoreWriter

    folder, again = fresh.experiment / "distributions/a", ("extract", "source=a", "extract.top_k=4", "overwrite=true")
    before, write = contents(folder), StoreWriter.write

    def second_fails(self: StoreWriter, index: int, *arguments: object) -> None:
        if index == 1:
            raise KeyboardInterrupt
        write(self, index, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(StoreWriter, "write", second_fails)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fresh.run(*again)
    assert contents(folder) == before, "the old store is whole"
    grown = folder.with_name(".a.new") / "data-00000-of-00003.arrow"
    time = grown.stat().st_mtime_ns
    monkeypatch.undo()
    assert fresh.run(*again) is None
    assert (folder / grown.name).stat().st_mtime_ns == time, "gone on with"
    assert DistributionStore(folder).manifest["extract"]["top_k"] == 4
    assert sorted(path.name for path in folder.parent.iterdir()) == ["a", "b", "c", "pivot"]
    assert not list(folder.glob("shard-*.json"))


def test_a_stage_that_failed_before_writing_has_claimed_nothing(fresh: Mini) -> None:
    folder = fresh.experiment / "distributions/other"
    with pytest.raises(UserError, match=r"chat\.max_length=4096"):
        fresh.run("extract", "source=a", "chat.max_length=4096", f"output_dir={folder}")
    assert not folder.exists()
    fresh.run("extract", "source=a", f"output_dir={folder}")


def test_outputs_of_earlier_versions_are_recognised(fresh: Mini) -> None:
    """Records without a stage, unfinished stores that say only their fingerprint, worlds and reports without one."""
    folder = fresh.experiment / "aligned/a"
    manifest = json.loads((folder / "manifest.json").read_text())
    for key in ("stage", "decided_by", "checksum"):
        del manifest[key]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "fingerprint").write_text(manifest["fingerprint"])
    (fresh.experiment / "world/fusechat.json").unlink()
    with pytest.raises(UserError, match=rf"with other settings \(fingerprint {manifest['fingerprint']}, now \w+\)"):
        fresh.run("align", "source=a", "token_map=em")
    fresh.run("align", "source=a", "token_map=em", "overwrite=true")
    (folder / "manifest.json").unlink()
    (folder / "fingerprint").write_text(manifest["fingerprint"])
    with pytest.raises(UserError, match=r"holds an unfinished store made with other settings \(fingerprint"):
        fresh.run("align", "source=a", "token_map=em")
    fresh.run("align", "source=a", "token_map=em", "overwrite=true")
    fresh.run("tiny")
    report = fresh.experiment / "report"
    report.mkdir()
    for name in ("results.csv", "index.html", "results.png"):
        (report / name).touch()
    with pytest.raises(UserError, match="holds no evaluations"):
        fresh.run("report")
