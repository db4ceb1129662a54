"""LoRA adapters as targets, against peft's own merge_and_unload."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fusechat.app.errors import UserError
from fusechat.merging import merge
from fusechat.merging.inputs import open_checkpoint
from fusechat.models.checkpoints import LazyCheckpoint
from tests.merging.golden import make

KINDS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]},
    "stabilised": {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": ["v_proj"]},
    "patterns": {
        "r": 4,
        "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"layers.1.mlp.up_proj": 3},
    },
    "embedding": {"r": 3, "target_modules": ["embed_tokens", "k_proj"]},
    "saved": {"r": 2, "target_modules": ["o_proj"], "modules_to_save": ["lm_head", "norm"]},
}


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    return make(tmp_path, "fp32")


def opened(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def adapter(pivot: Path, folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    """Writes an adapter with made-up numbers; returns the weights of the model it makes of the pivot."""
    model = get_peft_model(opened(pivot), LoraConfig(task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(opened(pivot), folder)
    return {name: tensor.float() for name, tensor in loaded.merge_and_unload().state_dict().items()}


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_reads_like_the_model_that_peft_makes_of_it(
    kind: str, models: dict[str, Path], tmp_path: Path
) -> None:
    wanted = adapter(models["pivot"], tmp_path / "adapter", **KINDS[kind])
    pivot = LazyCheckpoint(models["pivot"])
    found = open_checkpoint(tmp_path / "adapter", pivot)
    changed = [name for name in pivot if not torch.equal(found.tensor(name), pivot.tensor(name))]
    assert changed
    for name in pivot:
        assert torch.allclose(found.tensor(name), wanted[name], atol=1e-6), name


def test_factors_may_lie_transposed(models: dict[str, Path], tmp_path: Path) -> None:
    """fan_in_fan_out, for weights [in, out] as GPT-2's are: the change is (B A)ᵀ."""
    adapter(models["pivot"], tmp_path / "adapter", r=2, target_modules=["q_proj"])
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config | {"fan_in_fan_out": True}))
    pivot, name = LazyCheckpoint(models["pivot"]), "model.layers.0.self_attn.q_proj"
    stored = load_file(tmp_path / "adapter/adapter_model.safetensors")
    a, b = (stored[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
    change = open_checkpoint(tmp_path / "adapter", pivot).tensor(f"{name}.weight") - pivot.tensor(f"{name}.weight")
    assert torch.allclose(change, (b @ a).t() * config["lora_alpha"] / 2, atol=1e-6)


@pytest.mark.parametrize("method", ["varm", "linear", "ties", "sce", "widen"])
def test_merging_adapters_is_merging_the_models_they_make(
    method: str, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fusechat.merging.slices.SLICE", 50)
    adapters, whole = [], []
    for number, kind in enumerate(("plain", "saved")):
        weights = adapter(models["pivot"], tmp_path / kind, **KINDS[kind])
        adapters.append(tmp_path / kind)
        whole.append(models[f"t{number + 1}"])
        model = opened(models["pivot"])
        model.load_state_dict(weights)
        model.save_pretrained(whole[-1])
    settings = {"density": 0.5} if method == "ties" else {}
    made = [
        merge(method, models["pivot"], targets, tmp_path / f"out{i}", settings=settings).path
        for i, targets in enumerate((adapters, whole))
    ]
    ours, wanted = (load_file(path / "model.safetensors") for path in made)
    for name, tensor in wanted.items():
        far = (ours[name] - tensor).abs() > 1e-5  # a rounded last digit may carry an element over a threshold
        assert float(far.float().mean()) < 0.01, name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_model_name_or_path": "org/other"}, "is an adapter of org/other, the pivot is "),
        ({"base_model_name_or_path": None}, "is an adapter of an unnamed model, the pivot is "),
        ({"peft_type": "IA3"}, "is a IA3 adapter; only LORA"),
        ({"use_dora": True}, "use_dora=True is not supported; merge it into its base with peft's merge_and_unload"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights=pissa_niter_4 is not supported"),
    ],
)
def test_adapters_that_are_refused(
    change: dict[str, Any], message: str, models: dict[str, Path], tmp_path: Path
) -> None:
    adapter(models["pivot"], tmp_path / "adapter", r=2, target_modules=["q_proj"])
    file = tmp_path / "adapter/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=message):
        merge("linear", models["pivot"], [tmp_path / "adapter", models["t1"]], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_base_is_known_by_content_or_by_name(models: dict[str, Path], tmp_path: Path) -> None:
    adapter(models["pivot"], tmp_path / "adapter", r=2, target_modules=["q_proj"])
    copy = shutil.copytree(models["pivot"], tmp_path / "elsewhere")
    merge("linear", copy, [tmp_path / "adapter", models["t1"]], tmp_path / "out")  # the same bytes at another place
    with pytest.raises(UserError, match="is an adapter of .*pivot, the pivot is .*t2"):
        merge("linear", models["t2"], [tmp_path / "adapter", models["t1"]], tmp_path / "other")
    file = tmp_path / "adapter/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "org/elsewhere"}))
    merge("linear", copy, [tmp_path / "adapter", models["t1"]], tmp_path / "named")
