"""What leaves a side: a whitelist, nothing private, and nothing that is broken is taken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from transformers import AutoTokenizer

from fusechat.app import checksums
from fusechat.app.errors import UserError
from fusechat.app.outputs import write_json
from fusechat.mutual.federation import Federation
from fusechat.mutual.messages import KNOWLEDGE, Envelope, read
from fusechat.mutual.methods import SERVER, _hear
from fusechat.stores.store import DistributionStore
from tests.mutual.conftest import CANARY, Small

RUN = 6  # tokens in a row that no message may have of a canary


def leaks(data: bytes, text: str, ids: list[int]) -> bool:
    """Whether bytes hold a text, its beginning left out, or a run of its tokens, as any integers that files use."""
    runs = [ids[first : first + RUN] for first in range(len(ids) - RUN + 1)]
    kinds = ("<u2", "<u4", "<i4", "<i8")
    return text[4:].encode() in data or any(np.array(run, kind).tobytes() in data for run in runs for kind in kinds)


def messages(made: Federation) -> list[Path]:
    return sorted(file for file in (made.folder / "exchange").rglob("*") if file.is_file())


def test_nothing_private_leaves_in_three_rounds(small: Small, ended: Federation) -> None:
    for name in ("a", "b"):
        text = CANARY.format(name)
        for model in ("server", "a", "b"):
            ids = AutoTokenizer.from_pretrained(small.root / model)(text, add_special_tokens=False)["input_ids"]
            assert len(ids) > RUN
            assert not [file for file in messages(ended) if leaks(file.read_bytes(), text, ids)]
    assert {file.name for file in messages(ended)} == {"envelope.json", "knowledge.arrow"}
    assert len(messages(ended)) == 2 * 3 * 3


@pytest.mark.parametrize("as_text", [True, False])
def test_a_planted_canary_is_found(as_text: bool, small: Small, ended: Federation, tmp_path: Path) -> None:
    text = CANARY.format("a")
    ids = AutoTokenizer.from_pretrained(small.root / "a")(text, add_special_tokens=False)["input_ids"]
    table = pa.table({"row": [1], "ids": pa.array([ids], pa.list_(pa.uint32()))})
    if as_text:
        table = pa.table({"text": [f"... {text} ..."]})
    with pa.OSFile(str(tmp_path / "planted"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    assert leaks((tmp_path / "planted").read_bytes(), text, ids)
    private = ended.folder / "sides/a/private"
    assert any(leaks(file.read_bytes(), text, ids) for file in private.iterdir()), "the store that stays at home has it"


def test_a_message_says_what_the_sender_said(ended: Federation) -> None:
    """Heard through a message, a model's distributions are what it extracted itself."""
    side, name = ended.side(SERVER), "a"
    own = DistributionStore(ended.side(name).folder / "public" / ended.side(name).state(2).name)
    heard = DistributionStore(side.place(1, f"heard/{name}"))
    for row in range(len(own)):
        columns = ("input_ids", "positions", "boundaries", "counts", "ids", "logprobs", "gold_logprob")
        for first, second in zip(own.row(row, *columns), heard.row(row, *columns), strict=True):
            assert np.array_equal(first, second)
    assert np.allclose(own.column("nats"), heard.column("nats"), rtol=1e-3), "sums of rounded log-probabilities"


def resealed(place: Path, **changed: object) -> None:
    """Writes the envelope anew, with the checksums that the files have by now."""
    content = {
        key: value for key, value in json.loads((place / "envelope.json").read_text()).items() if key != "checksum"
    }
    checksums.forget()
    files = {file.name: checksums.entry(file) for file in place.iterdir() if file.name != "envelope.json"}
    write_json(place / "envelope.json", {**content, "files": files, **changed})


