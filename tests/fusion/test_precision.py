"""Precision: losses and gradients in bf16 against float64, fp32 master weights, what is left alone, and what is
refused.
"""

import copy
import os
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fusechat.app import needs
from fusechat.app.errors import UserError
from fusechat.app.trainer import quiet_trainer
from fusechat.fusion import LOSSES, FusionLoss, products
from fusechat.fusion.gradient import fused_loss
from fusechat.fusion.plan import Draw
from fusechat.fusion.precision import weights_dtype
from fusechat.fusion.targets import Targets
from fusechat.models.load import load_model
from tests.conftest import Mini
from tests.fusion.trained import module_of, moved, rows_of, weights

N, H, V, K = 512, 64, 1000, 10
BOUNDS = {"loss": 1e-6, "hidden": 3e-3, "weight": 2e-3}  # bf16 rounds by up to 4e-3; torch's own: 1e-5, 3e-3, 3e-3


class Head:
    """An lm_head as `fused_loss` knows it."""

    scale, softcap = 1.0, None

    def __init__(self, weight: Tensor) -> None:
        self.projection = nn.Linear(H, V, bias=False)
        self.projection.weight = nn.Parameter(weight)

    def transform(self, logits: Tensor) -> Tensor:
        return logits


def example() -> tuple[Tensor, Tensor, Targets]:
    """Hidden states as bf16 layers give them, fp32 master weights, and teachers of ten entries."""
    hidden, weight = torch.randn(N, H).bfloat16(), torch.randn(V, H) * 0.3
    p, each = torch.softmax(torch.randn(N, K), -1) * 0.9, torch.full((N,), 1.0 / N)
    ids = torch.rand(N, V).topk(K).indices
    return hidden, weight, Targets(ids, p, torch.randint(V, (N,)), 0.5 * each, 0.5 * each)


def ours(hidden: Tensor, weight: Tensor, targets: Targets, loss: FusionLoss, autocast: bool) -> dict[str, Tensor]:
    h, head = hidden.clone().requires_grad_(), Head(weight.clone())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        value, _ = fused_loss(h, head, targets, loss)
    value.backward()
    return {"loss": value.detach(), "hidden": h.grad, "weight": head.projection.weight.grad}


def errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """Relative, in the Euclidean norm."""
    return {name: float((found[name].double() - exact[name]).norm() / exact[name].norm()) for name in exact}


