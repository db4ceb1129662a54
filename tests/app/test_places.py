"""A stage replaces only its own kind's outputs, never an input; the old one goes when the new one is whole."""

import json
import os
from pathlib import Path

import pytest

from fusechat.app.errors import UserError
from fusechat.app.outputs import replace, tidy, whole_directory
from fusechat.app.places import check_inputs, check_owner, stage_of, writes, writing


def made(folder: Path, stage: str, record: str = "fusechat.json", **about: object) -> Path:
    folder.mkdir(parents=True)
    (folder / record).write_text(json.dumps({"stage": stage, **about}))
    return folder


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("runs/pivot", "runs/pivot is an input of this command; choose another place for the output"),
        ("runs", "runs lies above the input .*runs/pivot"),
        ("runs/pivot/new", "runs/pivot/new lies inside the input .*runs/pivot"),
        ("runs/other/../pivot", "is an input of this command"),
        ("link", "link is an input of this command"),
        ("link/new", "link/new lies inside the input"),
    ],
)
def test_inputs_are_never_written(output: str, message: str, tmp_path: Path) -> None:
    pivot = made(tmp_path / "runs/pivot", "train")
    (tmp_path / "link").symlink_to(pivot)
    before = tree(tmp_path)
    for reads in ([pivot], [[str(pivot)]], [{"a": tmp_path / "elsewhere", "b": pivot}], ["Hub/id", None, pivot]):
        with pytest.raises(UserError, match=message), writing(tmp_path / output, "train", reads=reads):
            pass
    assert tree(tmp_path) == before


