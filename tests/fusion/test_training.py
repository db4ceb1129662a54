"""Training: steps that do not depend on how they are shared, resumption bit for bit, every option."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fusechat.app.errors import UserError
from fusechat.fusion import FusionLoss, Optimizer
from fusechat.fusion import train as fuse
from fusechat.fusion.batches import FusionBatch, shared_tokens
from fusechat.fusion.options import Data
from fusechat.stores.store import DistributionStore
from tests.conftest import ROOT, Mini
from tests.fusion.trained import distance, equal, moved, weights

EXACT = ["pivot.dtype=float64", "trainer.precision=64-true", "trainer.gradient_clip_val=null", "trainer.max_steps=3"]


def test_accumulation_equals_one_large_batch(fresh: Mini) -> None:
    common = [*EXACT, "source=a", "data.bucket=1"]
    fresh.run("train", "run_name=whole", "data.global_batch=8", *common)
    fresh.run("train", "run_name=parts", "data.global_batch=8", "data.batch_size=2", *common)
    assert distance(weights(fresh, "whole"), weights(fresh, "parts")) < 1e-9
    assert moved(fresh, "whole") > 1e-3


def test_chunked_and_own_logits_train_alike(fresh: Mini) -> None:
    for chunked in ("true", "false"):
        fresh.run("train", "source=b", f"run_name=chunked_{chunked}", f"loss.chunked={chunked}", *EXACT)
    assert distance(weights(fresh, "chunked_true"), weights(fresh, "chunked_false")) < 1e-9
    assert moved(fresh, "chunked_true") > 1e-3


def test_no_gradient_outlives_its_step(fresh: Mini, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are as large as the weights: a forward pass has them beside it only within a step."""
    from fusechat.fusion.module import FusionModule

    step, held = FusionModule.training_step, []

    def seen(self: FusionModule, batch: FusionBatch) -> torch.Tensor:
        held.append(any(parameter.grad is not None for parameter in self.parameters()))
        return step(self, batch)

    monkeypatch.setattr(FusionModule, "training_step", seen)
    fresh.run("train", "source=a", "trainer.max_steps=3", "data.global_batch=8", "data.batch_size=4")
    assert held == [False, True] * 3


