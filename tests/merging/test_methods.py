"""Merge methods against the published implementations' outputs (tests/golden/merge) and properties."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from fusechat.app.errors import UserError
from fusechat.app.registry import CONF, choices
from fusechat.merging import selection, slices
from fusechat.merging.dense import linear, model_stock, slerp, task_arithmetic
from fusechat.merging.family import settings_of
from fusechat.merging.methods import METHODS
from fusechat.merging.selection import Largest, largest_deltas, most_varying, variances
from fusechat.merging.slices import Slices
from fusechat.merging.sparse import breadcrumbs, dare, sce, ties
from fusechat.merging.varm import element_weighted
from fusechat.merging.widen import widen
from tests.conftest import GOLDEN

MERGE = GOLDEN / "merge"
MODELS = [load_file(MERGE / "in/fp32" / f"{name}.safetensors") for name in ("pivot", "t1", "t2", "t3")]
TINY_DELTA = (
    "model.layers.1.mlp.down_proj.weight"  # mergekit's absolute thresholds (1e-6) change the result there; not copied
)


def whole(
    method: Callable[..., Iterator[Tensor]], pivot: Tensor, targets: list[Tensor], *options: Any, **named: Any
) -> Tensor:
    """A method's slices put together."""
    return torch.cat([part.reshape(-1) for part in method(Slices(pivot, targets), *options, **named)]).view_as(pivot)


Method = Callable[[Tensor, list[Tensor]], Tensor]
CASES: dict[str, Method] = {
    "mergekit-0.1.5/fp32/linear": lambda p, t: whole(linear, p, t, [0.5, 0.3, 0.2]),
    "mergekit-0.1.5/fp32/linear_nonorm": lambda p, t: whole(linear, p, t, [1, 2, 4], normalize=False),
    "mergekit-0.1.5/fp32/task_arithmetic": lambda p, t: whole(task_arithmetic, p, t, [0.3, 0.4, 0.5], normalize=False),
    "mergekit-0.1.5/fp32/task_arithmetic_norm_lambda": lambda p, t: whole(
        task_arithmetic, p, t, [0.3, 0.4, 0.5], 0.7, True
    ),
    "mergekit-0.1.5/fp32/ties": lambda p, t: whole(ties, p, t, [0.3, 0.4, 0.5], [0.2, 0.5, 0.8]),
    "mergekit-0.1.5/fp32/ties_nonorm": lambda p, t: whole(ties, p, t, [0.3, 0.4, 0.5], [0.5] * 3, 1.2, False),
    "mergekit-0.1.5/fp32/breadcrumbs": lambda p, t: whole(
        breadcrumbs, p, t, [0.3, 0.4, 0.5], [0.8] * 3, [0.05] * 3, normalize=False
    ),
    "mergekit-0.1.5/fp32/slerp_0.3": lambda p, t: whole(slerp, p, t[:2], 0.3),
    "mergekit-0.1.5/fp32/model_stock": lambda p, t: whole(model_stock, p, t),
    "mergekit-0.1.5/fp32/model_stock_filterwise": lambda p, t: whole(model_stock, p, t, filter_wise=True),
    **{f"mergekit-0.1.5/fp32/sce_topk{d}": lambda p, t, d=d: whole(sce, p, t, d, "deltas") for d in (0.1, 0.5, 1.0)},
    **{f"fuseai-sce/fp32/sce_topk{d}": lambda p, t, d=d: whole(sce, p, t, d) for d in (0.1, 0.5, 1.0)},
    "varm/fp32/parameter": lambda p, t: whole(element_weighted, p, t),
}
EXCEPT = ("sce", "model_stock")


def close(ours: Tensor, wanted: Tensor) -> bool:
    """Within 1e-6 relative of the tensor's own scale."""
    return bool((ours - wanted).abs().max() <= 1e-6 * wanted.abs().max())