@pytest.mark.parametrize("what", ["foreign", "another", "file", "inner", "hidden"])
def test_what_another_has_made_is_never_replaced(what: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    if what == "foreign":
        (output / "thesis").mkdir(parents=True)
        message = (
            "out holds what fusechat has not made, and train replaces only its own; choose another with output_dir"
        )
    elif what == "another":
        made(output, "merge")
        message = "out holds what merge has made, and train replaces only its own"
    elif what == "file":
        output.write_text("thesis")
        message = "out is a file; choose another with output_dir=DIR"
    elif what == "inner":
        made(made(output, "train") / "kept/inner", "train")
        message = "out has another output inside, .*kept/inner; .* or move that"
    else:
        output.mkdir()
        (output / ".thesis").touch()
        message = "out holds what fusechat has not made"
    before = tree(tmp_path)
    with pytest.raises(UserError, match=message), writing(output, "train"):
        pass
    assert tree(tmp_path) == before


@pytest.mark.parametrize("record", ["fusechat.json", "manifest.json"])
@pytest.mark.parametrize("content", ["", '{"stage": "tr'])
def test_a_record_that_is_cut_short_is_named(content: str, record: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / record).write_text(content)
    message = rf"out/{record} is half-written or not JSON; if \S+/out is to be made anew, remove it; or choose another"
    with pytest.raises(UserError, match=message), writing(tmp_path / "out", "train"):
        pass
    assert (tmp_path / "out" / record).read_text() == content


@pytest.mark.parametrize("file", [True, False])
def test_devices_and_pipes_are_no_outputs(file: bool, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe is a device, pipe or socket; choose another with output_"):
        check_owner(tmp_path / "pipe", "evaluate", file=file, known=lambda path: bool(path.read_bytes()))


def test_a_symbolic_link_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "out")
    with pytest.raises(UserError, match="out is a symbolic link that leads back to itself; choose another"):
        check_inputs(tmp_path / "out", [])
    with pytest.raises(UserError, match="leads back to itself"), writing(tmp_path / "out", "train"):
        pass


def test_what_may_be_written(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for output in ("absent", "empty", "own", "deep/down"):
        if output == "own":
            made(tmp_path / output, "train")
        with writing(tmp_path / output, "train"):
            pass
    made(made(tmp_path / "world", "world") / "models/a", "tiny")
    check_owner(tmp_path / "world", "world", holds=("tiny",))
    assert tree(tmp_path) == ["empty", "own", "own/fusechat.json", *tree_of_world()]


def tree_of_world() -> list[str]:
    inner = ["models", "models/a", "models/a/fusechat.json"]
    return ["world", "world/fusechat.json", *(f"world/{name}" for name in inner)]


def test_stages_are_read_from_records(tmp_path: Path) -> None:
    assert stage_of(made(tmp_path / "a", "merge")) == "merge"
    old = tmp_path / "b"
    old.mkdir()
    (old / "manifest.json").write_text('{"kind": "aligned", "shards": [], "fingerprint": "0"}')
    assert stage_of(old) == "align"
    (old / "manifest.json").write_text('{"kind": "aligned", "name": "an app of the web"}')
    assert stage_of(old) is None
    (old / "manifest.json").write_text('{"kind": "ali')
    assert stage_of(old) is None
    (old / "fingerprint").write_text('0123\n{"stage": "extract"}\n')
    assert stage_of(old) == "extract", "unfinished"
    (tmp_path / "r.json").write_text('{"stage": "evaluate", "fingerprint": "0"}')
    assert stage_of(tmp_path / "r.json") == "evaluate"


def test_the_decorator_knows_a_stages_arguments(tmp_path: Path) -> None:
    @writes("compare", reads=("first",), output="output_file", known=lambda file: file.read_text() == "old")
    def stage(first: str, output_file: "str | Path | None" = None) -> str:
        if output_file:
            Path(output_file).write_text("old")
        return "done"

    (tmp_path / "in").write_text("x")
    with pytest.raises(UserError, match="in is an input of this command"):
        stage(str(tmp_path / "in"), tmp_path / "in")
    assert stage(str(tmp_path / "in")) == "done"
    for _ in range(2):
        assert stage(str(tmp_path / "in"), tmp_path / "out") == "done"
    (tmp_path / "out").write_text("mine")
    with pytest.raises(
        UserError, match=r"out holds what fusechat has not made, .* choose another with output_file=FILE"
    ):
        stage(str(tmp_path / "in"), output_file=tmp_path / "out")
    assert stage.__name__ == "stage"


def test_the_old_output_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    old = made(tmp_path / "out", "train")
    with pytest.raises(RuntimeError), whole_directory(old, overwrite=True) as directory:
        (directory / "new").touch()
        raise RuntimeError
    assert tree(tmp_path) == ["out", "out/fusechat.json"]
    with whole_directory(old, overwrite=True) as directory:
        (directory / "new").touch()
        assert (old / "fusechat.json").exists()
    assert tree(tmp_path) == ["out", "out/new"]


def test_a_symbolic_link_keeps_pointing_to_the_place_of_the_output(tmp_path: Path) -> None:
    made(tmp_path / "large disk/out", "train")
    (tmp_path / "out").symlink_to(tmp_path / "large disk/out")
    with whole_directory(tmp_path / "out", overwrite=True) as directory:
        (directory / "new").touch()
    assert (tmp_path / "out").is_symlink()
    assert tree(tmp_path / "large disk") == ["out", "out/new"]


@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_kill_between_renames_loses_neither(call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new, calls = made(tmp_path / "out", "train", name="old"), made(tmp_path / ".out.tmp", "train", name="new"), []
    original = {"rename": Path.rename, "rmtree": __import__("shutil").rmtree}

    def counted(name: str) -> object:
        def step(*args: object, **options: object) -> object:
            calls.append(1)
            if len(calls) == call:
                raise KeyboardInterrupt
            return original[name](*args, **options)

        return step

    monkeypatch.setattr("pathlib.Path.rename", counted("rename"))
    monkeypatch.setattr("shutil.rmtree", counted("rmtree"))
    with pytest.raises(KeyboardInterrupt):
        replace(old, new)
    monkeypatch.undo()
    tidy(old)
    assert json.loads((old / "fusechat.json").read_text())["name"] == ("new" if call == 3 else "old")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_temporary_files_of_the_dead_go_and_others_stay(tmp_path: Path) -> None:
    stay = [".b.json.1.tmp", ".a.b.json.1.tmp", ".a.tmp", ".a.notes.tmp"]
    for name in (".a.json.12.tmp", ".a.fingerprint.7.tmp", *stay):
        (tmp_path / name).touch()
    tidy(tmp_path / "a.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(stay)
    store = tmp_path / "store"
    store.mkdir()
    for name in (".data-0.arrow.12.tmp", "data-0.arrow"):
        (store / name).touch()
    tidy(store)
    assert [path.name for path in store.iterdir()] == ["data-0.arrow"]


def test_jobs_of_a_sweep_leave_each_others_temporary_folders(tmp_path: Path) -> None:
    """``.a_lm_weight_0.5.tmp`` looks like a file that process 5 was writing for ``a_lm_weight_0.9``."""
    with whole_directory(tmp_path / "a_lm_weight_0.5") as directory:
        (directory / "weights").touch()
        with whole_directory(tmp_path / "a_lm_weight_0.9") as other:
            (other / "weights").touch()
    assert (tmp_path / "a_lm_weight_0.5/weights").exists() and (tmp_path / "a_lm_weight_0.9/weights").exists()
