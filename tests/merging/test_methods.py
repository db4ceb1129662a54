"""Every merge method: its file's settings, what it makes of equal targets, slices and odd shapes."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusechat.app.errors import UserError
from fusechat.app.registry import CONF, choices
from fusechat.merging import slices
from fusechat.merging.family import settings_of
from fusechat.merging.methods import METHODS
from fusechat.merging.sparse import dare
from tests.conftest import GOLDEN
from tests.merging.golden import MODELS, whole

MERGE = GOLDEN / "merge"
MERGES = [name for name, member in METHODS.items() if "store" not in member.needs]


def in_file(name: str) -> dict[str, Any]:
    """A method's own settings in its config file."""
    content, common = (yaml.safe_load((CONF / "merge" / f"{n}.yaml").read_text()) for n in (name, "common"))
    assert content["method"] == name
    return {key: value for key, value in content.items() if key not in {"defaults", "method", *common}}


def by_name(name: str, pivot: Tensor, targets: list[Tensor]) -> Tensor:
    """A method with its file's settings and what it needs, as the streaming code hands it over."""
    member, count = METHODS[name], len(targets)
    chosen = in_file(name)
    needed: dict[str, Any] = {
        "weights": [1.0] * count,
        "variation": [1 / count] * count,
        "seed": [0, 7],
        "name": "model.layers.0.mlp.up_proj.weight",
        "transposed": False,
    }
    needed |= {key: [chosen[key]] * count for key in ("density", "gamma") if key in chosen}
    handed = {key: value for key, value in needed.items() if key in member.needs}
    if "variation" in handed:
        handed["weights"] = handed.pop("variation")
    return whole(member.function, pivot, targets, **chosen | handed)


@pytest.mark.parametrize("name", MERGES)
def test_every_method_merges_the_golden_inputs(name: str) -> None:
    changed = []
    for key in MODELS[0]:
        pivot, *targets = (model[key] for model in MODELS)
        before = [tensor.clone() for tensor in (pivot, *targets)]
        merged = by_name(name, pivot, targets)
        assert merged.shape == pivot.shape
        assert merged.dtype == torch.float32
        assert torch.isfinite(merged).all()
        changed.append(not torch.equal(merged, pivot))
        assert all(torch.equal(a, b) for a, b in zip(before, (pivot, *targets), strict=True)), "inputs changed"
    assert sum(changed) > len(changed) / 2


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", MERGES)
def test_vectors_and_matrices_merge_without_a_warning(name: str) -> None:
    """Such as of ``.T`` on one dimension, which torch is going to refuse."""
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        for shape in ((6,), (4, 6)):
            by_name(name, torch.ones(shape), [torch.full(shape, value) for value in (1.5, 0.5, 3.0)])
    finally:
        torch.set_warn_always(always)


@pytest.mark.parametrize("name", MERGES)
def test_unchanged_targets_give_the_pivot(name: str) -> None:
    pivot = torch.randn(6, 5)
    assert torch.allclose(by_name(name, pivot, [pivot.clone()] * 3), pivot, atol=1e-6)


@pytest.mark.parametrize("name", MERGES)
def test_slicing_does_not_matter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    pivot = torch.randn(37, 12)
    targets = [pivot + (torch.randn(37, 12) * 0.1).round(decimals=1) for _ in range(3)]  # ties among the deltas
    at_once = by_name(name, pivot, targets)
    monkeypatch.setattr(slices, "SLICE", 50)
    monkeypatch.setattr(slices, "COMPILED", 50)
    assert torch.allclose(by_name(name, pivot, targets), at_once, atol=1e-6)
    assert not torch.allclose(at_once, pivot, atol=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_the_group_has_a_file_for_every_method_with_its_settings(name: str) -> None:
    own = in_file(name)
    assert own.keys() == settings_of(METHODS[name], own).keys()
    required = {key: own[key] for key in {"density", "gamma"} & own.keys()}
    assert own == settings_of(METHODS[name], required), "defaults are the same from Python"


def test_the_group_names_what_the_registry_has() -> None:
    assert choices("merge.method") == {name: METHODS[name].help for name in sorted(METHODS)}


def test_settings_are_checked() -> None:
    with pytest.raises(UserError, match="merge=linear has no setting 'densty'; it knows: normalize"):
        settings_of(METHODS["linear"], {"densty": 0.5})
    with pytest.raises(UserError, match=r"merge=ties needs the setting merge\.density"):
        settings_of(METHODS["ties"], {})
    assert settings_of(METHODS["ties"], {"density": [0.1, 0.2]}) == {
        "density": [0.1, 0.2],
        "scale": 1.0,
        "normalize": True,
    }


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.floats(0.2, 1.0))
def test_dare_is_unbiased_and_seeded(seed: int, density: float) -> None:
    pivot, target = torch.zeros(4000), torch.ones(4000)
    draw = lambda: whole(dare, pivot, [target, target], [0.5, 0.5], [density] * 2, [seed])
    assert torch.equal(draw(), draw())
    assert abs(float(draw().mean()) - 1.0) < 0.15


def test_golden_data_is_there() -> None:
    assert len(list(Path(MERGE / "out").rglob("*.safetensors"))) > 25
