"""Evaluation: batches answer as single prompts do, metrics resample honestly, killed runs go on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fusechat.app.errors import UserError
from fusechat.chats.render import ChatRenderer
from fusechat.evaluate import generation, perplexity
from fusechat.report import results
from fusechat.report.statistics import compare, interval
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


def samples(seed: int, shift: float = 0.0, n: int = 200) -> list[dict[str, Any]]:
    rng, noise = np.random.default_rng(0), np.random.default_rng(seed)
    base = rng.gamma(2, 2, n)
    return [
        {"id": i, "nats": b + shift + 0.1 * e, "bytes": 5, "tokens": 4, "correct": b < 4}
        for i, (b, e) in enumerate(zip(base, noise.normal(size=n), strict=True))
    ]


def test_intervals_cover_the_value_and_pairing_sees_small_differences() -> None:
    first, second, same = samples(1), samples(2, 0.1), samples(3)
    entry = interval(first, "bits_per_byte")
    assert entry["low"] < entry["value"] < entry["high"]
    assert entry["value"] == pytest.approx(sum(s["nats"] for s in first) / np.log(2) / 1000)
    found = compare(first, second, "bits_per_byte")
    assert found["low"] > 0
    assert found["p"] < 0.01
    assert found["high"] - found["low"] < 0.2 * (entry["high"] - entry["low"]), (
        "pairing takes the samples' own spread out"
    )
    assert compare(first, same, "bits_per_byte")["p"] > 0.01
    with pytest.raises(UserError, match="different test sets"):
        compare(first, second[1:], "bits_per_byte")


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


def test_unknown_model_and_metric(mini: Mini, fresh: Mini) -> None:
    with pytest.raises(UserError, match=r"model=None is not a model directory"):
        mini.run("evaluate")
    with pytest.raises(UserError, match=r"holds no evaluations; make one with: python -m fusechat\.evaluate"):
        fresh.run("report")
    fresh.run("evaluate", f"model={fresh.experiment}/world/models/a")
    with pytest.raises(
        UserError, match=r"report\.metric='speed' is in no evaluation; use one of: accuracy, bits_per_byte"
    ):
        fresh.run("report", "report.metric=speed")
    (fresh.experiment / "evaluation/broken.json").write_text('{"metrics"')
    with pytest.raises(UserError, match=r"broken\.json is half-written; remove it and evaluate again"):
        fresh.run("report")


def test_table_shows_the_overrides_that_differ(fresh: Mini) -> None:
    for weight in ("0.5", "0.9"):
        fresh.run("train", "source=a", f"run_name=w{weight}", f"loss.lm_weight={weight}")
        fresh.run("evaluate", f"model={fresh.experiment}/targets/w{weight}")
    frame = results.table(results.ordered(results.collect([fresh.experiment]), "bits_per_byte"))
    assert set(frame["loss.lm_weight"]) == {0.5, 0.9}
    assert "optimizer.lr" not in frame
    assert results.markdown(frame).count("\n") == 4


def test_curves_put_the_rows_of_a_step_together(tmp_path: Path) -> None:
    from fusechat.report.page import training_curves

    for part, text in {
        "from_step_0": "step,train/sft,validation/bits_per_byte,wins/all/a\n5,1.0,,\n9,0.8,,\n9,,0.5,\n9,,,0.7\n14,0.1,,\n",
        "from_step_9": "step,train/sft,validation/bits_per_byte,wins/all/a\n14,0.6,,\n19,,0.4,\n",
    }.items():
        (tmp_path / "logs/train-a" / part).mkdir(parents=True)
        (tmp_path / "logs/train-a" / part / "metrics.csv").write_text(text)
    curve = training_curves(tmp_path)["a"].set_index("step")
    assert curve["validation/bits_per_byte"].dropna().to_dict() == {9: 0.5, 19: 0.4}
    assert curve["train/sft"].dropna().to_dict() == {5: 1.0, 9: 0.8, 14: 0.6}, (
        "what the resumed run logged again counts"
    )
