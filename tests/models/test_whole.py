"""A model's files are compared with its record whenever it is opened, by whatever opens it."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fusechat.app import checksums
from fusechat.app.errors import UserError
from fusechat.app.outputs import read_json
from fusechat.models.checkpoints import LazyCheckpoint
from fusechat.models.load import load_model, load_tokenizer
from fusechat.models.whole import check_model
from tests.conftest import Mini


@pytest.fixture
def model(tmp_path: Path, mini: Mini, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FUSECHAT_CACHE", str(tmp_path / "memory"))
    checksums.forget()
    return Path(shutil.copytree(mini.experiment / "world/models/a", tmp_path / "a"))


def damage(file: Path, at: float = 0.7) -> None:
    before, data = file.stat(), bytearray(file.read_bytes())
    data[int(at * len(data))] ^= 4
    file.write_bytes(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    checksums.forget()


def streamed(path: str) -> None:
    checkpoint = LazyCheckpoint(path)
    for name in list(checkpoint)[:3]:  # some are read, the rest is not
        checkpoint.tensor(name)
    checkpoint.verify()


OPENERS = {"load_model": load_model, "streamed": streamed, "check_model": check_model, "load_tokenizer": load_tokenizer}
PAIRS = [("load_model", "model.safetensors"), ("streamed", "model.safetensors"), ("check_model", "model.safetensors")]
PAIRS += [(opener, file) for opener in OPENERS for file in ("config.json", "tokenizer.json", "fusechat.json")]


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize(("opener", "file"), PAIRS)
def test_damage_is_found(opener: str, file: str, ours: bool, model: Path) -> None:
    if not ours:
        (model / "fusechat.json").unlink()
        if file == "fusechat.json":
            return
    opening: Callable[[str], object] = OPENERS[opener]
    opening(str(model))
    damage(model / file)
    with pytest.raises(UserError, match=rf"{file} is damaged or half-written .*expected.*found"):
        opening(str(model))


def test_the_error_names_the_command_that_made_it(model: Path) -> None:
    damage(model / "config.json")
    command = read_json(model / "fusechat.json")["command"]
    with pytest.raises(UserError) as caught:
        load_tokenizer(str(model))
    changed = "if you changed it yourself, add accept_changes=true; if not, make it again with: "
    assert str(caught.value).endswith(f"{changed}{command} overwrite=true")


def test_missing_and_cut_short(model: Path) -> None:
    file = model / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-8])
    for opening in (load_model, LazyCheckpoint, check_model):
        with pytest.raises(
            UserError, match=rf"safetensors is damaged \({len(data)} bytes expected, {len(data) - 8} found"
        ):
            opening(str(model))
    (model / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer\.json is missing"):
        load_tokenizer(str(model))


def test_a_changed_model_is_taken_when_told_so(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="accept_changes=true"):
        load_tokenizer(str(model))
    checksums.accept_changes(True)
    try:
        load_tokenizer(str(model))
    finally:
        checksums.accept_changes(False)
    load_tokenizer(str(model))


def test_cards_are_peoples_to_edit(model: Path) -> None:
    (model / "README.md").write_text("mine")
    check_model(model)
