"""mergekit's recipes: equal to what mergekit makes of them, and one line for what is not supported."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from fusechat.app.errors import UserError
from fusechat.merging.gradients import SHARED, value_at
from fusechat.merging.mergekit import read
from tests.conftest import run_entry
from tests.merging.golden import MERGE, TINY_DELTA, make

RECIPES: dict[str, Any] = yaml.safe_load((MERGE / "recipes.yaml").read_text())
OTHERWISE = ("sce", "model_stock")  # mergekit's absolute thresholds; see test_parity


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """The golden models in the working folder, so that recipes name them as they stand."""
    monkeypatch.chdir(tmp_path)
    return make(tmp_path, "fp32")


def merge(recipe: dict[str, Any], *overrides: str) -> Path:
    Path("mine.yaml").write_text(yaml.safe_dump(recipe))
    run_entry("merge", ["merge.recipe=mine.yaml", "logger=none", f"paths.root={Path.cwd()}", *overrides])
    return Path.cwd() / "default/merged/mine"


@pytest.mark.parametrize("name", RECIPES)
def test_outputs_are_mergekits(name: str, models: dict[str, Path]) -> None:
    output = merge(RECIPES[name])
    ours, golden = load_file(output / "model.safetensors"), load_file(MERGE / "out/mergekit-0.1.5/recipes.safetensors")
    wanted = {key.removeprefix(f"{name}/"): tensor for key, tensor in golden.items() if key.startswith(f"{name}/")}
    assert ours.keys() == wanted.keys()
    for key, tensor in wanted.items():
        if not (key == TINY_DELTA and name in OTHERWISE):
            assert (ours[key].reshape(-1)[::5] - tensor).abs().max() <= 1e-6 * max(1e-3, tensor.abs().max()), key
    record = json.loads((output / "fusechat.json").read_text())
    assert yaml.safe_load(record["recipe"]) == RECIPES[name]


def test_a_stack_is_a_model_of_as_many_layers(models: dict[str, Path]) -> None:
    from transformers import AutoModelForCausalLM

    config = json.loads((models["t1"] / "config.json").read_text())
    listed = config | {"layer_types": ["full_attention", "full_attention"]}
    (models["t1"] / "config.json").write_text(json.dumps(listed))
    output = merge(RECIPES["passthrough"])
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.config.num_hidden_layers == len(model.model.layers) == 5
    assert json.loads((output / "config.json").read_text())["layer_types"] == ["full_attention"] * 5
    part = {"merge_method": "passthrough", "slices": [{"sources": [{"model": "t1", "layer_range": [1, 3]}]}]}
    with pytest.raises(UserError, match=r"t1 has no layer 2; see merge\.recipe's layer_range"):
        merge(part, "overwrite=true")
    tensors = load_file("t1/model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(2, 32)
    save_file(tensors, "t1/model.safetensors")
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight has shape \(2, 32\), layer 0 has"):
        merge(RECIPES["passthrough"], "overwrite=true")


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_random_drops_keep_what_is_expected_of_them(name: str, models: dict[str, Path]) -> None:
    """mergekit draws other masks; with nothing dropped both are one sum, and elsewhere ours are seeded."""
    parameters = {"weight": 0.5, "density": [0.5, 0.6], **({"epsilon": 0.1} if "della" in name else {})}
    recipe = {"merge_method": name, "base_model": "pivot", "models": [{"model": "t1"}, {"model": "t2"}]}
    arguments = read_of(recipe | {"parameters": parameters})
    assert arguments["method"] == SHARED[name].method
    assert arguments["settings"]["consensual"] == (name in ("dare_ties", "della"))
    assert arguments["settings"]["normalize"] == (name == "della")
    layers = {p["match"]: p["density"] for p in arguments["patterns"] if "layers" in p["match"]}
    assert list(layers.values()) in ([[0.6, 0.6]], [[0.5, 0.5]], [[0.6, 0.6], [0.5, 0.5]])
    first = load_file(merge(recipe | {"parameters": parameters}) / "model.safetensors")
    merge(recipe | {"parameters": parameters}, "output_dir=again")
    again = load_file("again/model.safetensors")
    assert all(torch.equal(first[key], again[key]) for key in first)


def read_of(recipe: dict[str, Any]) -> dict[str, Any]:
    Path("mine.yaml").write_text(yaml.safe_dump(recipe))
    return read("mine.yaml")


@pytest.mark.parametrize(
    ("setting", "name", "t", "value"),
    [
        (0.3, "x", 0.7, 0.3),
        ([0, 1], "x", 0.25, 0.25),
        ([0, 0.5, 0.3], "x", 0.75, 0.4),
        ([1.0], "x", 0.6, 1.0),
        ([True, False], "x", 1.0, 0.0),
        ([{"filter": "mlp", "value": [0, 2]}, {"value": 5}], "a.mlp.up", 0.5, 1.0),
        ([{"filter": "mlp", "value": [0, 2]}, {"filter": "*", "value": 5}], "a.norm", 0.5, 5),
        ([{"filter": "mlp", "value": 1}], "a.norm", 0.5, None),
    ],
)
def test_gradients_and_filters(setting: Any, name: str, t: float, value: Any) -> None:
    found = value_at(setting, name, t)
    assert found == (pytest.approx(value) if value is not None else None)


TWO = {"models": [{"model": "t1"}, {"model": "t2"}], "base_model": "pivot"}
RANGED = [{"model": "t1", "layer_range": [0, 1]}, {"model": "t2", "layer_range": [1, 2]}]


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ([1], r"merge\.recipe=mine\.yaml: is no mergekit recipe"),
        (TWO | {"merge_method": "karcher"}, r"merge_method='karcher' is unknown; use one of: linear, slerp, "),
        (TWO | {"merge_method": "linear", "slices": []}, r"give either models or slices"),
        (
            TWO | {"merge_method": "linear", "chat_template": "auto"},
            r"'chat_template' is not supported; known here: mo",
        ),
        (TWO | {"merge_method": "linear", "tokenizer_source": "union"}, r"tokenizer_source='union' is not supported"),
        (TWO | {"merge_method": "linear"}, r"parameter 'weight' is missing for .*; give it to each model"),
        (
            TWO | {"merge_method": "linear", "parameters": {"wieght": 1}},
            r"'wieght' is not supported; did you mean weight",
        ),
        (
            TWO | {"merge_method": "ties", "parameters": {"weight": 1, "rescale": True}},
            r"rescale: True is not supported",
        ),
        (TWO | {"merge_method": "ties", "parameters": {"weight": 0}}, r"every weight is zero"),
        (TWO | {"merge_method": "slerp", "parameters": {"t": 0.5}}, r"slerp takes two models, of which base_model is"),
        (TWO | {"merge_method": "sce", "base_model": None}, r"base_model is missing; merge_method=sce adds to it"),
        (TWO | {"merge_method": "linear", "dtype": "int8", "parameters": {"weight": 1}}, r"merge\.dtype='int8'"),
        ({"merge_method": "linear", "models": [{"model": "t1+lora"}]}, r"a LoRA after \+ is not supported"),
        ({"merge_method": "linear", "models": [{"model": "t1"}] * 2}, r"a model is named twice"),
        ({"merge_method": "linear", "models": []}, r"no model is named"),
        (
            {"merge_method": "linear", "slices": [{"sources": [{"model": "t1"}]}]},
            r"t1 needs layer_range: \[FIRST, LAST",
        ),
        (
            {"merge_method": "linear", "slices": [{"sources": RANGED}], "parameters": {"weight": 1}},
            r"slices that leave out, repeat or move layers, .* merge_method: passthrough with one source each",
        ),
        (
            TWO
            | {
                "merge_method": "della",
                "models": [{"model": "t1", "parameters": {"epsilon": 0.2}}, {"model": "t2"}],
                "parameters": {"weight": 1},
            },
            r"epsilon differs between models",
        ),
    ],
)
def test_what_is_not_supported_is_refused_by_name(recipe: Any, message: str, models: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=message):
        merge(recipe)
    assert not Path("default/merged").exists()


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"merge\.recipe=/nowhere\.yaml: cannot be read: .*No such file"):
        read("/nowhere.yaml")
