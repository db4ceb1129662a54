"""What training refuses: settings that exclude each other, stores of another pivot, spoilt stores."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from fusechat.app.errors import UserError
from tests.conftest import Mini
from tests.spoiling import replaced, spoil


def test_validation_chats_without_an_answer_are_refused(fresh: Mini, tmp_path: Path) -> None:
    chats = tmp_path / "chats.jsonl"
    chats.write_text(json.dumps({"messages": [{"role": "user", "content": "Who?"}]}) + "\n")
    with pytest.raises(UserError, match=r"validation\.path=.*: the assistant has no text in any of 1 chats"):
        fresh.run("train", "source=a", f"validation.path={chats}")
    with pytest.raises(UserError, match=r"validation\.path=.*missing\.jsonl: "):
        fresh.run("train", "source=a", "validation.path=missing.jsonl")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["loss.lm_weight=1.5"], r"loss\.lm_weight=1\.5: expected a number from 0 to 1"),
        (["loss.schedule=up"], r"loss\.schedule='up' is unknown; use one of: hard, hard_and_decay, soft"),
        (["loss.kind=mse"], r"loss\.kind='mse' is unknown"),
        (["fusion.rule=best"], r"fusion\.rule='best' is unknown"),
        (
            ["sources=[zz]"],
            r"aligned/zz does not exist; make it with: python -m fusechat\.align experiment=tiny source=zz",
        ),
        (["data.max_tokens=8"], r"a chat of \d+ tokens exceeds 8"),
        (["validation.path=null", "data.validation_fraction=1.0"], "expected a number from 0 to below 1"),
        (["pivot.path=/nowhere"], "/nowhere"),
    ],
)
def test_bad_settings(overrides: list[str], message: str, mini: Mini) -> None:
    with pytest.raises(UserError, match=message):
        mini.run("train", "source=a", f"output_dir={mini.root}/bad/bad", *overrides)


def test_stores_of_another_pivot_are_refused(fresh: Mini) -> None:
    fresh.run("extract", "source=pivot", "extract.top_k=5", "overwrite=true")
    with pytest.raises(
        UserError,
        match=r"was aligned with other pivot distributions .*run: python -m fusechat\.align .* overwrite=true",
    ):
        fresh.run("train", "source=a")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: replaced(t, "logprobs", np.nan),
            r"aligned/a holds ids beyond the pivot's vocabulary, NaN or inf; align again",
        ),
        (
            lambda t: replaced(t, "logprobs", np.inf),
            r"holds ids beyond the pivot's vocabulary, NaN or inf; align again",
        ),
        (lambda t: replaced(t, "ids", 65_535), r"holds ids beyond the pivot's vocabulary, NaN or inf; align again"),
        (
            lambda t: t.slice(1),
            r"aligned/a has 95 chats where .*distributions/pivot has 96; run: python -m fusechat\.align .*overwrite=true",
        ),
    ],
)
def test_spoilt_stores_are_refused(change: Callable[[pa.Table], pa.Table], message: str, fresh: Mini) -> None:
    spoil(fresh.experiment / "aligned/a", change)
    with pytest.raises(UserError, match=message):
        fresh.run("train", "source=a", "trainer.max_steps=20")


def test_a_vocabulary_beyond_the_embedding_is_refused(fresh: Mini) -> None:
    spoil(fresh.experiment / "distributions/pivot", lambda t: t, vocab_size=70_000)
    with pytest.raises(UserError, match=r"has ids up to 70000, the model's embedding \d+ rows; set pivot\.path"):
        fresh.run("train", "source=a")


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("chat.limit=50", "chat.limit: null there, 50 now"),
        ("chat.max_length=128", "chat.max_length: 256 there, 128 now"),
        ("chat.train_on=last", 'chat.train_on: "all" there, "last" now'),
        ("chat.end_of_turn=false", "chat.end_of_turn: true there, false now"),
        ("chat.template=pivot", 'chat.template: "native" there, "pivot" now'),
    ],
)
def test_other_chats_than_the_stores_are_told_with_both_values(override: str, told: str, mini: Mini) -> None:
    remedy = "run: python -m fusechat.extract experiment=tiny source=pivot overwrite=true"
    with pytest.raises(UserError, match=rf"pivot holds other chats .* \({re.escape(told)}\).*{re.escape(remedy)}"):
        mini.run("train", "source=a", override)


def test_the_same_chats_elsewhere_are_those_of_the_stores(fresh: Mini, tmp_path: Path) -> None:
    """A file that has moved, a limit beyond all chats, a store of an earlier version; nothing is said without chats."""
    there = fresh.experiment / "world/chats"
    shutil.copy(there / "fusion.jsonl", tmp_path / "moved.jsonl")
    asked = ["source=a", "trainer.max_steps=1"]
    fresh.run("train", *asked, f"chat.path={tmp_path}/moved.jsonl", "chat.limit=5000")
    with pytest.raises(UserError, match=r"chat\.path: \".*fusion\.jsonl\" there, \".*test\.jsonl\" now"):
        fresh.run("train", *asked, f"chat.path={there}/test.jsonl")
    with pytest.raises(UserError, match=r"chat\.path: .*gone\.jsonl\" now"):
        fresh.run("train", *asked, f"chat.path={there}/gone.jsonl")
    fresh.run("train", *asked, "chat.path=???", "chat.max_length=999", "data.max_tokens=256", "run_name=silent")
    manifest = fresh.experiment / "distributions/pivot/manifest.json"
    about = json.loads(manifest.read_text())
    assert about.pop("chat")["path"].endswith("fusion.jsonl")
    del about["checksum"]
    manifest.write_text(json.dumps(about))
    fresh.run("train", *asked, "chat.limit=50", "run_name=earlier")
