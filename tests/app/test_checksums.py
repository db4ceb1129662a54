"""Checksums: sealed JSON, files against their record, what is remembered of files from elsewhere."""

import json
import os
from pathlib import Path

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from fusechat.app import checksums, remembered
from fusechat.app.errors import UserError
from fusechat.app.outputs import read_json, sealed_line, whole_lines, write_json
from fusechat.app.sealed import seal, unsealed

CONTENT = st.dictionaries(
    st.text(max_size=4), st.integers() | st.text(max_size=5) | st.lists(st.booleans()), max_size=4
)


@pytest.fixture(autouse=True)
def own_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSECHAT_CACHE", str(tmp_path / "memory"))
    checksums.forget()


def flip(path: Path, at: int, bit: int = 0) -> None:
    """Changes one bit; the time of modification stays."""
    before, data = path.stat(), bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    checksums.forget()


@given(CONTENT, st.sampled_from([None, 1]))
def test_sealed_objects_are_json_and_come_back(content: dict[str, object], indent: int | None) -> None:
    content.pop("checksum", None)
    text = seal(json.dumps(content, indent=indent))
    assert json.loads(text).keys() == {"checksum", *content}
    assert unsealed(text.encode(), "x") == content


@given(CONTENT, st.data())
def test_no_changed_byte_of_a_sealed_object_is_taken(content: dict[str, object], data: st.DataObject) -> None:
    content.pop("checksum", None)
    text = bytearray(seal(json.dumps(content)).encode())
    text[data.draw(st.integers(0, len(text) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(UserError, match="is damaged|is half-written"):
        unsealed(bytes(text), "x")


def test_json_of_older_versions_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text('{"fingerprint": "f"}')
    assert read_json(tmp_path / "old.json") == {"fingerprint": "f"}


def test_the_error_says_file_expected_found_and_remedy(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": 1})
    flip(tmp_path / "a.json", -4)
    with pytest.raises(UserError) as caught:
        read_json(tmp_path / "a.json")
    expected = json.loads((tmp_path / "a.json").read_text())["checksum"].removeprefix("xxh3_128:")
    found = xxhash.xxh3_128_hexdigest((tmp_path / "a.json").read_bytes()[len('{"checksum": "xxh3_128:') + 32 :])
    assert str(caught.value) == (
        f"{tmp_path}/a.json is damaged or half-written (xxh3_128 {expected} expected, {found} found); "
        "remove it and run the command that made it again"
    )


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    file = tmp_path / "x.part"
    file.write_text(sealed_line({"a": 1}) + sealed_line({"a": 2}) + '{"cut')
    assert whole_lines(file) == [{"a": 1}, {"a": 2}]
    flip(file, -3)
    with pytest.raises(
        UserError, match=r"x\.part, line 2 is damaged .*; remove the file and run the same command again"
    ):
        whole_lines(file)


@pytest.mark.parametrize("size", [0, 1, 4096, 4097, 200_000])
def test_digest_and_stream_are_those_of_the_whole(tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksums, "WINDOW", 1 << 16)
    (tmp_path / "f").write_bytes(data := os.urandom(size))
    wanted = xxhash.xxh3_128_hexdigest(data)
    assert checksums.digest(tmp_path / "f") == wanted
    for cuts in ([], [(0, size)], [(0, size // 2)], [(size // 3, size)], [(0, size // 3), (size // 3, size // 2)]):
        seen = []
        stream = checksums.Stream(tmp_path / "f", b"", lambda path, found: seen.append(found))
        for start, end in cuts:
            stream.feed(start, data[start:end])
        stream.finish()
        stream.finish()
        assert seen == [wanted]


def test_missing_cut_short_and_changed_files(tmp_path: Path) -> None:
    file = tmp_path / "data"
    file.write_bytes(b"0123456789")
    entry = checksums.entry(file)
    checksums.check(file, entry)
    flip(file, 3)
    with pytest.raises(UserError, match=r"data is damaged or half-written \(xxh3_128 .* expected, .* found\); again"):
        checksums.check(file, entry, "again")
    file.write_bytes(b"01234")
    with pytest.raises(UserError, match=r"data is damaged \(10 bytes expected, 5 found\); again"):
        checksums.check(file, entry, "again")
    file.unlink()
    with pytest.raises(UserError, match="data is missing; again"):
        checksums.check(file, entry, "again")


def test_sha256_of_older_versions_is_compared(tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(b"abc")
    sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    checksums.check(tmp_path / "old", {"bytes": 3, "sha256": sha256})
    flip(tmp_path / "old", 1)
    with pytest.raises(UserError, match=f"sha256 {sha256} expected"):
        checksums.check(tmp_path / "old", {"bytes": 3, "sha256": sha256})


def test_files_from_elsewhere_are_known_since_their_first_use(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"0123456789")
    checksums.check_first_use(file)
    flip(file, 3)
    with pytest.raises(UserError, match="weights is damaged .*it changed since its first use without being written"):
        checksums.check_first_use(file)
    file.write_bytes(b"another!!!")  # written: another file, known from now on
    checksums.forget()
    checksums.check_first_use(file)
    flip(file, 0)
    with pytest.raises(UserError, match="weights is damaged"):
        checksums.check_first_use(file)


def test_what_is_remembered_may_itself_be_damaged(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"0123456789")
    checksums.check_first_use(file)
    flip(tmp_path / "memory/checksums.jsonl", 60)
    checksums.check_first_use(file)
    with (tmp_path / "memory/checksums.jsonl").open("a") as memory:
        memory.write('{"path": "cut by a k')
    checksums.forget()
    checksums.check_first_use(file)


def test_cached_trusts_what_another_process_has_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "data"
    file.write_bytes(b"0123456789")
    entry = checksums.entry(file)
    remembered.verify("cached")
    try:
        checksums.forget()
        checksums.check(file, entry)
        checksums.forget()
        monkeypatch.setattr(checksums, "_read", lambda *_: pytest.fail("read again"))
        checksums.check(file, entry)
        monkeypatch.undo()
        os.utime(file, ns=(0, 0))
        file.write_bytes(b"x123456789")
        with pytest.raises(UserError, match="is damaged"):
            checksums.check(file, entry)
    finally:
        remembered.verify("always")
    with pytest.raises(UserError, match="verify='often' is unknown; use one of: always, cached"):
        remembered.verify("often")
