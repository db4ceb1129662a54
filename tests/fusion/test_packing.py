"""Chats that share a row: the same loss and gradients as in rows of their own, and none sees another."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fusechat.app.errors import UserError
from fusechat.chats.padding import Laid, Layout, flattened, layout_of, packed, padded, reading
from fusechat.fusion import LOSSES, RULES, FusionLoss, FusionRule
from fusechat.fusion.batches import FusionRows
from fusechat.fusion.inputs import open_stores
from fusechat.fusion.module import FusionModule
from fusechat.fusion.packing import check_apart
from fusechat.fusion.plan import Draw
from tests.conftest import Mini
from tests.fusion.trained import distance, module_of, moved, weights

SHARED = [packed, flattened]
DRAWN = [*range(0, 36, 3)]  # chats of one to four questions
PAIRS = [(kind, rule) for kind in LOSSES for rule in RULES if kind not in ("alm", "hybrid") or rule != "avg_ce"]


@pytest.fixture(scope="module")
def mixed(mini: Mini, tmp_path_factory: pytest.TempPathFactory) -> Mini:
    """Chats of one to four questions each, of which the longest are cut, in stores of pivot and source a."""
    root = tmp_path_factory.mktemp("packing")
    lines = (mini.experiment / "world/chats/fusion.jsonl").read_text().splitlines()
    turns = [json.loads(line)["messages"] for line in lines]
    chats = [sum(turns[i : i + 1 + i % 4], []) for i in range(40)]
    (root / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    world = Mini(root / "runs", f"chat.path={root}/chats.jsonl", "chat.max_length=64", "extract.rows_per_shard=16")
    (world.experiment / "world").parent.mkdir(parents=True)
    (world.experiment / "world").symlink_to(mini.experiment / "world")
    for source in ("pivot", "a"):
        world.run("extract", f"source={source}")
    world.run("align", "source=a")
    world.run("align", "source=pivot")
    return world


def rows(world: Mini, lay: Layout, chunked: bool = False) -> FusionRows:
    return FusionRows(
        open_stores(world.experiment / "distributions/pivot", [world.experiment / "aligned/a"]), 0, chunked, lay
    )


def computed(module: FusionModule, data: FusionRows) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Loss, sums and gradients of a batch."""
    module.zero_grad()
    total, sft, fusion, part = module._losses(data[Draw(DRAWN, 100)])
    total.backward()
    gradients = [p.grad.flatten() for p in module.parameters() if p.grad is not None]
    return [total.detach(), sft, fusion, part], torch.cat(gradients)


