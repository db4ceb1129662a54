"""Merge methods against the published implementations' outputs (tests/golden/merge) and properties."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from fusechat.merging import methods
from tests.conftest import GOLDEN

MERGE = GOLDEN / "merge"
MODELS = [load_file(MERGE / "in/fp32" / f"{name}.safetensors") for name in ("pivot", "t1", "t2", "t3")]
TINY_DELTA = "model.layers.1.mlp.down_proj.weight"  # mergekit's absolute thresholds (1e-6) change the result there; not copied

Method = Callable[[Tensor, list[Tensor]], Tensor]
CASES: dict[str, Method] = {
    "mergekit-0.1.5/fp32/linear": lambda p, t: methods.linear(t, [0.5, 0.3, 0.2]),
    "mergekit-0.1.5/fp32/linear_nonorm": lambda p, t: methods.linear(t, [1, 2, 4], normalize=False),
    "mergekit-0.1.5/fp32/task_arithmetic": lambda p, t: methods.task_arithmetic(p, t, [0.3, 0.4, 0.5]),
    "mergekit-0.1.5/fp32/task_arithmetic_norm_lambda": lambda p, t: methods.task_arithmetic(p, t, [0.3, 0.4, 0.5], 0.7, True),
    "mergekit-0.1.5/fp32/ties": lambda p, t: methods.ties(p, t, [0.3, 0.4, 0.5], [0.2, 0.5, 0.8]),
    "mergekit-0.1.5/fp32/ties_nonorm": lambda p, t: methods.ties(p, t, [0.3, 0.4, 0.5], [0.5] * 3, 1.2, False),
    "mergekit-0.1.5/fp32/breadcrumbs": lambda p, t: methods.breadcrumbs(p, t, [0.3, 0.4, 0.5], [0.8] * 3, [0.05] * 3),
    "mergekit-0.1.5/fp32/slerp_0.3": lambda p, t: methods.slerp(t[0], t[1], 0.3),
    "mergekit-0.1.5/fp32/model_stock": lambda p, t: methods.model_stock(p, t),
    "mergekit-0.1.5/fp32/model_stock_filterwise": lambda p, t: methods.model_stock(p, t, filter_wise=True),
    **{f"mergekit-0.1.5/fp32/sce_topk{d}": lambda p, t, d=d: methods.sce(p, t, d, "deltas") for d in (0.1, 0.5, 1.0)},
    **{f"fuseai-sce/fp32/sce_topk{d}": lambda p, t, d=d: methods.sce(p, t, d) for d in (0.1, 0.5, 1.0)},
    "varm/fp32/parameter": lambda p, t: methods.element_weighted(p, t),
}  # fmt: skip
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


@pytest.mark.parametrize(("ratio", "calibration"), [(1.0, 1.0), (2.0, 0.8)])
def test_widen_parity(ratio: float, calibration: float) -> None:
    for name, wanted in load_file(MERGE / "out/widen/fp32" / f"widen_ratio{ratio}_cal{calibration}.safetensors").items():
        pivot, *targets = (model[name] for model in MODELS)
        assert close(methods.widen(pivot, targets, ratio, calibration, transposed="embed_tokens" in name), wanted), name


ALL: dict[str, Method] = {
    "linear": lambda p, t: methods.linear(t, [1.0] * len(t)),
    "task_arithmetic": lambda p, t: methods.task_arithmetic(p, t, [1.0] * len(t), normalize=True),
    "ties": lambda p, t: methods.ties(p, t, [1.0] * len(t), [0.5] * len(t)),
    "dare": lambda p, t: methods.dare(p, t, [1.0] * len(t), [0.5] * len(t), torch.Generator().manual_seed(0)),
    "della": lambda p, t: methods.della(p, t, [1.0] * len(t), [0.5] * len(t), torch.Generator().manual_seed(0)),
    "breadcrumbs": lambda p, t: methods.breadcrumbs(p, t, [1.0] * len(t), [0.8] * len(t), [0.1] * len(t), normalize=True),
    "sce": lambda p, t: methods.sce(p, t, 0.5),
    "slerp": lambda p, t: methods.slerp_chain(t, 0.5),
    "model_stock": lambda p, t: methods.model_stock(p, t),
    "widen": lambda p, t: methods.widen(p, t),
    "varm": lambda p, t: methods.element_weighted(p, t),
}


@pytest.mark.parametrize("name", ALL)
def test_unchanged_targets_give_the_pivot_and_inputs_stay_as_they_are(name: str) -> None:
    pivot = torch.randn(6, 5)
    targets = [pivot + torch.randn(6, 5) * 0.1 for _ in range(3)]
    before = [t.clone() for t in (pivot, *targets)]
    assert torch.isfinite(ALL[name](pivot, targets)).all()
    assert all(torch.equal(a, b) for a, b in zip(before, (pivot, *targets), strict=True))
    assert torch.allclose(ALL[name](pivot, [pivot.clone()] * 3), pivot, atol=1e-6)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.floats(0.2, 1.0))
def test_dare_is_unbiased_and_seeded(seed: int, density: float) -> None:
    pivot, target = torch.zeros(4000), torch.ones(4000)
    draw = lambda: methods.dare(pivot, [target, target], [0.5, 0.5], [density] * 2, torch.Generator().manual_seed(seed))
    assert torch.equal(draw(), draw())
    assert abs(float(draw().mean()) - 1.0) < 0.15


@given(st.integers(0, 10**6), st.floats(0.05, 0.95))
def test_top_keeps_exactly_the_share(seed: int, density: float) -> None:
    score = torch.randn(97, generator=torch.Generator().manual_seed(seed)).abs()
    mask = methods._top(score, density)
    assert int(mask.sum()) == int(density * 97)
    assert score[mask].min() >= score[~mask].max() if mask.any() else True


def test_golden_data_is_there() -> None:
    assert len(list(Path(MERGE / "out").rglob("*.safetensors"))) > 25
