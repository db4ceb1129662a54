"""Merge methods equal the published implementations."""

from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fusechat.merging.dense import linear, model_stock, slerp, task_arithmetic
from fusechat.merging.sparse import breadcrumbs, sce, ties
from fusechat.merging.varm import element_weighted
from fusechat.merging.widen import widen
from tests.merging.golden import MERGE, MODELS, TINY_DELTA, close, whole

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
