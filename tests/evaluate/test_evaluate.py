"""Evaluation: batches answer as single prompts do, killed runs go on."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fusechat.app.errors import UserError
from fusechat.chats.render import ChatRenderer
from fusechat.evaluate import generation, perplexity
from tests.conftest import Mini


@pytest.mark.parametrize("name", ["pivot", "a", "b", "c"])
def test_a_batch_of_eight_equals_one_by_one(name: str, mini: Mini, tokenizers: Callable[[str], Any]) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(mini.experiment / "world/models" / name)
    renderer = ChatRenderer(tokenizers(name))
    prompts = [[{"role": "user", "content": "Sort " + "a b c d "[: 2 * n] + "."}] for n in range(8)]
    options = {"max_new_tokens": 6}
    together = generation.generate(model, renderer, prompts, batch_size=8, **options)
    assert together == [generation.generate(model, renderer, [p], batch_size=1, **options)[0] for p in prompts]
    chats = [[*p, {"role": "assistant", "content": "a b c"}] for p in prompts]
    scores = perplexity.score(model, renderer, chats, batch_size=8)
    for chat, found in zip(chats, scores, strict=True):
        rendered = renderer([chat])[0]
        ids = torch.from_numpy(rendered.input_ids)
        labels = torch.where(torch.from_numpy(rendered.assistant_mask), ids, -100)
        with torch.no_grad():
            mean = model(input_ids=ids[None], labels=labels[None]).loss
        assert found["nats"] == pytest.approx(float(mean) * found["tokens"], rel=1e-4)


def test_evaluate_writes_skips_and_resumes(fresh: Mini, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusechat.evaluate.chats.PART", 5)
    model = f"model={fresh.experiment}/world/models/pivot"
    value = fresh.run("evaluate", model)
    file = fresh.experiment / "evaluation/models-pivot.json"
    content = json.loads(file.read_text())
    assert content["metrics"]["bits_per_byte"]["all"]["value"] == value
    assert len(content["samples"]) == 24
    file.unlink()
    part = file.with_suffix(f".{content['fingerprint']}.part")
    part.write_text("".join(json.dumps(s) + "\n" for s in content["samples"][:7]) + '{"cut sho')
    original, seen = perplexity.score, []

    def counted(model: Any, renderer: Any, chats: Any, batch_size: int) -> Any:
        seen.append(len(chats))
        return original(model, renderer, chats, batch_size)

    monkeypatch.setattr(perplexity, "score", counted)
    assert fresh.run("evaluate", model) == pytest.approx(value)
    assert sum(seen) == 17
    assert not part.exists()
    assert fresh.run("evaluate", model) == pytest.approx(value)
    assert sum(seen) == 17


def test_unknown_model(mini: Mini) -> None:
    with pytest.raises(UserError, match=r"model=None is not a model directory"):
        mini.run("evaluate")
