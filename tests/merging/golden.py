"""The golden models, as tensors and as directories, and a merge of them."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from fusechat.merging.slices import Slices
from tests.conftest import GOLDEN, run_entry

MERGE = GOLDEN / "merge"


def make(root: Path, dtype: str) -> dict[str, Path]:
    for name in ("pivot", "t1", "t2", "t3"):
        (root / name).mkdir(parents=True)
        shutil.copy(MERGE / "in" / dtype / f"{name}.safetensors", root / name / "model.safetensors")
        shutil.copy(MERGE / "in/config.json", root / name / "config.json")
    return {name: root / name for name in ("pivot", "t1", "t2", "t3")}


def merge(models: dict[str, Path], *overrides: str, targets: tuple[str, ...] = ("t1", "t2", "t3")) -> Path:
    output = models["pivot"].parent / "out"
    listed = ",".join(str(models.get(t, t)) for t in targets)
    base = [
        f"pivot.path={models['pivot']}",
        f"targets=[{listed}]",
        f"output_dir={output}",
        "logger=none",
        f"paths.root={output.parent}",
    ]
    run_entry("merge", [*base, *overrides])
    return output


MODELS = [load_file(MERGE / "in/fp32" / f"{name}.safetensors") for name in ("pivot", "t1", "t2", "t3")]
TINY_DELTA = (
    "model.layers.1.mlp.down_proj.weight"  # mergekit's absolute thresholds (1e-6) change the result there; not copied
)


def whole(
    method: Callable[..., Iterator[Tensor]], pivot: Tensor, targets: list[Tensor], *options: Any, **named: Any
) -> Tensor:
    """A method's slices put together."""
    return torch.cat([part.reshape(-1) for part in method(Slices(pivot, targets), *options, **named)]).view_as(pivot)


def close(ours: Tensor, wanted: Tensor) -> bool:
    """Within 1e-6 relative of the tensor's own scale."""
    return bool((ours - wanted).abs().max() <= 1e-6 * wanted.abs().max())
