"""FedAvg and FedCoLLM on miniature models: what is averaged, what is learned, what is sent, who is left out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from fusechat.app.errors import UserError
from fusechat.fusion import FusionLoss, FusionRule
from fusechat.mutual import mutual
from fusechat.mutual.federation import Federation
from fusechat.mutual.messages import TENSORS, post
from fusechat.mutual.methods import SERVER
from fusechat.mutual.sides import LEARNED, PRACTISED, RECEIVED
from fusechat.tiny.models import make_model
from tests.fusion.trained import distance
from tests.mutual.conftest import CANARY, Small
from tests.mutual.test_messages import leaks, messages, resealed

OF_ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def collaborated(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Federation:
    """FedCoLLM's three rounds: every public chat is learned from, by the divergence."""
    terms = {"rule": FusionRule(include_pivot=False), "loss": FusionLoss("forward_kl", lm_weight=0.5)}
    made = small.federation(tmp_path_factory.mktemp("fedcollm") / "out", "fedcollm", 3, **terms)
    mutual(made)
    return made


def sent(made: Federation, round: int, name: str) -> dict[str, torch.Tensor]:
    return load_file(made.exchange.place(round, name) / OF_ADAPTER)


def test_the_average_is_weighted_by_private_chats(small: Small, tmp_path: Path) -> None:
    extra = (small.root / "private_b.jsonl").read_text().splitlines()[:5]
    (small.root / "private_more.jsonl").write_text("\n".join(extra) + "\n")
    made = small.federation(tmp_path / "out", "fedavg")
    clients = {
        **made.clients,
        "b": type(made.clients["b"])(made.clients["b"].path, str(small.root / "private_more.jsonl")),
    }
    made = Federation("fedavg", made.server, clients, made.folder, made.terms, 1)
    mutual(made)
    a, b, average = (sent(made, 1, name) for name in ("a", "b", SERVER))
    for name in average:
        assert torch.allclose(average[name], (17 * a[name] + 5 * b[name]) / 22, atol=1e-7), name
    base = load_file(f"{made.clients['a'].path}/model.safetensors")
    ends = [load_file(made.folder / name / "model.safetensors") for name in ("a", "b")]
    assert distance(*ends) == 0 < distance(ends[0], base), "both end with the average"
    assert not (made.folder / SERVER).exists(), "there is no LLM in FedAvg"


def test_any_merge_method_averages(small: Small, tmp_path: Path) -> None:
    made = small.federation(tmp_path / "out", "fedavg", average="ties", average_settings={"density": 1.0})
    mutual(made)
    before, a, b, average = (sent(made, *at) for at in ((0, SERVER), (1, "a"), (1, "b"), (1, SERVER)))
    for name, factor in average.items():
        deltas = torch.stack([a[name] - before[name], b[name] - before[name]])
        signs = (17 * deltas).sum(0).sign()
        agree = deltas.sign() == signs
        naive = before[name] + (deltas * agree).sum(0) / agree.sum(0).clamp_min(1)
        assert torch.allclose(factor, naive, atol=1e-6), name


def test_both_models_learn_and_only_the_small_ones_adapter_is_sent(collaborated: Federation) -> None:
    side = collaborated.side(SERVER)
    for folder, other in ((side.folder, "small"), (side.folder / "small", SERVER)):
        record = json.loads((folder / f"round-02/{LEARNED}/fusechat.json").read_text())
        assert record["wins"]["all"] == {other: 1.0}, "no selection"
    learned = load_file(side.folder / f"small/round-02/{LEARNED}/adapter/{OF_ADAPTER}")
    assert distance(learned, sent(collaborated, 2, SERVER)) == 0
    received = load_file(collaborated.side("a").place(3, RECEIVED) / f"adapter/{OF_ADAPTER}")
    assert distance(received, learned) == 0
    assert {file.name for file in messages(collaborated)} == {"envelope.json", OF_ADAPTER}
    assert all(TENSORS.fullmatch(name) for name in sent(collaborated, 1, "a"))
    assert distance(*(load_file(collaborated.folder / name / "model.safetensors") for name in ("a", "b"))) == 0
    assert (collaborated.folder / SERVER / "model.safetensors").exists()


def test_nothing_private_leaves_with_adapters(small: Small, collaborated: Federation) -> None:
    for name in ("a", "b"):
        text = CANARY.format(name)
        ids = AutoTokenizer.from_pretrained(small.root / "a")(text, add_special_tokens=False)["input_ids"]
        assert not [file for file in messages(collaborated) if leaks(file.read_bytes(), text, ids)]