@pytest.mark.parametrize("missing", ["renormalize", "tail"])
@pytest.mark.parametrize("kind", sorted(LOSSES))
def test_in_bf16_the_loss_is_exact_and_gradients_are_as_good_as_their_dtype(
    kind: str, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fusechat.fusion.slices.CHUNK_ELEMENTS", 16 * V)  # many chunks
    hidden, weight, targets = example()
    loss = FusionLoss(kind, missing)
    exact = ours(hidden.double(), weight.bfloat16().double(), targets, loss, autocast=False)
    for states in (hidden, hidden.float()):  # under FSDP2 and under autocast
        off = errors(ours(states, weight, targets, loss, autocast=True), exact)
        assert all(off[name] < BOUNDS[name] for name in off), off
        assert off["hidden"] > 1e-5, "autocast is heeded"


def test_no_worse_than_torchs_cross_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusechat.fusion.slices.CHUNK_ELEMENTS", 16 * V)
    hidden, weight, targets = example()
    each = torch.full((N,), 1.0 / N)
    targets = Targets(targets.ids, targets.p, targets.gold, each, torch.zeros(N))
    exact = ours(hidden.double(), weight.bfloat16().double(), targets, FusionLoss(), autocast=False)
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        value = nn.functional.cross_entropy(nn.functional.linear(h, w), targets.gold)
    value.backward()
    torchs = errors({"loss": value.detach(), "hidden": h.grad, "weight": w.grad}, exact)
    mine = errors(ours(hidden, weight, targets, FusionLoss(), autocast=True), exact)
    assert all(mine[name] <= torchs[name] for name in mine), (mine, torchs)


def test_outside_autocast_nothing_is_rounded() -> None:
    hidden, weight, targets = example()
    exact = ours(hidden.double(), weight.double(), targets, FusionLoss(), autocast=False)
    off = errors(ours(hidden.float(), weight, targets, FusionLoss(), autocast=False), exact)
    assert max(off.values()) < 1e-5


@pytest.mark.parametrize(
    ("precision", "pivot", "lora", "held"),
    [
        ("bf16-mixed", "bfloat16", False, "float32"),
        ("32-true", "bfloat16", False, "float32"),
        ("64-true", "float32", False, "float64"),
        ("bf16-mixed", "bfloat16", True, "bfloat16"),
        ("bf16-true", "bfloat16", True, "bfloat16"),
    ],
)
def test_trained_weights_are_held_in_fp32(precision: str, pivot: str, lora: bool, held: str) -> None:
    assert weights_dtype(precision, pivot, lora=lora) == held


def test_bf16_weights_are_trained_only_where_that_is_accepted(fresh: Mini) -> None:
    bf16 = ["source=a", "trainer.precision=bf16-true", "trainer.max_steps=2"]
    with pytest.raises(
        UserError, match=r"rounds updates away \(300 steps at lr 5e-6 moved 7\.7 % .*precision_loss=accept"
    ):
        fresh.run("train", *bf16)
    fresh.run("train", *bf16, "precision_loss=accept")
    assert {t.dtype for t in weights(fresh, "a").values()} == {torch.bfloat16}
    assert moved(fresh, "a") > 1e-4
    with pytest.raises(UserError, match=r"trainer\.precision='16-mixed' is unknown; use one of: 32-true, bf16-mixed"):
        fresh.run("train", "source=a", "trainer.precision=16-mixed")


def test_quantised_pivots_carry_adapters(mini: Mini, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs, "PACKAGES", {})  # as where bitsandbytes is installed
    run = lambda *given: mini.run("train", "source=a", f"output_dir={mini.root}/bad/bad", "pivot.load_in=4bit", *given)
    with pytest.raises(UserError, match=r"pivot\.load_in=4bit trains nothing but adapters; add lora\.enabled=true"):
        run()
    with pytest.raises(UserError, match=r"fsdp shards no quantised weights; use trainer=ddp"):
        run("lora.enabled=true", "trainer.strategy=fsdp")


def test_a_group_of_one_leaves_nothing_behind(fresh: Mini, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    fresh.run("train", "source=a", "trainer.strategy=fsdp", "trainer.max_steps=1")
    assert dict(os.environ) == before
    assert not torch.distributed.is_initialized()


def test_mixed_precision_trains_fp32_weights(fresh: Mini) -> None:
    fresh.run("train", "source=a", "run_name=full", "trainer.max_steps=2")
    fresh.run("train", "source=a", "run_name=mixed", "trainer.max_steps=2", "trainer.precision=bf16-mixed")
    assert {t.dtype for t in weights(fresh, "mixed").values()} == {torch.float32}
    pivot = load_file(fresh.experiment / "world/models/pivot/model.safetensors")
    ways = [torch.cat([(weights(fresh, n)[k] - pivot[k]).flatten() for k in pivot]) for n in ("full", "mixed")]
    assert not torch.equal(*ways), "bf16 is computed in"
    assert torch.cosine_similarity(*ways, dim=0) > 0.9, "and is no other training"


def test_adapters_over_a_bf16_pivot_are_fp32_and_merged_in_fp32(fresh: Mini) -> None:
    lora = ["lora.enabled=true", "lora.r=2", "pivot.dtype=bfloat16", "trainer.precision=bf16-true", "optimizer.lr=1e-5"]
    fresh.run("train", "source=a", *lora)
    pivot = load_file(fresh.experiment / "world/models/pivot/model.safetensors")
    target = weights(fresh, "a")
    changes = {name: target[name] - pivot[name] for name in pivot if "proj" in name}
    assert all(t.dtype == torch.float32 for t in target.values())
    assert all(torch.equal(target[name], pivot[name]) for name in pivot.keys() - changes.keys())
    for name, change in changes.items():  # a bf16 sum would lose changes a thousand times smaller than the weights
        assert 0 < change.abs().max() < 2e-3 * pivot[name].abs().max()
        values = torch.linalg.svdvals(change.double())
        assert values[2] < 0.05 * values[0], f"{name}: the change has the rank of its adapter"


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "64-true"])
@pytest.mark.parametrize("strategy", ["auto", "ddp", "fsdp"])
def test_no_plugin_touches_weights_or_batches(precision: str, strategy: str, mini: Mini) -> None:
    trainer = quiet_trainer({"accelerator": "cpu", "devices": 1, "strategy": strategy, "precision": precision}, [])
    batch = rows_of(mini)[Draw([0, 3], 7)]
    kept = copy.deepcopy(vars(batch))
    converted = vars(trainer.precision_plugin.convert_input(batch))
    for name, value in kept.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, converted[name]) and value.dtype == converted[name].dtype, name
        else:
            assert value == converted[name], name
    layer: Any = nn.Linear(2, 2).to(torch.bfloat16)
    layer.register_buffer("inv_freq", torch.ones(3))
    assert trainer.precision_plugin.convert_module(layer).inv_freq.dtype == torch.float32


def test_positions_are_exact_in_bf16(mini: Mini) -> None:
    path = str(mini.experiment / "world/models/pivot")
    whole, half = (load_model(path, dtype=dtype).model.rotary_emb.inv_freq for dtype in ("float32", "bfloat16"))
    assert half.dtype == torch.float32 and torch.equal(half, whole)


def test_loading_heeds_no_block_that_names_a_device(mini: Mini) -> None:
    with torch.device("meta"):  # Lightning has one around configure_model, of the GPU
        model = load_model(str(mini.experiment / "world/models/pivot"))
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_a_rank_without_chats_trains_on_nothing(mini: Mini) -> None:
    module, rows = module_of(mini, FusionLoss(lm_weight=0.5)), rows_of(mini)
    total, *_ = module._losses(rows[Draw([], 5)])
    total.backward()
    assert total.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in module.parameters())


def test_a_product_in_blocks_is_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a card does, where operands are narrower than their sum; a CPU has no such product and gets a stand-in."""
    monkeypatch.setattr(products, "_summed", lambda left, right: left.float() @ right.float())
    monkeypatch.setattr(products, "BLOCK", 3)
    left, right = torch.randn(5, 8).bfloat16().t(), torch.randn(5, 4).bfloat16()
    total = torch.ones(8, 4)
    products.add_product(total, left, right)
    assert torch.allclose(total, 1 + left.float() @ right.float(), atol=1e-6)
