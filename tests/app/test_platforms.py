"""What Linux alone has is done without elsewhere: a Mac has no affinity of processes and no files without a name."""

import os
from pathlib import Path

import pytest

from fusechat.app import threads
from fusechat.app.errors import UserError
from fusechat.app.surroundings import check_writable


def test_cores_are_counted_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delattr(os, "sched_getaffinity")
    assert threads.count() == os.cpu_count()


def test_folders_are_tried_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "O_TMPFILE")
    check_writable("output_dir", tmp_path / "new/output")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"output_dir=\S+ cannot be written \(\S+ is a file\)"):
        check_writable("output_dir", tmp_path / "file/output")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