def test_the_first_adapter_is_the_same_for_all_and_changes_nothing(collaborated: Federation, tmp_path: Path) -> None:
    side = collaborated.side("a")
    first = side.at(1, RECEIVED)
    assert first is not None
    assert not first.has_weights, "no later round needs them"
    base = load_file(f"{collaborated.clients['a'].path}/model.safetensors")
    side.restore(first, tmp_path)
    assert distance(load_file(tmp_path / "model.safetensors"), base) == 0
    assert not any(tensor.any() for name, tensor in sent(collaborated, 0, SERVER).items() if "lora_B" in name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {name: tensor * float("nan") for name, tensor in t.items()}, "has NaN or inf in base_model"),
        (
            lambda t: {name: tensor[:1] for name, tensor in t.items()},
            "a sends factors of other names or shapes than it",
        ),
        (lambda t: {**t, "chats": torch.zeros(1)}, "holds chats, which is no part of an adapter; it is not read"),
        (lambda t: dict([*t.items()][1:]), "a sends factors of other names or shapes than it was sent"),
    ],
)
def test_a_server_averages_without_adapters_that_it_cannot_take(
    change: object, message: str, small: Small, tmp_path: Path
) -> None:
    made = small.federation(tmp_path / "out", "fedavg")
    made.part(SERVER, 0)
    first = made.exchange.place(0, SERVER)
    for name in ("a", "b"):
        post(made.exchange.place(1, name), sender=name, round=1, adapter=first, trained_on=3)
    place = made.exchange.place(1, "a")
    save_file(change(load_file(place / OF_ADAPTER)), place / OF_ADAPTER)  # type: ignore[operator]
    resealed(place)
    made.part(SERVER, 1)
    left = json.loads(made.done(SERVER, 1).read_text())["left"]
    with pytest.raises(UserError, match=message):
        raise UserError(left["a"])
    assert distance(sent(made, 1, SERVER), sent(made, 1, "b")) == 0, "the one that is left is the average"


def test_adapters_that_do_not_leave_or_cannot_be_averaged(small: Small, tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    save_file({"base_model.model.lm_head.weight": torch.zeros(1)}, tmp_path / "own" / OF_ADAPTER)
    with pytest.raises(
        UserError, match=r"trains base_model.model.lm_head.weight whole: only low-rank factors leave a side"
    ):
        post(tmp_path / "message", sender="a", round=1, adapter=tmp_path / "own")
    assert not (tmp_path / "message").exists()
    made = small.federation(tmp_path / "out")
    with pytest.raises(
        UserError,
        match=r"adapters of one model alone are averaged, the clients have 2 \(.*/a, .*/b\); use mutual=fedmkt",
    ):
        Federation("fedavg", made.server, made.clients, made.folder, made.terms)


def test_a_client_that_practised_goes_on_from_what_the_server_sends(collaborated: Federation) -> None:
    side = collaborated.side("a")
    record = json.loads((side.place(2, PRACTISED) / "fusechat.json").read_text())
    assert "adapter" in record["decided_by"]
    practised = side.at(2, PRACTISED)
    assert practised is not None
    assert distance(load_file(f"{practised.adapter}/{OF_ADAPTER}"), sent(collaborated, 2, "a")) == 0
    assert distance(sent(collaborated, 1, SERVER), sent(collaborated, 2, "a")) > 1e-4


def test_adapters_of_a_mixtures_experts_are_averaged(small: Small, tmp_path: Path) -> None:
    """all-linear reaches the experts' parameters; what both end with is what peft makes of the adapter that was sent."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    tokenizer, base = AutoTokenizer.from_pretrained(small.root / "a"), tmp_path / "mixture"
    make_model("mixtral", tokenizer, 16, 1, 2).save_pretrained(base)
    tokenizer.save_pretrained(base)
    made = small.federation(tmp_path / "out", "fedavg", lora={"r": 2, "target_modules": "all-linear"})
    clients = {name: replace(client, path=str(base)) for name, client in made.clients.items()}
    made = replace(made, clients=clients)
    mutual(made)
    a, b, average = (sent(made, 1, name) for name in ("a", "b", SERVER))
    assert any(".experts." in name for name in average)
    assert all(torch.allclose(average[name], (a[name] + b[name]) / 2, atol=1e-7) for name in average)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), made.folder / "a/adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    ends = [load_file(place / "model.safetensors") for place in (tmp_path / "merged", made.folder / "a", base)]
    assert distance(ends[0], ends[1]) < 1e-6 < distance(ends[1], ends[2])
    assert distance(ends[1], load_file(made.folder / "b/model.safetensors")) == 0
