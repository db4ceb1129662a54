"""The delta store: quantisation, budget, and merging from compressed targets."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusechat.app.errors import UserError
from fusechat.merging.delta import dequantize, quantize, ranks_of
from fusechat.merging.inputs import open_checkpoint
from fusechat.models.checkpoints import LazyCheckpoint
from tests.conftest import Mini


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.sampled_from([2, 3, 8]), st.integers(1, 5), st.integers(1, 300))
def test_quantisation_is_within_half_a_step(seed: int, bits: int, rows: int, columns: int) -> None:
    vectors = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    stored = quantize(vectors, bits)
    again = dequantize(stored, bits, columns)
    spread = torch.nn.functional.pad(vectors, (0, -columns % 128)).view(rows, -1, 128)
    step = (spread.amax(-1) - spread.amin(-1)) / (2**bits - 1)
    assert (again - vectors).abs().max() <= 0.52 * step.max() + 0.01
    assert stored["codes"].numel() <= -(-rows * (columns + 127) // 128 * 128 * bits // 8) + 1


def test_budget_is_the_papers() -> None:
    assert ranks_of((4096, 4096), 1 / 16) == [(8, 2), (3, 32), (2, 968)]
    assert ranks_of((4, 4), 1 / 16) == [(8, 0), (3, 0), (2, 1)] or sum(n for _, n in ranks_of((4, 4), 1 / 16)) <= 4


def test_compressed_targets_merge_like_targets(fresh: Mini) -> None:
    for source in ("a", "b"):
        fresh.run("train", f"source={source}", "optimizer.lr=1e-2")
    targets = fresh.experiment / "targets"
    errors = []
    for ratio in (0.0625, 0.5, 1.0):
        fresh.run("merge", "merge=compress", f"target={targets}/a", f"merge.ratio={ratio}", "overwrite=true")
        errors.append(
            json.loads((fresh.experiment / "merged/a_compressed/fusechat.json").read_text())["measured"][
                "relative_error"
            ]
        )
    assert errors[0] > errors[1] >= errors[2]
    assert errors[2] < 0.45
    small = fresh.experiment / "merged/a_compressed"
    pivot = LazyCheckpoint(fresh.experiment / "world/models/pivot")
    opened, original = open_checkpoint(small, pivot), LazyCheckpoint(targets / "a")
    assert set(opened) == set(original)
    assert torch.equal(opened.tensor("model.norm.weight"), original.tensor("model.norm.weight"))
    for method in ("varm", "linear", "ties", "sce"):
        fresh.run("merge", f"merge={method}", f"targets=[{small},{targets}/b]", f"merge.name={method}_small")
    with pytest.raises(UserError, match="compressed against another pivot"):
        fresh.run("merge", "merge=linear", f"targets=[{small},{targets}/b]", f"pivot.path={targets}/b", "merge.name=x")
    with pytest.raises(UserError, match=r"^target is missing; run: .* target=DIR$"):
        fresh.run("merge", "merge=compress")
    with pytest.raises(UserError, match=r"merge\.ratio=0\.0: expected a number above 0"):
        fresh.run("merge", "merge=compress", f"target={targets}/a", "merge.ratio=0.0", "overwrite=true")
