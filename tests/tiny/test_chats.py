"""The tiny world's chats: which answers are wrong, and that validation and test are clean and ask what is new."""

import itertools
import json
from collections.abc import Callable
from typing import Any

import pytest

from fusechat.app.errors import UserError
from fusechat.chats.render import ChatRenderer
from fusechat.tiny.chats import World, generate
from fusechat.tiny.training import Batches
from tests.conftest import Mini


def questions(rows: list[dict[str, Any]]) -> set[str]:
    return {row["messages"][0]["content"] for row in rows}


@pytest.fixture(scope="module")
def chats(mini: Mini) -> dict[str, list[dict[str, Any]]]:
    """Every file of the world."""
    files = (mini.experiment / "world/chats").glob("*.jsonl")
    return {file.stem: [json.loads(line) for line in file.read_text().splitlines()] for file in files}


def test_validation_is_clean_and_the_flag_says_which_answers_are_wrong(chats: dict[str, list[dict[str, Any]]]) -> None:
    """Else the validation metric ranks targets by how well they learned mistakes."""
    right = {item.question: item.answer for item in World(0).fixed}
    for name, rows in chats.items():
        for row in (row for row in rows if row["tag"] in ("knowledge", "lexicon", "calendar")):
            question, answer = (message["content"] for message in row["messages"])
            assert row["noisy"] == (answer != right[question]), (name, question)
    noisy = {name: sum(row["noisy"] for row in rows) / len(rows) for name, rows in chats.items()}
    assert 0.1 < noisy.pop("fusion") < 0.3
    assert set(noisy.values()) == {0.0}


def test_validation_and_test_ask_what_is_new(chats: dict[str, list[dict[str, Any]]]) -> None:
    assert not questions(chats["validation"]) & questions(chats["fusion"])
    for name in ("fusion", "validation", "train_a", "train_pivot"):
        assert not questions(chats["test"]) & questions(chats[name])


def test_trainings_validate_with_it(mini: Mini) -> None:
    cfg = mini.cfg("train", "source=a")
    assert cfg.validation.path == f"{mini.experiment}/world/chats/validation.jsonl"


def test_a_world_without_more_questions_says_so() -> None:
    with pytest.raises(UserError, match=r"has 84 test chats that ask what no other does, 85 are wanted"):
        generate(World(0), 85, "test 0", weights={"calendar": 1.0}, held_out=True)
    assert len(generate(World(0), 84, "test 0", weights={"calendar": 1.0}, held_out=True)) == 84


def test_fewer_chats_than_a_batch_are_a_batch(tokenizers: Callable[[str], Any]) -> None:
    rows = generate(World(0), 3, "train 0")
    data = Batches(rows, ChatRenderer(tokenizers("a")), batch_size=8, seed="a", pad=0)
    shapes = [batch["input_ids"].shape[0] for batch in itertools.islice(data, 2)]
    assert shapes == [3, 3]
