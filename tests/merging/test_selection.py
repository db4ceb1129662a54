"""The largest elements, chosen in parts of a file, are those of a stable sort."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fusechat.merging import selection, slices
from fusechat.merging.methods import METHODS
from fusechat.merging.selection import Largest, largest_deltas, most_varying, variances
from fusechat.merging.slices import Slices
from tests.merging.golden import whole


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


@pytest.mark.parametrize("factor", [0.95, 1.05])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_guess_that_missed_is_corrected_for_its_score_alone(
    factor: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = torch.randn(2, 64, 2048)
    values[1] *= torch.where(torch.arange(64) % 16 == 0, factor, 1.0)[:, None]  # those that the sample sees
    pivot = torch.zeros(64, 2048, dtype=dtype)
    seen = Slices(pivot, list(values.to(dtype)))
    exact = largest_deltas(seen, [60_000, 50_000])
    calls: list[tuple[int, int, int]] = []

    def watched(slices: Slices, variance: bool, low: int, floors: Any, bins: int, stride: int) -> Any:
        calls.append((low, len(floors), stride))
        return histograms(slices, variance, low, floors, bins, stride)

    histograms = selection.histograms
    monkeypatch.setattr(selection, "SAMPLED", 1)
    monkeypatch.setattr(selection, "histograms", watched)
    guessed = largest_deltas(seen, [60_000, 50_000])
    assert guessed.thresholds.tolist() == exact.thresholds.tolist() and guessed.left.tolist() == exact.left.tolist()
    assert calls[:2] == [(16, 2, 16), (0, 2, 1)] and set(calls[2:]) == {(0, 1, 1)}  # not everything again


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
