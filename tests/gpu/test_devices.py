"""On the card: extraction and evaluation give what the CPU gives, and every card extracts shards of its own."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fusechat.chats.formats import load_chats
from fusechat.chats.render import ChatRenderer
from fusechat.evaluate import generation, perplexity
from fusechat.extract.extractor import Extractor
from fusechat.extract.kinds import Keep
from fusechat.extract.summary import totals
from fusechat.models.load import load_model, load_tokenizer
from fusechat.stores.store import DistributionStore
from tests.conftest import Mini

pytestmark = pytest.mark.gpu
CARD, CPU = torch.device("cuda"), torch.device("cpu")


def chats(mini: Mini, count: int = 16) -> list[Any]:
    rows, _ = load_chats(str(mini.experiment / "world/chats/fusion.jsonl"))
    return [row["messages"] for row in rows.select(range(count))]


def loaded(mini: Mini, name: str, device: torch.device) -> tuple[Any, ChatRenderer]:
    path = str(mini.experiment / "world/models" / name)
    return load_model(path, device=device).eval(), ChatRenderer(load_tokenizer(path))


@pytest.mark.parametrize("name", ["pivot", "a", "b", "c"])
def test_the_card_extracts_what_the_cpu_does(name: str, mini: Mini) -> None:
    on_card, on_cpu = (loaded(mini, name, device) for device in (CARD, CPU))
    rendered = on_cpu[1](chats(mini))
    found, wanted = (Extractor(model, "top_k", Keep(400))(rendered) for model, _ in (on_card, on_cpu))
    for one, other in zip(found, wanted, strict=True):
        assert one is not None and other is not None
        assert one.ids.device == CPU
        assert torch.allclose(one.gold_logprob, other.gold_logprob, atol=2e-3)
        assert torch.allclose(one.logprobs.exp(), other.logprobs.exp(), atol=2e-3)


def test_the_batch_loop_waits_once(mini: Mini) -> None:
    """No synchronisation while chunks are worked on: torch raises at the first."""
    model, renderer = loaded(mini, "a", CARD)
    extractor, rendered = Extractor(model, "top_k", Keep(400)), renderer(chats(mini))
    extractor(rendered)
    stored, gold = (
        torch.randn(64, model.config.hidden_size, device=CARD),
        torch.zeros(64, dtype=torch.long, device=CARD),
    )
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.inference_mode():
            parts = list(extractor._sparse(stored, gold, None))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sum(len(part.ids) for part in parts) == 64


def test_the_command_on_every_card(mini: Mini) -> None:
    output = Path(f"{mini.root}/cards")
    where = ["extract.trainer.accelerator=cuda", "extract.trainer.devices=auto"]
    mini.run("extract", "source=b", *where, f"output_dir={output}")
    found, wanted = (DistributionStore(path) for path in (output, mini.experiment / "distributions/b"))
    assert found.fingerprint == wanted.fingerprint
    assert totals(found.manifest)["nats"] == pytest.approx(totals(wanted.manifest)["nats"], rel=1e-3)


def test_memory_that_runs_out_halves_the_batch(mini: Mini) -> None:
    """Real memory: the card is filled up to what half of the batch needs."""
    model, renderer = loaded(mini, "a", CARD)
    extractor, rendered = Extractor(model, "top_k", Keep(400)), renderer(chats(mini) * 512)
    whole = extractor(rendered)
    needed = torch.cuda.max_memory_allocated()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.7 * needed / torch.cuda.get_device_properties(0).total_memory)
    try:
        halved = extractor(rendered)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert extractor.unfit
    for one, other in zip(whole, halved, strict=True):
        assert one is not None and other is not None
        assert torch.allclose(one.gold_logprob, other.gold_logprob, atol=2e-3)


def test_evaluation_on_the_card(mini: Mini) -> None:
    talks = chats(mini, 8)
    (on_card, renderer), (on_cpu, _) = (loaded(mini, "c", device) for device in (CARD, CPU))
    scores = [perplexity.score(model, renderer, talks, 4) for model in (on_card, on_cpu)]
    for one, other in zip(*scores, strict=True):
        assert one["nats"] == pytest.approx(other["nats"], rel=2e-3)
    prompts = [talk[:-1] for talk in talks]
    answers = [generation.generate(m, renderer, prompts, max_new_tokens=8, batch_size=4) for m in (on_card, on_cpu)]
    assert sum(one == other for one, other in zip(*answers, strict=True)) >= 6
    value = mini.run("evaluate", f"model={mini.experiment}/world/models/c", "evaluation.device=cuda", "overwrite=true")
    assert value > 0
