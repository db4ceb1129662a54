"""Where Hugging Face's cache of the chats cannot be written."""

import errno
import json
import os
from pathlib import Path
from typing import Any, NoReturn

import datasets
import pytest

from fusechat.app.errors import UserError
from fusechat.chats.formats import load_chats


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": turns}))
    return tmp_path / "chats.jsonl"


def test_a_cache_that_cannot_be_made_is_named(chats: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = chats.parent / "file/cache"
    (chats.parent / "file").touch()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(place))
    told = rf"{chats.parent}/file\S* cannot be written \(\w.*\), where Hugging Face keeps .*; HF_HOME=DIR names another"
    with pytest.raises(UserError, match=told):
        load_chats(str(chats))


def test_a_full_disk_is_no_fault_of_the_chats(chats: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "cache")

    monkeypatch.setattr(datasets, "load_dataset", full)
    with pytest.raises(OSError, match="No space left on device"):
        load_chats(str(chats))
