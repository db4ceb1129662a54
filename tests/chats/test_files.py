"""Files, folders, datasets and streams of chats, and what is wrong with them."""

import os
from pathlib import Path
from typing import Any

import datasets
import pytest

from fusechat.app import checksums
from fusechat.app.errors import UserError
from fusechat.chats.formats import in_validation, load_chats

QUESTION, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}


def written(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "x.jsonl",
            '{"prompt": "a", "response": "b"}\n{"prompt": \n',
            r"x\.jsonl, line 2: not JSON .*mend or remove the line",
        ),
        ("x.jsonl", "", r"x\.jsonl is empty; see chat\.path"),
        ("x.jsonl", '{"question": "a"}\n', r"has the columns question; expected one of messages: messages; sharegpt"),
        (
            "x.jsonl",
            '{"messages": [{"role": "alien", "content": "b"}]}\n',
            "chat 0: unknown role or key 'alien'; roles are human",
        ),
        ("x.jsonl", '{"messages": []}\n', "chat 0: no messages|is not a role"),
        (
            "x.jsonl",
            '{"messages": [{"role": "user", "content": "b", "tool_calls": [{"id": 1}]}]}\n',
            "chat 0: unknown role or key 'name'",
        ),
        (
            "x.jsonl",
            '{"messages": [{"role": "user", "content": [{"type": "image", "text": ""}]}]}\n',
            "its content is a list of more than text",
        ),
        ("x.txt", "hello", "is not a chat file; expected .json"),
    ],
)
def test_bad_files(name: str, text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        load_chats(written(tmp_path / name, text))


TURN = '{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}'
CHAT = f'{{"messages": [{TURN}]}}'
TWICE = CHAT.replace('"role": "user"', '"role": "user", "role": "user"')
HALF = CHAT.replace('"q"', '"\\ud800"')


@pytest.mark.parametrize("form", ["{0}", "{1}\n\n{0}\n", "[{0}]", "[{1},\n{0}]"])
@pytest.mark.parametrize(
    ("chat", "reason"),
    [
        (TWICE, r"not JSON \(the key 'role' twice, with 'user' and 'user'\); mend or remove"),
        (HALF, r"not JSON \(\\ud800 is half a character\); mend or remove"),
    ],
)
def test_json_that_libraries_read_differently(form: str, chat: str, reason: str, tmp_path: Path) -> None:
    place = {"{0}": ", line 1", "{1}\n\n{0}\n": ", line 3"}.get(form, "")
    with pytest.raises(UserError, match=rf"x\.json{place}: {reason}"):
        load_chats(written(tmp_path / "x.json", form.format(chat, CHAT)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n \n", r"x\.jsonl holds no chats; see chat\.path"),
        ("5\nnull\n", r"x\.jsonl, chat 0: expected an object \{\.\.\}, found 5; see chat\.path"),
        (f"[{CHAT}, null]", r"x\.jsonl, chat 1: expected an object \{\.\.\}, found None"),
        (f"[[{CHAT}]]", r"chat 0: expected an object \{\.\.\}, found \[\{'messages'"),
        ('{"messages": "hello"}', r"chat 0: .* \(messages is 'hello', no list of objects\)$"),
        (CHAT + '\n{"messages": null}', r"chat 1: .* \(messages is None, no list of objects\)$"),
        ('{"conversations": {"from": "gpt"}}', r"\(conversations is \{'from': 'gpt'\}, no list of objects\)$"),
        ('{"instruction": 5, "output": "a"}', r"\(its content is 5\)$"),
        ('{"instruction": "q", "output": 7}', r"\(its content is 7\)$"),
        (CHAT.replace('"q"', '[{"type": "text", "text": 5}]'), r"\(its content is a list of more than text\)$"),
        (CHAT.replace('"a"', '"a", "reasoning_content": "hm"'), "reasoning_content would be lost"),
    ],
)
def test_rows_of_other_forms(text: str, message: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UserError, match=message):
        load_chats(written(tmp_path / "x.jsonl", text))
    assert not caplog.text, "told once"


def test_one_object_may_take_several_lines(tmp_path: Path) -> None:
    pretty = CHAT.replace(", ", ",\n ")
    assert len(load_chats(written(tmp_path / "x.json", pretty))[0]) == 1
    with pytest.raises(UserError, match=r"x\.json: not JSON \(the key 'content' twice"):
        load_chats(written(tmp_path / "y" / "x.json", pretty.replace('"q"', '"q",\n "content": "q"')))


def test_folders_of_files(tmp_path: Path) -> None:
    """Any name, hidden files passed over; other kinds, folders named like files, and links to nothing are told."""
    folder = tmp_path / "ünï 'q\" [1] *?{a}"
    (folder / "inner.jsonl").mkdir(parents=True)
    written(folder / "a b.jsonl", CHAT)
    written(folder / "._a.jsonl", "not JSON")
    written(folder / ".cache/b.jsonl", "not JSON")
    for place in (folder, folder / "a b.jsonl", f"{folder}/"):
        assert len(load_chats(place)[0]) == 1
    (folder / "z.jsonl").symlink_to("/nowhere")
    with pytest.raises(UserError, match=r"z\.jsonl is a link to nothing; mend or remove it"):
        load_chats(folder)
    (folder / "z.jsonl").unlink()
    written(folder / "b.parquet", "")
    with pytest.raises(UserError, match=r"holds files of several kinds \(a b\.jsonl and b\.parquet\); give one"):
        load_chats(folder)


def test_saved_datasets_are_read_and_damage_is_found(tmp_path: Path) -> None:
    saved = datasets.Dataset.from_list([{"text": "t"}])
    saved.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=saved).save_to_disk(str(tmp_path / "several"))
    for name in ("one", "several"):
        before = sorted((tmp_path / name).rglob("*"))
        chats, found = load_chats(tmp_path / name)
        assert (found, chats[0]["messages"]) == ("text", [{"role": "assistant", "content": "t"}])
        assert sorted((tmp_path / name).rglob("*")) == before, "nothing is written into it"
    (file,) = (tmp_path / "several/train").glob("*.arrow")
    status = file.stat()
    data = bytearray(file.read_bytes())
    data[data.index(b"t", len(data) // 2)] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    checksums.forget()
    with pytest.raises(UserError, match=r"\.arrow is damaged"):
        load_chats(tmp_path / "several")
    for state, message in (
        ("{}", r"state\.json is not what datasets writes \('_data_files'\); save the dataset again"),
        ("{", r"state\.json is not what datasets writes \("),
        ('{"_data_files": [{"filename": "x.arrow"}]}', r"x\.arrow is missing; save the dataset again"),
    ):
        with pytest.raises(UserError, match=message):
            load_chats(written(tmp_path / "bad/state.json", state).removesuffix("/state.json"))


def test_text_parts_are_joined(tmp_path: Path) -> None:
    parts = (
        '{"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "text", "text": "r"}]}'
        ', {"role": "assistant", "content": "a"}]}\n'
    )
    chats, _ = load_chats(written(tmp_path / "x.jsonl", parts))
    assert chats[0]["messages"][0] == {"role": "user", "content": "qr"}


def test_streams_are_read_to_their_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "".join(f'{{"prompt": "q{i}", "response": "r"}}\n' for i in range(9))
    stream = datasets.load_dataset(
        "json", data_files=written(tmp_path / "x.jsonl", lines), split="train", streaming=True
    )
    asked: list[Any] = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **o: asked.append((a, o)) or stream)
    chats, found = load_chats("owner/name", split="test", name="en", limit=4, streaming=True)
    assert (found, [chat["messages"][0]["content"] for chat in chats]) == ("prompt_response", ["q0", "q1", "q2", "q3"])
    assert asked == [(("owner/name", "en"), {"split": "test", "streaming": True})]


def test_a_hub_dataset_that_cannot_be_read() -> None:
    with pytest.raises(
        UserError, match=r"chat\.path=owner/name is neither a file here nor a dataset on the Hub that could be read"
    ):
        load_chats("owner/name")


def test_missing_file() -> None:
    with pytest.raises(UserError, match=r"chat\.path=/nowhere\.jsonl does not exist"):
        load_chats("/nowhere.jsonl")


def test_validation_split_is_by_content() -> None:
    held = [i for i in range(4000) if in_validation(f"{i:x}", 0.1, 0)]
    assert 300 < len(held) < 500
    assert held == [i for i in range(4000) if in_validation(f"{i:x}", 0.1, 0)]
    assert held != [i for i in range(4000) if in_validation(f"{i:x}", 0.1, 1)]
