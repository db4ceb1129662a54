"""Fingerprints say what they were made of, so that a message can say what differs."""

import json

from fusechat.app.marks import difference, fingerprint, stage_fingerprint, stamp


def record(**parts: object) -> dict[str, object]:
    """As a stage writes it and reads it again."""
    found: dict[str, object] = json.loads(json.dumps(stamp(fingerprint(**parts))))
    return found


def test_equal_parts_give_equal_fingerprints() -> None:
    assert fingerprint(a=1, b={"c": (1, 2)}) == fingerprint(b={"c": [1, 2]}, a=1)
    assert fingerprint(a=1) != fingerprint(a=2)
    assert stage_fingerprint({}, a=1) == fingerprint(a=1) != stage_fingerprint({"mine": "00"}, a=1)
    assert stamp("plain") == {"fingerprint": "plain"}


def test_differences_have_both_values() -> None:
    there = record(loss={"kind": "ce", "lm_weight": 0.9}, seed=0, gone=1, texts=["x" * 200])
    now = fingerprint(loss={"kind": "ce", "lm_weight": 0.5}, seed=0, new=None, texts=["y" * 200])
    told = difference(there, now)
    assert told.startswith("loss.lm_weight: 0.9 there, 0.5 now; gone: 1 there, unset now; texts: ")
    assert told.endswith("; new: unset there, null now")
    assert len(told) < 250, "a long value is shown as its hash"


def test_many_differences_are_counted() -> None:
    there, now = record(**dict.fromkeys("abcdefgh", 1)), fingerprint(**dict.fromkeys("abcdefgh", 2))
    assert difference(there, now).endswith("f: 1 there, 2 now; and 2 more")


def test_of_a_record_without_parts_only_the_hashes_are_known() -> None:
    mark = fingerprint(a=1)
    assert difference({"fingerprint": "0123"}, mark) == f"fingerprint 0123, now {mark}"