@pytest.mark.parametrize(("kind", "rule"), PAIRS)
@pytest.mark.parametrize("chunked", [True, False], ids=["hidden", "logits"])
def test_loss_and_gradients_are_the_unpacked_ones(kind: str, rule: str, chunked: bool, mixed: Mini) -> None:
    if rule == "sft" and kind != "ce":
        kind = "ce"  # nothing is fused
    level = "sequence" if kind == "alm" else "token"
    module = module_of(mixed, FusionLoss(kind, lm_weight=0.3, chunked=chunked), FusionRule(rule, level=level)).double()
    wanted, gradient = computed(module, rows(mixed, padded, kind == "alm"))
    for lay in SHARED:
        ours, own = computed(module, rows(mixed, lay, kind == "alm"))
        for a, b in zip(ours, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
        assert (own - gradient).abs().max() < 1e-12 * gradient.abs().max()
    assert gradient.abs().max() > 1e-3


@pytest.mark.parametrize("lay", SHARED)
def test_every_position_holds_its_own_chats_tokens(lay: Layout, mixed: Mini) -> None:
    """Places in shared rows point to the token and the next one of the chat itself, cut chats included."""
    data = rows(mixed, lay)
    batch, alone = data[Draw(DRAWN, 1)], rows(mixed, padded)[Draw(DRAWN, 1)]
    assert len(batch.input_ids) < len(DRAWN)
    assert batch.input_ids.shape[1] == (alone.input_ids.shape[1] if lay is packed else batch.attention_mask.sum())
    assert torch.equal(batch.gold, alone.gold)
    here, there = batch.input_ids.reshape(-1)[batch.at], alone.input_ids.reshape(-1)[alone.at]
    assert torch.equal(here, there)
    places = batch.position_ids.reshape(-1)[batch.at]
    assert torch.equal(places, alone.at % alone.input_ids.shape[1])
    lengths = data.stores[0].lengths("input_ids")
    assert (lengths[DRAWN] == 64).any(), "some are cut"
    assert int(batch.attention_mask.sum()) == lengths[DRAWN].sum()


@pytest.mark.parametrize("lay", SHARED)
def test_a_chat_sees_nothing_of_its_neighbours(lay: Layout, mixed: Mini) -> None:
    """Bit for bit: other tokens in all chats but one leave its logits as they are."""
    module = module_of(mixed, FusionLoss())
    module.model.eval()
    torch.nn.init.normal_(module.model.lm_head.weight)
    chats = [torch.arange(3, 3 + n) for n in (20, 9, 6, 5)]
    laid, changed = lay(chats, 0), lay([(chats[0] + 1), (chats[1] + 1), chats[2], chats[3] + 1], 0)
    both = [logits(module.model, each) for each in (laid, changed)]
    own = slice(int(laid.starts[2]), int(laid.starts[2]) + 6)
    assert torch.equal(both[0][own], both[1][own])
    assert not torch.equal(both[0], both[1])
    alone = module.model(input_ids=chats[2].unsqueeze(0)).logits[0]
    torch.testing.assert_close(both[0][own], alone)


def test_a_target_is_the_one_of_unpacked_training(mixed: Mini) -> None:
    """Steps, accumulation, validation; and no fingerprint knows of it: the target is there already."""
    exact = ["source=a", "pivot.dtype=float64", "trainer.precision=64-true", "data.batch_size=4", "trainer.max_steps=3"]
    exact += ["data.bucket=1", "validation.path=null", "data.validation_fraction=0.2"]
    values = [
        mixed.run("train", f"run_name=packing_{packing}", f"data.packing={packing}", *exact)
        for packing in ("false", "true")
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-9)
    assert distance(weights(mixed, "packing_false"), weights(mixed, "packing_true")) < 1e-9
    assert moved(mixed, "packing_true") > 1e-4
    before = (mixed.experiment / "targets/packing_false/fusechat.json").stat().st_mtime_ns
    assert mixed.run("train", "run_name=packing_false", "data.packing=true", *exact) == values[0]
    assert (mixed.experiment / "targets/packing_false/fusechat.json").stat().st_mtime_ns == before


def made(kind: str, **options: Any) -> Any:
    """A random model of an architecture."""
    sizes = {
        "vocab_size": 90,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    config = getattr(transformers, f"{kind}Config")(**{**sizes, "intermediate_size": 48, "pad_token_id": 0, **options})
    return transformers.AutoModelForCausalLM.from_config(config)


KEPT = ["Llama", "Qwen2", "GPTNeoX", "GPT2", "Phi", "Gemma2", "Mixtral"]
LEAKY = [  # layers that know no chats, and models that hand no position ids on
    ("Mamba", {}),
    ("Lfm2", {"layer_types": ["conv", "full_attention"]}),
    ("Bloom", {}),
    ("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
]


@pytest.mark.parametrize("lay", SHARED)
@pytest.mark.parametrize("kind", KEPT)
def test_architectures_that_keep_chats_apart(kind: str, lay: Layout) -> None:
    model = made(kind).train()
    check_apart(model, lay, torch.device("cpu"), run)
    assert model.training


@pytest.mark.parametrize(("kind", "options"), LEAKY, ids=[kind for kind, _ in LEAKY])
def test_architectures_that_do_not_are_refused(kind: str, options: dict[str, Any]) -> None:
    told = (
        f"{kind}ForCausalLM lets chats of one row see each other, .*; set data.packing=false, which changes no result"
    )
    with pytest.raises(UserError, match=told):
        check_apart(made(kind, **options), packed, torch.device("cpu"), run)


def test_a_model_without_position_ids_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("Llama")
    forward = model.forward
    without: Callable[..., Any] = lambda input_ids, attention_mask=None, use_cache=None: forward(
        input_ids, attention_mask
    )
    monkeypatch.setattr(model, "forward", without)
    with pytest.raises(UserError, match=r"LlamaForCausalLM takes no position ids, .*; set data\.packing=false"):
        check_apart(model, packed, torch.device("cpu"), run)


def test_training_asks_the_model_first(mixed: Mini, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pivot's attention made to see all of a row."""
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None)
    with pytest.raises(UserError, match=r"LlamaForCausalLM lets chats of one row see each other"):
        mixed.run("train", "source=a", "run_name=leaky", "data.packing=true")
    assert not Path(mixed.experiment / "targets/leaky").exists()


@pytest.mark.parametrize(
    ("packing", "attention", "layout"),
    [
        (False, "flash_attention_2", padded),
        (True, None, packed),
        (True, "sdpa", packed),
        (True, "eager", packed),
        (True, "flex_attention", packed),
        (True, "flash_attention_2", flattened),
        (True, "kernels-community/flash-attn2", flattened),
    ],
)
def test_flash_attention_takes_one_row(packing: bool, attention: str | None, layout: Layout) -> None:
    assert layout_of(packing, attention) is layout


def logits(model: Any, laid: Laid) -> torch.Tensor:
    found: torch.Tensor = model(**reading(laid.ids, laid.mask, laid.positions), use_cache=False).logits
    return found.flatten(0, 1)


def run(work: Callable[[], torch.Tensor]) -> torch.Tensor:
    return work()
