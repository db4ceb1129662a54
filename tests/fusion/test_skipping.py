"""A step whose loss is not finite changes nothing, is told, and too many in a row end the training."""

import logging
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fusechat.app.errors import UserError
from fusechat.fusion.module import FusionModule
from tests.conftest import Mini


def spoilt(monkeypatch: pytest.MonkeyPatch, *calls: int) -> None:
    """Makes the loss NaN in these steps of the training to come."""
    original, done = FusionModule._losses, []

    def losses(self: Any, batch: Any) -> Any:
        found = original(self, batch)
        if self.trainer.training:
            done.append(1)
        return (found[0] * float("nan"), *found[1:]) if self.trainer.training and len(done) in calls else found

    monkeypatch.setattr(FusionModule, "_losses", losses)


def test_a_step_is_skipped(fresh: Mini, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    short = ["source=a", "trainer.max_steps=1", "optimizer.warmup_ratio=0.0", "optimizer.schedule=constant"]
    with monkeypatch.context() as patched:
        spoilt(patched, 1)
        fresh.run("train", *short)
    assert [r.message for r in caplog.records if r.levelno == logging.WARNING] == ["step 1 is skipped: its loss is nan"]
    pivot = load_file(fresh.experiment / "world/models/pivot/model.safetensors")
    target = load_file(fresh.experiment / "targets/a/model.safetensors")
    assert all(torch.equal(target[name], pivot[name]) for name in pivot)


def test_too_many_end_it(fresh: Mini, monkeypatch: pytest.MonkeyPatch) -> None:
    spoilt(monkeypatch, *range(2, 20))
    with pytest.raises(UserError, match=r"the loss is nan in 10 steps in a row, at step 11: lower optimizer\.lr"):
        fresh.run("train", "source=a", "trainer.max_steps=15")