@pytest.mark.parametrize("case", CASES)
def test_parity(case: str) -> None:
    for name, wanted in load_file(MERGE / "out" / f"{case}.safetensors").items():
        if name == TINY_DELTA and case.startswith("mergekit") and any(key in case for key in EXCEPT):
            continue
        pivot, *targets = (model[name] for model in MODELS)
        assert close(CASES[case](pivot, targets), wanted), name


# Where the published code says one thing in fp32 and another in float64, the golden digits are rounding's. Unchanged
# vectors: 1 - cos of equal ones is noise of either sign, which orders them. 1e-5: the smallest changes drown in it. t = 2:
# t times the mean is exactly the highest rank, and the mean of a row of ranks is rounded one way or the other.
NOISE = {
    "model.embed_tokens.weight": "unchanged",
    "model.layers.0.self_attn.k_proj.weight": "unchanged",
    TINY_DELTA: "1e-5",
    "model.layers.0.mlp.down_proj.weight": "t = 2",
    "model.layers.0.mlp.up_proj.weight": "t = 2",
}


@pytest.mark.parametrize(("ratio", "calibration"), [(1.0, 1.0), (2.0, 0.8)])
def test_widen_parity(ratio: float, calibration: float) -> None:
    golden = load_file(MERGE / f"out/widen/fp32/widen_ratio{ratio}_cal{calibration}.safetensors")
    for name, wanted in golden.items():
        pivot, *targets = (model[name] for model in MODELS)
        ours = whole(widen, pivot, targets, ratio, calibration, transposed="embed_tokens" in name)
        if name in NOISE and (ratio == 2 or NOISE[name] != "t = 2"):
            most = sum((target - pivot).abs() for target in targets)  # scores lie between 0 and 1
            assert bool(((ours - wanted).abs() <= most + 1e-6).all()), name
            continue
        assert close(ours, wanted), name


@pytest.mark.parametrize("size", ["1e-5", "1e-4", "1e-3", "1e-2", "1e-1"])
@pytest.mark.parametrize(("ratio", "calibration"), [(1.0, 1.0), (1.5, 0.8)])
def test_widen_is_the_published_codes_in_float64(size: str, ratio: float, calibration: float) -> None:
    """deltas.safetensors: MergeLLM's WIDEN (commit 9178ef9) run in float64 on fp32 models that differ by ``size``."""
    golden = load_file(MERGE / "out/widen/deltas.safetensors")
    for name in (key.removeprefix(f"{size}/pivot/") for key in golden if key.startswith(f"{size}/pivot/")):
        pivot, *targets = (golden[f"{size}/{model}/{name}"] for model in ("pivot", "t1", "t2", "t3"))
        ours = whole(widen, pivot, targets, ratio, calibration, transposed="embed_tokens" in name)
        assert (ours - golden[f"{size}/{ratio}/{name}"]).abs().max() < 1e-6, name  # one score off is 0.1 of the delta


def test_widen_orders_equal_divergences_and_spares_what_is_at_the_mean() -> None:
    """Nine columns: a rank of four is exactly the mean, and no more; unchanged columns rank in order, all below."""
    pivot = torch.eye(9) + 1
    targets = [pivot.clone(), pivot.clone()]
    targets[0][:, 5:] *= torch.tensor([1.1, 1.2, 1.3, 1.4])
    targets[1][:, 0] *= 1.1
    ranks = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 8], [8, 0, 1, 2, 3, 4, 5, 6, 7]]) / 9.0
    by_magnitude = torch.where(ranks * 9 > 4, 1.0, torch.softmax(ranks, 0))
    same = torch.arange(9).expand(2, 9) / 9.0  # no direction changed
    by_direction = torch.where(same * 9 > 4, 1.0, torch.softmax(same, 0))
    scores = (by_magnitude + by_direction) / 2
    wanted = pivot + sum((t - pivot) * s for t, s in zip(targets, scores, strict=True))
    ours = whole(widen, pivot, targets)
    assert torch.allclose(ours[:, 0], wanted[:, 0], atol=1e-6)
    assert torch.isfinite(whole(widen, torch.zeros(4, 3), [torch.ones(4, 3), torch.zeros(4, 3)])).all()


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


