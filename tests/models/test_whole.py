"""A model's files are compared with its record whenever it is opened, by whatever opens it."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fusechat.app import checksums
from fusechat.app.errors import UserError
from fusechat.app.outputs import read_json, write_json
from fusechat.models import changes
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
    wrong = rf"{file} is damaged or half-written .*expected.*found|was changed .*{file}: \S+: \S+ when made, \S+ now"
    with pytest.raises(UserError, match=wrong):
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


def test_what_was_edited_is_named_by_key_once(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4096, "mine": [1]}))
    (model / "chat_template.jinja").write_text("{{ messages }}")
    generation = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps({**generation, "temperature": 0.5}))
    tokenizer = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "chat_template": "{{ 1 }}"}, indent=4))
    was = config["max_position_embeddings"]
    keys = f"config.json: max_position_embeddings: {was} when made, 4096 now; mine: unset when made, [1] now; "
    keys += "generation_config.json: temperature: unset when made, 0.5 now; the chat template)"
    told = f"{model} was changed since it was made (the chat template; {keys}; "
    for opening in (load_tokenizer, streamed, check_model):
        with pytest.raises(UserError) as caught:
            opening(str(model))
        assert str(caught.value).startswith(told + "if you changed it yourself, add accept_changes=true; if not, make")
    checksums.accept_changes(True)
    try:
        load_tokenizer(str(model))
        check_model(model)
    finally:
        checksums.accept_changes(False)
    assert [record.message for record in caplog.records].count(f"accepted as it is now: {told[:-2]}") == 1
    streamed(str(model))
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"max_position_embeddings: 4096 when made, {was} now"):
        check_model(model)


def test_what_is_kept_of_a_config_is_small(model: Path) -> None:
    files = read_json(model / "fusechat.json")["files"]
    kept = [name for name, entry in files.items() if "values" in entry]
    assert kept == ["config.json", "generation_config.json", "tokenizer_config.json"]
    large = {"tokens": {str(n): {"content": "x" * 50} for n in range(5000)}, "model_type": "llama"}
    (model / "config.json").write_text(json.dumps(large))
    assert len(json.dumps(changes.values(model / "config.json"))) < 200
    assert changes.values(model / "tokenizer.json") == {}


def test_records_without_values_name_the_file(model: Path) -> None:
    record = read_json(model / "fusechat.json")
    for entry in record["files"].values():
        entry.pop("values", None)
    write_json(model / "fusechat.json", record)
    (model / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"config\.json is damaged \(\d+ bytes expected, 2 found\); if you changed it"):
        load_tokenizer(str(model))


def test_cards_are_peoples_to_edit(model: Path) -> None:
    (model / "README.md").write_text("mine")
    check_model(model)
