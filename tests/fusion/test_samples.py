"""Answers while training: told, and the training takes the same way as without them."""

import logging
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fusechat.app.errors import UserError
from fusechat.fusion.samples import Samples
from tests.conftest import Mini


def test_samples_are_told_and_change_nothing(fresh: Mini, caplog: pytest.LogCaptureFixture) -> None:
    """With dropout, which draws: the draws are the same."""
    config = fresh.experiment / "world/models/pivot/config.json"
    config.write_text(re.sub(r'"attention_dropout": [\d.]+', '"attention_dropout": 0.5', config.read_text()))
    caplog.set_level(logging.INFO, "fusechat.fusion.samples")
    common = ["source=a", "accept_changes=true", "trainer.max_steps=4", "+trainer.val_check_interval=2"]
    fresh.run("train", *common, "run_name=without")
    assert not [record for record in caplog.records if record.name == "fusechat.fusion.samples"]
    fresh.run("train", *common, "run_name=with", "callbacks.samples=3")
    told = [record.message for record in caplog.records if record.name == "fusechat.fusion.samples"]
    assert len(told) == 6 and all(
        re.match(r"step [24]: '.+' is answered .*\(reference: '.+'\)$", line) for line in told
    )
    one, two = (load_file(fresh.experiment / "targets" / n / "model.safetensors") for n in ("without", "with"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["validation.path=null", "data.validation_fraction=0.0"],
            "asks held-out prompts and data.validation_fraction=0 holds none",
        ),
        (["trainer=fsdp"], r"cannot answer with a model in shards \(trainer=fsdp\); set callbacks\.samples=0"),
    ],
)
def test_samples_that_cannot_be(overrides: list[str], message: str, mini: Mini) -> None:
    with pytest.raises(UserError, match=message):
        mini.run("train", "source=a", "callbacks.samples=3", *overrides)


def test_fewer_chats_than_were_asked_for_are_told_once_each(caplog: pytest.LogCaptureFixture) -> None:
    class Answered(Samples):
        def _answered(self, pl_module: Any, store: Any, row: int) -> list[str]:
            return [f"prompt {row}", "reference", "answer"]

    data = SimpleNamespace(stores=[None], own=None, validation_rows=np.arange(2))
    trainer: Any = SimpleNamespace(sanity_checking=False, is_global_zero=True, datamodule=data, loggers=[])
    told = Answered(3, None)
    caplog.set_level(logging.INFO, "fusechat.fusion.samples")
    for trainer.global_step in (1, 2):
        told.on_validation_epoch_end(trainer, None)
    steps = [record.message.partition(" is answered")[0] for record in caplog.records]
    assert steps == [f"step {step}: 'prompt {row}'" for step in (1, 2) for row in (0, 1)]