def chosen_of(chosen: Largest, slices: Slices) -> list[Tensor]:
    parts = [chosen.masks(pivot, targets) for pivot, targets in slices]
    return [torch.cat(list(masks)) for masks in zip(*parts, strict=True)]


@pytest.mark.parametrize("compiled", [True, False])
@given(st.integers(0, 10**6), st.integers(0, 97), st.integers(1, 100), st.booleans())
def test_largest_is_a_stable_sort(compiled: bool, seed: int, count: int, size: int, coarse: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    numbers = [torch.randn(97, generator=generator) for _ in range(2)]
    numbers = [(n * 3).round() for n in numbers] if coarse else numbers  # many equal ones, zeros among them
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Slices, "compiled", compiled)
        patch.setattr(slices, "SLICE", size)
        patch.setattr(slices, "COMPILED", size)
        seen = Slices(torch.zeros(97), numbers)
        for mask, values in zip(chosen_of(largest_deltas(seen, [count, 97 - count]), seen), numbers, strict=True):
            wanted, many = torch.zeros(97), count if values is numbers[0] else 97 - count
            wanted[values.abs().argsort(descending=True, stable=True)[:many]] = 1.0
            assert torch.equal(mask, wanted)
        varying = variances(numbers)
        (mask,) = chosen_of(most_varying(seen, 0.5), seen)
        wanted = torch.zeros(97)
        wanted[varying.argsort(descending=True, stable=True)[: int((varying > 0).sum()) // 2]] = 1.0
        assert torch.equal(mask, wanted)


@pytest.mark.parametrize("kind", ["continuous", "few values", "rows of different size", "constant"])
def test_a_sample_that_misleads_changes_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guess from one block in 16 that is far off: the second look is at everything."""
    values = torch.randn(64, 2048)
    if kind == "few values":
        values = (values * 2).round()
    elif kind == "rows of different size":
        values *= torch.where(torch.arange(64) % 16 == 0, 1e-3, 1.0)[:, None]  # those that the sample sees
    elif kind == "constant":
        values[:] = 1.0
    seen = Slices(torch.zeros(64, 2048), [values])
    exact = largest_deltas(seen, [50_000])
    monkeypatch.setattr(selection, "SAMPLED", 1)
    guessed = largest_deltas(seen, [50_000])
    assert (guessed.thresholds, guessed.left) == (exact.thresholds, exact.left)
    flat = values.flatten().abs()
    above, equal = flat > float(exact.thresholds[0]), flat == float(exact.thresholds[0])
    assert int(above.sum()) + int(exact.left[0]) == 50_000
    assert 0 < int(exact.left[0]) <= int(equal.sum())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ties", {"density": [0.3, 1.0, 0.6]}),
        ("ties", {"density": [0.5] * 3, "weights": [1.0, 2.0, -0.5], "scale": 1.5, "normalize": False}),
        ("sce", {"density": 0.1}),
        ("sce", {"density": 0.4, "select": "deltas"}),
        ("sce", {"density": 1.0}),
    ],
)
def test_compiled_loops_do_what_the_formulas_say(
    name: str, options: dict[str, Any], dtype: torch.dtype, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
    pivot = torch.randn(700, 1000).to(dtype)
    targets = [(pivot.float() + 0.05 * torch.randn(700, 1000)).to(dtype) for _ in range(3)]  # bf16 makes many ties
    handed = {"weights": [1.0, 1.0, 1.0]} | options if "weights" in METHODS[name].needs else options
    merge = lambda: whole(METHODS[name].function, pivot, targets, **handed)
    ours = merge()
    monkeypatch.setattr(slices, "COMPILED", 300_001)
    assert torch.equal(merge(), ours)
    monkeypatch.setattr(Slices, "compiled", False)
    wanted = merge()
    assert (ours - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert not torch.allclose(ours, pivot.float(), atol=1e-2)


def test_golden_data_is_there() -> None:
    assert len(list(Path(MERGE / "out").rglob("*.safetensors"))) > 25
