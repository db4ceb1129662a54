"""Chat formats: each is read, recognised, named, and one's own."""

from pathlib import Path

import datasets
import pytest

from fusechat.app.errors import UserError
from fusechat.app.registry import choices
from fusechat.chats.formats import FORMATS, chat_id, load_chats
from tests.chats.test_files import ANSWER, QUESTION
from tests.conftest import Mini, composed

ROWS = {
    "messages": {"messages": [QUESTION, ANSWER]},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "r"}]},
    "alpaca": {"instruction": "q", "input": "", "output": "r"},
    "prompt_response": {"prompt": "q", "response": "r"},
    "text": {"text": "r"},
}


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("name", FORMATS)
def test_formats_are_read(name: str, suffix: str, forced: bool, tmp_path: Path) -> None:
    file = tmp_path / f"chats.{suffix}"
    data = datasets.Dataset.from_list([ROWS[name], ROWS[name]])
    data.to_parquet(file) if suffix == "parquet" else data.to_json(file)
    chats, found = load_chats(file, format=name if forced else None)
    assert found == name
    assert chats["messages"][:] == [[ANSWER] if name == "text" else [QUESTION, ANSWER]] * 2
    assert chats[0]["id"] == chat_id(chats[0]["messages"])
    assert load_chats(data, format=name)[0].to_list() == chats.to_list()
    assert load_chats(chats)[0] is chats


def test_the_groups_files_are_the_formats() -> None:
    assert choices("chat.format") == {name: member.help for name, member in FORMATS.items()}


@pytest.mark.parametrize("override", ["format=alpaca", "chat.format=alpaca"])
def test_two_ways_to_name_a_format(override: str) -> None:
    assert composed("extract", ["experiment=tiny", override]).chat.format == "alpaca"
    assert composed("extract", ["experiment=tiny"]).chat.format is None


def test_a_format_that_does_not_fit_or_is_unknown() -> None:
    both = datasets.Dataset.from_list([{"prompt": "q", "response": "r", "text": "t"}])
    assert load_chats(both)[1] == "prompt_response"
    assert load_chats(both, format="text")[0]["messages"][0] == [{"role": "assistant", "content": "t"}]
    with pytest.raises(
        UserError,
        match=r"^the dataset has the columns prompt, response, text; chat\.format=alpaca needs instruction, output too; "
        r"chat\.format=null finds the format by its columns$",
    ):
        load_chats(both, format="alpaca")
    with pytest.raises(UserError, match=r"^chat\.format='chatml' is unknown; use one of: alpaca, messages, "):
        load_chats(both, format="chatml")


MINE = """
from fusechat.chats.formats import FORMATS

@FORMATS.register("mine", "riddle and solution", needs=("riddle", "solution"))
def mine(row):
    if not row["riddle"]:
        raise ValueError("a riddle is empty")
    return [{"role": "user", "content": row["riddle"]}, {"role": "assistant", "content": row["solution"]}]
"""


def test_a_format_of_ones_own(mini: Mini, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fusechat.stores.store import DistributionStore

    (tmp_path / "my_riddles.py").write_text(MINE)
    (tmp_path / "c.jsonl").write_text('{"riddle": "q", "solution": "r"}\n')
    (tmp_path / "bad.jsonl").write_text('{"riddle": "", "solution": "r"}\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(FORMATS, "_members", dict(FORMATS._members))
    command = ["source=a", "imports=[my_riddles]", f"chat.path={tmp_path}/c.jsonl", f"output_dir={tmp_path}/out"]
    mini.run("extract", *command, "chat.format=mine")
    assert DistributionStore(tmp_path / "out").column("id").tolist() == [chat_id([QUESTION, ANSWER])]
    assert load_chats(tmp_path / "c.jsonl")[1] == "mine", "found by its columns too"
    with pytest.raises(UserError, match=r"bad\.jsonl, chat 0: a riddle is empty$"):
        load_chats(tmp_path / "bad.jsonl", format="mine")
    (tmp_path / "my_riddles.py").write_text(MINE + "# another\n")
    with pytest.raises(UserError, match=r"made with other settings \(imports\.my_riddles: "):
        mini.run("extract", *command, "chat.format=mine")
