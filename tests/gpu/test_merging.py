"""Every merge method on the card: what the CPU makes, and no more memory than a few slices."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fusechat.merging import merge, slices
from fusechat.merging.methods import METHODS
from tests.merging.golden import make
from tests.merging.test_methods import MERGES, in_file

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", MERGES)
def test_the_card_makes_what_the_cpu_makes(name: str, dtype: str, tmp_path: Path) -> None:
    models = make(tmp_path, dtype)
    targets, settings = [models[target] for target in ("t1", "t2", "t3")], in_file(name)
    settings = {key: value for key, value in settings.items() if key != "name"}
    made = [
        merge(METHODS[name].name, models["pivot"], targets, tmp_path / device, settings=settings, device=device).path
        for device in ("cpu", "cuda")
    ]
    ours, wanted = (load_file(path / "model.safetensors") for path in made)
    for parameter, tensor in wanted.items():
        unit = 1e-5 if dtype == "fp32" else 2**-7
        far = (ours[parameter].float() - tensor.float()).abs() > unit * tensor.float().abs().max()
        assert float(far.float().mean()) < 0.01, parameter  # a rounded last digit may carry an element over a threshold


@pytest.mark.parametrize("name", [name for name in MERGES if name != "widen"])
def test_memory_on_the_card_does_not_grow_with_the_parameter(name: str) -> None:
    peaks = []
    for times in (1, 4):
        size = times * slices.ON_DEVICE
        pivot = torch.zeros(size // 1024, 1024, dtype=torch.bfloat16)
        seen = slices.Slices(pivot, [pivot + 0.01, pivot - 0.02, pivot + 0.03], "cuda")
        handed = {"weights": [1.0] * 3, "density": [0.5] * 3, "gamma": [0.1] * 3, "seed": [0, 1]}
        needs = {"weights" if need == "variation" else need for need in METHODS[name].needs}
        torch.cuda.reset_peak_memory_stats()
        for part in METHODS[name].function(seen, **{key: value for key, value in handed.items() if key in needs}):
            part.cpu()
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] <= 1.1 * peaks[0]
