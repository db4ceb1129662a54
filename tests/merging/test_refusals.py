"""What cannot be merged is refused, and an output is never half of one."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fusechat.app.errors import UserError
from tests.merging.golden import merge


def broken(models: dict[str, Path], change: str) -> tuple[str, ...]:
    file = models["t2"] / "model.safetensors"
    tensors = load_file(file)
    config = json.loads((models["t2"] / "config.json").read_text())
    if change == "architecture":
        (models["t2"] / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    elif change == "missing":
        tensors.pop("lm_head.weight")
    elif change == "extra":
        tensors["model.more.weight"] = torch.zeros(2)
    elif change == "shape":
        tensors["model.norm.weight"] = torch.zeros(7)
    elif change in ("nan", "inf"):
        tensors["model.norm.weight"][3] = float(change)
    elif change == "quantised":
        tensors["model.norm.weight"] = torch.ones(32, dtype=torch.int8)
    save_file(tensors, file)
    if change == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    if change == "twice":
        return ("t1", "t1")
    return ("t1",) if change == "one" else ("t1", "t2", "t3")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("architecture", "is a gpt2 model, the pivot"),
        ("missing", "lacks lm_head.weight"),
        ("extra", "has model.more.weight, which the pivot"),
        ("shape", r"model.norm.weight: shape \(7,\)"),
        ("nan", "t2: model.norm.weight holds NaN or inf"),
        ("inf", "t2: model.norm.weight holds NaN or inf"),
        ("quantised", r"model.norm.weight: torch.int8 in .*t2, torch.float32 in the pivot"),
        ("truncated", "is truncated or not safetensors"),
        ("twice", "is given twice"),
        ("one", "at least two targets, 1 given"),
    ],
)
@pytest.mark.parametrize("method", ["varm", "linear", "ties", "sce", "widen"])
def test_bad_input(change: str, message: str, method: str, models: dict[str, Path]) -> None:
    targets = broken(models, change)
    with pytest.raises(UserError, match=message):
        merge(models, f"merge={method}", targets=targets)
    left = [p.name for p in models["pivot"].parent.iterdir()]
    assert "out" not in left
    assert not any(name.startswith(".out") for name in left)


def test_numbers_are_looked_at_where_nothing_is_merged(models: dict[str, Path]) -> None:
    """A parameter that stays the pivot's, and integers, in which targets may not differ."""
    kept = "merge.patterns=[{match:'norm',keep:pivot}]"
    whole = load_file(models["t2"] / "model.safetensors")
    broken(models, "nan")
    with pytest.raises(UserError, match=r"t2: model\.norm\.weight holds NaN or inf; the model is broken"):
        merge(models, "merge=linear", kept)
    save_file(whole, models["t2"] / "model.safetensors")
    for name in models:
        tensors = load_file(models[name] / "model.safetensors")
        save_file(tensors | {"steps": torch.tensor([1, 2])}, models[name] / "model.safetensors")
    assert torch.equal(
        load_file(merge(models, "merge=linear", kept) / "model.safetensors")["steps"], torch.tensor([1, 2])
    )
    save_file(whole | {"steps": torch.tensor([1, 3])}, models["t2"] / "model.safetensors")
    with pytest.raises(UserError, match=r"t2: steps \(torch.int64\) differs from the pivot's in .*; give targets of"):
        merge(models, "merge=linear", kept, "overwrite=true")


def test_where_it_is_merged_leaves_no_mark(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    output = merge(models, "merge=linear", "merge.device=cpu")
    record = (output / "fusechat.json").read_bytes()
    assert (merge(models, "merge=linear", "merge.device=auto") / "fusechat.json").read_bytes() == record
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    with pytest.raises(
        UserError, match=r"merge\.device=cuda: no such device here; this machine has: cpu; merge\.device=auto"
    ):
        merge(models, "merge=linear", "merge.device=cuda")


def test_identical_targets_need_permission(models: dict[str, Path]) -> None:
    for name in ("t1", "t2", "t3"):
        shutil.copy(models["pivot"] / "model.safetensors", models[name] / "model.safetensors")
    with pytest.raises(UserError, match=r"every VaRM weight is 0/0; .*merge\.allow_unchanged=true"):
        merge(models, "merge=varm")
    merged = load_file(merge(models, "merge=varm", "merge.allow_unchanged=true") / "model.safetensors")
    pivot = load_file(models["pivot"] / "model.safetensors")
    assert all(torch.equal(merged[n], pivot[n]) for n in pivot)


def test_other_refusals(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="lies inside the input"):
        merge(models, f"output_dir={models['t1']}/merged")
    with pytest.raises(UserError, match="does not exist; make it with: python train.py"):
        merge(models, targets=("t1", "/nowhere"))
    with pytest.raises(UserError, match=r"merge\.method='best' is unknown; use one of: breadcrumbs, compress"):
        merge(models, "merge.method=best")
    usage: Any = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    with pytest.raises(
        UserError, match=r"the merged model takes about \d+ kB of the 0 kB that are free at \S+; make room, or choose"
    ):
        merge(models, "merge=linear")
