"""On the card: the fused loss is the textbook's, and training does there what it does on a CPU.

FUSECHAT_CARD=cpu runs the same code where there is no card (python -m pytest -m gpu tests/gpu/test_training.py).
"""

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fusechat.fusion.gradient import fused_loss
from fusechat.fusion.losses import LOSSES, FusionLoss
from tests.conftest import Mini
from tests.fusion.dense import dense, example, in_float64

pytestmark = pytest.mark.gpu
CARD = os.environ.get("FUSECHAT_CARD", "cuda")
N, H, V, K = 900, 64, 5_003, 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", sorted(LOSSES))
def test_the_fused_loss_is_the_textbooks(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Value and both gradients against float64 from the same rounded hidden states and weights."""
    monkeypatch.setattr("fusechat.fusion.products.BLOCK", 1000)  # several products for each of several chunks
    monkeypatch.setattr("fusechat.fusion.slices.chunk_rows", lambda *_: 256)
    loss, (_, logprobs, raw) = FusionLoss(kind, "tail"), example(N, V, K)
    hidden, weight = torch.randn(N, H).to(dtype), (torch.randn(V, H) / 8).to(dtype)
    targets = replace(raw, p=loss.teacher(logprobs))
    h64, w64 = (x.double().requires_grad_() for x in (hidden, weight))
    exact, logits = in_float64(targets), h64 @ w64.t()
    sft = torch.nn.functional.cross_entropy(logits, exact.gold, reduction="none")
    each = sft * exact.sft_weight + dense(logits, logprobs.double(), exact, loss) * exact.fusion_weight
    each.sum().backward()

    moved = type(targets)(*(x.to(CARD) for x in vars(targets).values()))
    h, w = (torch.nn.Parameter(x.to(CARD)) for x in (hidden, weight))
    head = SimpleNamespace(
        projection=SimpleNamespace(weight=w, bias=None), transform=lambda z: z, softcap=None, scale=1.0
    )
    value, _ = fused_loss(h, head, moved, loss)
    value.backward()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2  # a gradient is rounded to bf16 once or twice
    assert value.item() == pytest.approx(float(each.sum().detach()), rel=tolerance)
    for found, wanted in ((h.grad, h64.grad), (w.grad, w64.grad)):
        assert found is not None and wanted is not None
        assert difference(found.cpu().double(), wanted) < tolerance


def difference(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def trained(world: Mini, name: str, accelerator: str, precision: str = "32-true") -> dict[str, Tensor]:
    options = [f"trainer.accelerator={accelerator}", f"trainer.precision={precision}", f"run_name={name}"]
    world.run("train", "source=a", "optimizer.lr=1e-3", *options)
    files = sorted((world.experiment / "targets" / name).glob("*.safetensors"))
    return {key: tensor for file in files for key, tensor in load_file(file).items()}


def test_training_on_the_card_equals_training_on_the_cpu(fresh: Mini) -> None:
    pivot: Path = fresh.experiment / "world/models/pivot"
    start = {key: tensor for file in pivot.glob("*.safetensors") for key, tensor in load_file(file).items()}
    on_cpu, on_card = trained(fresh, "cpu", "cpu"), trained(fresh, "card", CARD)
    mixed = trained(fresh, "mixed", CARD, "bf16-mixed")
    for key, tensor in start.items():
        moved = on_cpu[key] - tensor
        assert difference(on_card[key] - tensor, moved) < 0.05, key  # AdamW's first steps are signs of the gradient
        assert mixed[key].dtype == torch.float32, "master weights are exported as they are"
        assert difference(mixed[key] - tensor, moved) < 0.5, key
