"""Merge methods against the published implementations' outputs (tests/golden/merge) and properties."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from fusechat.merging import methods, slices
from fusechat.merging.selection import Largest
from fusechat.merging.slices import Slices
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
    "mergekit-0.1.5/fp32/linear": lambda p, t: whole(methods.linear, p, t, [0.5, 0.3, 0.2]),
    "mergekit-0.1.5/fp32/linear_nonorm": lambda p, t: whole(methods.linear, p, t, [1, 2, 4], normalize=False),
    "mergekit-0.1.5/fp32/task_arithmetic": lambda p, t: whole(methods.task_arithmetic, p, t, [0.3, 0.4, 0.5]),
    "mergekit-0.1.5/fp32/task_arithmetic_norm_lambda": lambda p, t: whole(
        methods.task_arithmetic, p, t, [0.3, 0.4, 0.5], 0.7, True
    ),
    "mergekit-0.1.5/fp32/ties": lambda p, t: whole(methods.ties, p, t, [0.3, 0.4, 0.5], [0.2, 0.5, 0.8]),
    "mergekit-0.1.5/fp32/ties_nonorm": lambda p, t: whole(methods.ties, p, t, [0.3, 0.4, 0.5], [0.5] * 3, 1.2, False),
    "mergekit-0.1.5/fp32/breadcrumbs": lambda p, t: whole(
        methods.breadcrumbs, p, t, [0.3, 0.4, 0.5], [0.8] * 3, [0.05] * 3
    ),
    "mergekit-0.1.5/fp32/slerp_0.3": lambda p, t: whole(methods.slerp, p, t[:2], 0.3),
    "mergekit-0.1.5/fp32/model_stock": lambda p, t: whole(methods.model_stock, p, t),
    "mergekit-0.1.5/fp32/model_stock_filterwise": lambda p, t: whole(methods.model_stock, p, t, filter_wise=True),
    **{
        f"mergekit-0.1.5/fp32/sce_topk{d}": lambda p, t, d=d: whole(methods.sce, p, t, d, "deltas")
        for d in (0.1, 0.5, 1.0)
    },
    **{f"fuseai-sce/fp32/sce_topk{d}": lambda p, t, d=d: whole(methods.sce, p, t, d) for d in (0.1, 0.5, 1.0)},
    "varm/fp32/parameter": lambda p, t: whole(methods.element_weighted, p, t),
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


@pytest.mark.parametrize(("ratio", "calibration"), [(1.0, 1.0), (2.0, 0.8)])
def test_widen_parity(ratio: float, calibration: float) -> None:
    for name, wanted in load_file(
        MERGE / "out/widen/fp32" / f"widen_ratio{ratio}_cal{calibration}.safetensors"
    ).items():
        pivot, *targets = (model[name] for model in MODELS)
        assert close(
            whole(methods.widen, pivot, targets, ratio, calibration, transposed="embed_tokens" in name), wanted
        ), name


ALL: dict[str, Method] = {
    "linear": lambda p, t: whole(methods.linear, p, t, [1.0] * len(t)),
    "task_arithmetic": lambda p, t: whole(methods.task_arithmetic, p, t, [1.0] * len(t), normalize=True),
    "ties": lambda p, t: whole(methods.ties, p, t, [1.0] * len(t), [0.5] * len(t)),
    "dare": lambda p, t: whole(methods.dare, p, t, [1.0] * len(t), [0.5] * len(t), [0]),
    "della": lambda p, t: whole(methods.della, p, t, [1.0] * len(t), [0.5] * len(t), [0]),
    "breadcrumbs": lambda p, t: whole(
        methods.breadcrumbs, p, t, [1.0] * len(t), [0.8] * len(t), [0.1] * len(t), normalize=True
    ),
    "sce": lambda p, t: whole(methods.sce, p, t, 0.5),
    "slerp": lambda p, t: whole(methods.slerp, p, t, 0.5),
    "model_stock": lambda p, t: whole(methods.model_stock, p, t),
    "widen": lambda p, t: whole(methods.widen, p, t),
    "varm": lambda p, t: whole(methods.element_weighted, p, t),
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
    draw = lambda: whole(methods.dare, pivot, [target, target], [0.5, 0.5], [density] * 2, [seed])
    assert torch.equal(draw(), draw())
    assert abs(float(draw().mean()) - 1.0) < 0.15


def masked(chosen: Largest, scores: Tensor, size: int) -> Tensor:
    return torch.cat(
        [torch.ones_like(part) * mask for part, mask in zip(scores.split(size), chosen.masks(), strict=True)]
    )


@given(st.integers(0, 10**6), st.integers(0, 100), st.integers(1, 100), st.booleans())
def test_largest_is_a_stable_sort(seed: int, count: int, size: int, coarse: bool) -> None:
    scores = torch.randn(97, generator=torch.Generator().manual_seed(seed)).abs()
    scores = (scores * 3).round() if coarse else scores  # many equal ones, zeros among them
    chosen = masked(Largest(lambda: scores.split(size), count=count), scores, size)
    wanted = torch.zeros(97)
    wanted[scores.argsort(descending=True, stable=True)[:count]] = 1.0
    assert torch.equal(chosen, wanted)
    of_positive = masked(Largest(lambda: scores.split(size), share=0.5), scores, size)
    assert int(of_positive.sum()) == int((scores > 0).sum()) // 2


@pytest.mark.parametrize("name", ALL)
def test_slicing_does_not_matter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    pivot = torch.randn(37, 12)
    targets = [pivot + (torch.randn(37, 12) * 0.1).round(decimals=1) for _ in range(3)]  # ties among the deltas
    at_once = ALL[name](pivot, targets)
    monkeypatch.setattr(slices, "SLICE", 50)
    assert torch.allclose(ALL[name](pivot, targets), at_once, atol=1e-6)


def test_golden_data_is_there() -> None:
    assert len(list(Path(MERGE / "out").rglob("*.safetensors"))) > 25