def rewritten(place: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    file = place / "knowledge.arrow"
    with pa.OSFile(str(file)) as source:
        table = change(pa.ipc.open_stream(source).read_all())
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    resealed(place)


def first_changed(table: pa.Table, name: str, value: object) -> pa.Table:
    rows = table.column(name).to_pylist()
    rows[0] = [value, *rows[0][1:]]
    return table.set_column(
        table.schema.get_field_index(name), KNOWLEDGE.field(name), [pa.array(rows, KNOWLEDGE.field(name).type)]
    )


def longer(table: pa.Table) -> pa.Table:
    rows = [[*row, -1.0] for row in table.column("gold_logprob").to_pylist()]
    kind = KNOWLEDGE.field("gold_logprob")
    return table.set_column(4, kind, [pa.array(rows, kind.type)])


def cut(place: Path) -> None:
    (place / "knowledge.arrow").write_bytes((place / "knowledge.arrow").read_bytes()[:-40])


def flipped(place: Path) -> None:
    data = bytearray((place / "knowledge.arrow").read_bytes())
    data[len(data) // 2] ^= 1
    (place / "knowledge.arrow").write_bytes(data)


SPOILT = {
    "gone": (lambda place: (place / "envelope.json").unlink(), "there is no message in"),
    "cut": (cut, r"knowledge.arrow is damaged \(\d+ bytes expected, \d+ found\); it is not read"),
    "flipped": (flipped, "knowledge.arrow is damaged or half-written"),
    "no stream": (
        lambda place: ((place / "knowledge.arrow").write_bytes(b"x" * 99), resealed(place)),
        "knowledge.arrow is no Arrow stream",
    ),
    "nan": (
        lambda place: rewritten(place, lambda table: first_changed(table, "gold_logprob", float("nan"))),
        "has NaN or inf in gold_logprob; it is not read",
    ),
    "inf": (
        lambda place: rewritten(place, lambda table: first_changed(table, "logprobs", float("inf"))),
        "has NaN or inf in logprobs",
    ),
    "vocabulary": (lambda place: resealed(place, tokenizer="0" * 16), "a tells of another vocabulary \\(0000"),
    "ids": (
        lambda place: rewritten(place, lambda table: first_changed(table, "ids", 70000)),
        "a tells of token 70000, its tokenizer has 330; it is not read",
    ),
    "chats": (lambda place: resealed(place, chats="0" * 16), "a tells of other public chats than .*public.jsonl"),
    "positions": (lambda place: rewritten(place, longer), r"a tells of \d+ positions of chat 0, which has \d+"),
    "rows": (lambda place: rewritten(place, lambda table: table.slice(5)), "of 24 chats gave NaN or inf"),
    "column": (
        lambda place: rewritten(place, lambda table: table.append_column("text", pa.array(["x"] * len(table)))),
        "has the columns row, counts, ids, logprobs, gold_logprob, text, not those of a message",
    ),
    "metadata": (
        lambda place: rewritten(place, lambda table: table.replace_schema_metadata({"text": "x"})),
        "not those of a message",
    ),
    "key": (lambda place: resealed(place, text="x"), "has other keys than an envelope"),
    "file": (lambda place: ((place / "chats.jsonl").write_text("x"), resealed(place)), "holds or lacks chats.jsonl"),
    "round": (lambda place: resealed(place, round=2), "is a message of round 2, not of 3; it is not read"),
    "sender": (lambda place: resealed(place, sender="b"), "is a message of b, not of a; it is not read"),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_a_server_goes_on_without_a_message_that_it_cannot_take(
    kind: str, small: Small, at_the_server: Federation, tmp_path: Path
) -> None:
    shutil.copytree(at_the_server.folder, tmp_path / "out")
    made = small.federation(tmp_path / "out", rounds=3)
    side, (spoil, message) = made.side(SERVER), SPOILT[kind]
    spoil(made.exchange.place(3, "a"))
    heard, left = _hear(side, side.state(3), made.exchange, 3)
    assert heard.keys() == {"b"}
    assert left.keys() == {"a"}
    with pytest.raises(UserError, match=message):
        raise UserError(left["a"])


def test_the_whitelist_is_what_the_method_names() -> None:
    assert KNOWLEDGE.names == ["row", "counts", "ids", "logprobs", "gold_logprob"]
    assert not any(pa.types.is_string(field.type) for field in KNOWLEDGE)
    keys = {"sender", "round", "chats", "tokenizer", "trained_on", "files"}
    assert Envelope.__dataclass_fields__.keys() == keys


def test_no_message_is_no_error_for_who_did_not_send(ended: Federation, tmp_path: Path) -> None:
    assert ended.exchange.read(9, "a") is None
    with pytest.raises(UserError, match="there is no message in"):
        read(tmp_path, "a", 1)