def test_kill_and_resume_is_bit_for_bit(fresh: Mini) -> None:
    common = [
        "source=a",
        "trainer.max_steps=40",
        "callbacks.checkpoint_every_n_steps=5",
        "data.global_batch=4",
        "data.shuffle_seed=7",
    ]
    fresh.run("train", "run_name=whole", *common)
    folder = fresh.experiment / "checkpoints"
    process = subprocess.Popen(
        [sys.executable, "train.py", *fresh.base, "run_name=killed", *common],
        cwd=ROOT,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.time() + 180
    while time.time() < deadline and process.poll() is None and not list(folder.glob("killed-*/*.ckpt")):
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert list(folder.glob("killed-*/*.ckpt")), "the run was killed before it had a checkpoint, or after it had ended"
    assert not (fresh.experiment / "targets/killed").exists()
    fresh.run("train", "run_name=killed", *common)
    assert equal(weights(fresh, "whole"), weights(fresh, "killed"))
    assert not list(folder.glob("killed-*")), "checkpoints of a finished run are removed"


def test_a_checkpoint_cut_short_is_passed_over(tmp_path: Path) -> None:
    from fusechat.fusion.checkpoints import latest_checkpoint

    torch.save({"a": 1}, tmp_path / "step=5.ckpt")
    (tmp_path / "step=10.ckpt").write_bytes((tmp_path / "step=5.ckpt").read_bytes()[:-50])
    assert latest_checkpoint(tmp_path) == tmp_path / "step=5.ckpt"


def test_own_chats_validate_and_all_others_train(fresh: Mini) -> None:
    """Bits per byte of the target that was saved, over the chats of validation.path; nothing is held out for it."""
    from fusechat.evaluate import evaluate
    from fusechat.merge_search import held_out_chats

    chats = fresh.experiment / "world/chats/validation.jsonl"
    value = fresh.run("train", "source=a", "trainer.max_epochs=1", "trainer.max_steps=-1")
    target = fresh.experiment / "targets/a"
    measured = evaluate(target, chats, fresh.root / "validation.json", generate=False)["metrics"]
    assert value == pytest.approx(measured["bits_per_byte"]["all"]["value"], rel=1e-4)
    record = json.loads((target / "fusechat.json").read_text())
    assert {name for name in record["metrics"] if name.startswith("validation/")} == {
        "validation/loss",
        "validation/sft",
        "validation/bits_per_byte",
    }
    assert record["metrics"]["validation/loss"] == pytest.approx(record["metrics"]["validation/sft"], rel=1e-5)
    assert record["steps"] == 12, "96 chats, 8 a step"
    assert len(held_out_chats(fresh.cfg("merge_search"))) == len(chats.read_text().splitlines()) == 16
    with pytest.raises(UserError, match="made with other settings"):
        chats.write_text(chats.read_text().splitlines()[0] + "\n")
        fresh.run("train", "source=a", "trainer.max_epochs=1", "trainer.max_steps=-1")


def test_sft_needs_no_aligned_store(fresh: Mini) -> None:
    shutil.rmtree(fresh.experiment / "aligned")
    value = fresh.run("train", "fusion=sft", "run_name=sft")
    record = json.loads((fresh.experiment / "targets/sft/fusechat.json").read_text())
    assert record["metrics"]["validation/bits_per_byte"] == value
    assert record["metrics"]["validation/loss"] == pytest.approx(record["metrics"]["validation/sft"], rel=1e-5)
    assert (record["sources"], record["wins"]["all"]) == ([], {"pivot": 1.0})
    assert moved(fresh, "sft") > 1e-3


@pytest.mark.parametrize(
    "options",
    [
        ["fusion=avg_ce", "loss.kind=forward_kl", "loss.missing_mass=tail"],
        ["fusion.level=token", "loss.kind=jsd"],
        ["loss.kind=reverse_kl", "loss.schedule=hard_and_decay"],
        ["fusion.metric=nats_per_token", "loss.schedule=soft", "fusion.empty=pivot"],
        ["fusion.include_pivot=false", "loss.temperature=2.0"],
        ["gradient_checkpointing=true", "callbacks.early_stopping=1", "trainer.max_steps=24"],
    ],
    ids=lambda o: " ".join(o),
)
def test_every_option_trains(options: list[str], fresh: Mini) -> None:
    short = ["source=c", "trainer.max_steps=2"]
    assert fresh.run("train", *short, *options) is not None
    fresh.run("train", *short, "run_name=default")
    assert distance(weights(fresh, "c"), weights(fresh, "default")) > 1e-6, "the option decides something"
    assert moved(fresh, "c") > 1e-4


def test_uld_trains_on_unmapped_distributions(fresh: Mini) -> None:
    fresh.run("align", "source=b", "token_map=uld", "overwrite=true")
    fresh.run("train", "source=b", "loss.kind=uld", "fusion.include_pivot=false", "validation.path=null")
    record = json.loads((fresh.experiment / "targets/b/fusechat.json").read_text())
    assert record["wins"]["all"] == {"b": 1.0}
    assert 0 < record["metrics"]["validation/fusion"] <= 2, "the distance of two distributions"


def test_a_split_store_trains_by_ids_and_ranks(fresh: Mini) -> None:
    fresh.run("align", "source=b", "token_map=hybrid", "overwrite=true")
    store, size = DistributionStore(fresh.experiment / "aligned/b"), 0
    common, vocabulary = shared_tokens(store), store.manifest["vocab_size"]
    for row in range(len(store)):
        counts, ids = store.row(row, "counts", "ids")
        ends = np.cumsum(counts)
        for part in np.split(ids, ends[:-1]) if len(counts) else ():
            beyond = part[part >= vocabulary] - vocabulary
            assert beyond.tolist() == [*range(len(beyond))] and common[part[part < vocabulary]].all()
            size += len(beyond)
    assert size > 20 and 0 < common.mean() < 1
    for kind in ("hybrid", "uld", "alm"):  # ranks take all by rank, chunks of text take none
        fresh.run("train", "source=b", f"loss.kind={kind}", "fusion.include_pivot=false", f"run_name={kind}")
    assert distance(weights(fresh, "hybrid"), weights(fresh, "uld")) > 1e-6
    assert moved(fresh, "hybrid") > 1e-4
    fresh.run("train", "source=b", "loss.kind=hybrid", "run_name=beside_the_pivot", "validation.path=null")
    with pytest.raises(UserError, match=r"token_map=hybrid: .* loss.kind=ce compares tokens; use loss=hybrid, or"):
        fresh.run("train", "source=b", "run_name=ce")
    with pytest.raises(UserError, match=r"token_map=prefix, which does not tell .* align with token_map=hybrid"):
        fresh.run("train", "source=a", "loss.kind=hybrid")
    fresh.run("train", "source=pivot", "loss.kind=hybrid")


def test_train_needs_no_config(fresh: Mini) -> None:
    place, store = fresh.experiment, fresh.experiment / "distributions/pivot"
    value = fuse(
        place / "world/models/pivot",
        store,
        {"a": place / "aligned/a"},
        place / "targets/mine",
        loss=FusionLoss(lm_weight=0.5),
        optimizer=Optimizer(lr=1e-3),
        data=Data(global_batch=8, shuffle_seed=1),
        trainer={"max_steps": 2, "max_epochs": -1},
        max_length=256,
        validation=place / "world/chats/validation.jsonl",
        record={"note": "by hand"},
    )
    record = json.loads((place / "targets/mine/fusechat.json").read_text())
    assert (record["note"], record["metrics"]["validation/bits_per_byte"]) == ("by hand", value)
    fresh.run("train", "source=a", "run_name=theirs", "trainer.max_steps=2", "data.shuffle_seed=1")
    assert equal(weights(fresh, "mine"), weights(fresh, "theirs")), "the command does the same"
    theirs = json.loads((place / "targets/theirs/fusechat.json").read_text())
    assert theirs["fingerprint"] == record["fingerprint"]
