"""Low-rank adapters: merged on export, kept beside the target, and gone on from."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fusechat.app.errors import UserError
from fusechat.merging.adapters import AdapterCheckpoint
from fusechat.models.checkpoints import LazyCheckpoint
from tests.conftest import Mini
from tests.fusion.trained import distance, moved, weights


def test_lora_is_merged_on_export(fresh: Mini) -> None:
    fresh.run("train", "source=a", "lora.enabled=true", "lora.r=2")
    pivot = load_file(fresh.experiment / "world/models/pivot/model.safetensors")
    target = weights(fresh, "a")
    assert target.keys() == pivot.keys()
    assert all(torch.equal(target[n], pivot[n]) == ("proj" not in n) for n in pivot), "every linear layer, nothing else"


def test_a_training_goes_on_from_an_adapter_and_keeps_its_own(fresh: Mini) -> None:
    """One step at a rate of nearly 0 leaves the model that the adapter made; the adapter alone makes it too."""
    lora = ["lora.enabled=true", "lora.r=2"]
    fresh.run("train", "source=a", "run_name=first", *lora)
    first = fresh.experiment / "targets/first/adapter"
    again = ["source=a", "run_name=again", *lora, f"lora.adapter={first}", "trainer.max_steps=1", "optimizer.lr=1e-12"]
    fresh.run("train", *again)
    assert distance(weights(fresh, "again"), weights(fresh, "first")) < 1e-6 < moved(fresh, "first")
    pivot = LazyCheckpoint(fresh.experiment / "world/models/pivot")
    opened = AdapterCheckpoint(fresh.experiment / "targets/again/adapter", pivot)
    assert distance({name: opened.tensor(name) for name in pivot}, weights(fresh, "again")) < 1e-6
    record = fresh.experiment / "targets/again/fusechat.json"
    assert "adapter" in json.loads(record.read_text())["decided_by"], "another adapter is another target"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["lora.r=4"], r"does not fit: base_model.model.*lora_A.weight is \(2, 96\) there, \(4, 96\) by lora.r"),
        (["lora.enabled=false"], r"lora.adapter=.* goes on from an adapter and lora.enabled=false; set it to true"),
        (["lora.lora_alpha=32"], r"was trained with lora_alpha=16(\.0)?, 32(\.0)? now; set lora.lora_alpha as it was"),
        (["lora.adapter=${paths.experiment}/world"], r"lora.adapter=.*world holds no adapter_model.safetensors; give"),
    ],
)
def test_adapters_that_training_cannot_go_on_from(options: list[str], message: str, fresh: Mini) -> None:
    lora = ["source=a", "lora.enabled=true", "lora.r=2", "trainer.max_steps=1"]
    fresh.run("train", *lora, "run_name=first")
    place = "lora.adapter=${paths.experiment}/targets/first/adapter"
    with pytest.raises(UserError, match=message):
        fresh.run("train", *lora, place, *options, "run_name=again")
    assert not (fresh.experiment / "targets/again").exists()


def test_a_folder_without_an_adapter_names_the_way(mini: Mini, tmp_path: Path) -> None:
    """Also a target of an earlier version, which kept none; and a target in place of its adapter."""
    old, new = tmp_path / "old", tmp_path / "new"
    (new / "adapter").mkdir(parents=True)
    (new / "adapter/adapter_model.safetensors").touch()
    old.mkdir()
    (old / "fusechat.json").write_text(json.dumps({"stage": "train"}))
    train = ["train", "source=a", "lora.enabled=true", "run_name=again"]
    for given in (old, old / "adapter"):
        ways = f"overwrite=true, or go on from its weights with pivot.path={old} lora.adapter=null"
        with pytest.raises(UserError, match=f"{old} was trained without one, or by a version .*{re.escape(ways)}"):
            mini.run(*train, f"lora.adapter={given}")
    with pytest.raises(UserError, match=f"lora.adapter={new} holds no .*; that target's adapter is {new}/adapter"):
        mini.run(*train, f"lora.adapter={new}")
