"""Evaluation: batches answer as single prompts do, killed runs go on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AddedToken, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from fusechat.app.errors import UserError
from fusechat.chats.render import ChatRenderer
from fusechat.evaluate import evaluate, generation, perplexity
from fusechat.models.whole import accept
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
            out = model(input_ids=ids[None], labels=labels[None])
        assert found["nats"] == pytest.approx(float(out.loss) * found["tokens"], rel=1e-4)
        assert found["hits"] == int((out.logits[0, :-1].argmax(-1) == labels[1:]).sum())


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
    with pytest.raises(UserError, match=r"model is missing; run: python -m fusechat\.evaluate model=DIR"):
        mini.run("evaluate")


def test_an_answer_ends_with_any_of_the_models_own_stop_tokens(mini: Mini, tokenizers: Callable[[str], Any]) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(mini.experiment / "world/models/a")
    for weight in model.parameters():
        weight.data.normal_()  # says something else at every step
    tokenizer, renderer = tokenizers("a"), ChatRenderer(tokenizers("a"))
    prompts = [[{"role": "user", "content": "Sort b a."}]]
    ids = tokenizer(renderer.prompt(prompts[0]), add_special_tokens=False, return_tensors="pt").input_ids
    free = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)[0, ids.shape[1] :].tolist()
    end = next(i for i in range(1, 5) if free[i] not in free[:i])
    model.generation_config.eos_token_id = [free[end], tokenizer.eos_token_id]
    answer = generation.generate(model, renderer, prompts, max_new_tokens=6, batch_size=1)[0]
    assert answer == tokenizer.decode(free[: end + 1], skip_special_tokens=True).strip()
    assert answer != tokenizer.decode(free, skip_special_tokens=True).strip()


def test_stop_tokens_are_the_models_the_tokenizers_and_the_templates(tokenizers: Callable[[str], Any]) -> None:
    tokenizer = tokenizers("a")
    eos = tokenizer.eos_token_id
    assert generation.stop_tokens(ChatRenderer(tokenizer), None) == [eos]
    tokenizer.add_tokens(AddedToken("<|turn|>", special=True))
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|turn|>\n{% endfor %}"
    turn = tokenizer.convert_tokens_to_ids("<|turn|>")
    assert generation.stop_tokens(ChatRenderer(tokenizer), GenerationConfig(eos_token_id=[3, 5])) == [
        *sorted([eos, 3, 5]),
        turn,
    ]
    assert generation.stop_tokens(ChatRenderer(tokenizer), GenerationConfig(eos_token_id=3)) == [
        *sorted([eos, 3]),
        turn,
    ]
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    assert generation.stop_tokens(ChatRenderer(tokenizer), None) == [eos], "white space closes nothing"


SERVED = ("engine", "base_url", "model", "key_env", "requests", "retries", "wait")  # keys of models behind a server


def test_results_made_before_stops_and_devices_were_looked_at_are_recognised(fresh: Mini) -> None:
    """And the device decides nothing; other stop tokens do."""
    from fusechat.app.outputs import fingerprint, stage_fingerprint
    from fusechat.evaluate.kinds import Job
    from fusechat.models.load import model_identity

    model = f"{fresh.experiment}/world/models/b"
    output = fresh.experiment / "evaluation/models-b.json"
    fresh.run("evaluate", f"model={model}", "evaluation.device=cpu")
    content, before = json.loads(output.read_text()), output.stat().st_mtime_ns
    settings = content["config"]["evaluation"]
    decided = {
        key: value for key, value in settings.items() if key not in ("file", "device", "chats", "chats_seed", *SERVED)
    }
    mark = stage_fingerprint(None, model=model_identity(model), evaluation=decided, seed=0)
    tags = fingerprint(tags=[sample["tag"] for sample in content["samples"]])
    assert content["fingerprint"] == fingerprint(mark=mark, tests=content["tests"], tags=tags)
    fresh.run("evaluate", f"model={model}", "evaluation.device=auto")
    assert output.stat().st_mtime_ns == before
    assert Job(model, "b", settings, 0).stops() == {}


@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize("moved", [True, False])
def test_results_that_counted_where_the_chats_lie_are_recognised(moved: bool, asked: bool, fresh: Mini) -> None:
    """And those of now are, wherever the experiment is; other chats at the same place are others."""
    from fusechat.app.outputs import fingerprint, stage_fingerprint, write_json
    from fusechat.models.load import model_identity

    model, output = fresh.experiment / "world/models/b", fresh.experiment / "evaluation/models-b.json"
    place = "/elsewhere/test.jsonl" if moved else f"{fresh.experiment}/world/chats/test.jsonl"
    fresh.run("evaluate", f"model={model}")
    content = json.loads(output.read_text())
    settings = content["config"]["evaluation"] | {"chats": place}
    counted = {key: value for key, value in settings.items() if key not in ("file", "device", "chats_seed", *SERVED)}
    mark = stage_fingerprint(None, model=model_identity(str(model)), evaluation=counted, seed=0)
    old = {key: value for key, value in content.items() if key not in ("checksum", "asked")}
    old |= {"fingerprint": fingerprint(mark=mark, tests=content["tests"])}
    old |= {"asked": old["fingerprint"]} if asked else {}
    old["config"]["evaluation"]["chats"] = place
    write_json(output, old)
    before = output.stat().st_mtime_ns
    fresh.run("evaluate", f"model={model}")
    assert output.stat().st_mtime_ns == before, "recognised"
    chats = fresh.experiment / "world/chats/test.jsonl"
    chats.write_text(chats.read_text().replace('"tag": "sort"', '"tag": "order"'))
    fresh.run("evaluate", f"model={model}", "accept_changes=true")
    assert {"order"} <= set(json.loads(output.read_text())["metrics"]["accuracy"]), "other tags are another breakdown"
    kept = chats.read_text().splitlines(keepends=True)
    chats.write_text("".join(kept[1:]))
    fresh.run("evaluate", f"model={model}", "accept_changes=true")
    assert len(json.loads(output.read_text())["samples"]) == len(kept) - 1


def test_a_copied_experiment_is_not_evaluated_again(fresh: Mini) -> None:
    model, output = "world/models/c", "evaluation/models-c.json"
    fresh.run("evaluate", f"model={fresh.experiment}/{model}")
    moved = Mini(fresh.root.with_name("moved"))
    fresh.root.rename(moved.root)
    before = (moved.experiment / output).stat().st_mtime_ns
    moved.run("evaluate", f"model={moved.experiment}/{model}")
    assert (moved.experiment / output).stat().st_mtime_ns == before


def test_other_stop_tokens_are_another_result(fresh: Mini) -> None:
    from fusechat.evaluate.kinds import Job

    model = fresh.experiment / "world/models/b"
    GenerationConfig(eos_token_id=[3, 4]).save_pretrained(model)
    accept(model)
    found = Job(str(model), "b", {}, 0).stops()["stops"]
    assert {3, 4} < set(found)
    (model / "generation_config.json").unlink()
    accept(model)
    assert Job(str(model), "b", {}, 0).stops() == {}


def test_an_offloaded_model_is_scored_where_accelerate_runs_it(mini: Mini, tokenizers: Callable[[str], Any]) -> None:
    import accelerate
    from transformers import AutoModelForCausalLM

    load = lambda: AutoModelForCausalLM.from_pretrained(mini.experiment / "world/models/a")
    renderer = ChatRenderer(tokenizers("a"))
    chats = [[{"role": "user", "content": "Sort b a."}, {"role": "assistant", "content": "a b"}]] * 2
    wanted = perplexity.score(load(), renderer, chats, 2)
    offloaded = accelerate.cpu_offload(load(), execution_device=torch.device("cpu"))
    assert perplexity.score(offloaded, renderer, chats, 2) == wanted
    prompts = [chat[:1] for chat in chats]
    assert len(generation.generate(offloaded, renderer, prompts, max_new_tokens=2, batch_size=2)) == 2


def test_a_device_that_is_not_there(mini: Mini) -> None:
    with pytest.raises(UserError, match=r"evaluation\.device=cuda:99: no such device here; this machine has: cpu"):
        mini.run("evaluate", f"model={mini.experiment}/world/models/c", "evaluation.device=cuda:99")


def test_memory_that_runs_out_names_the_key(fresh: Mini, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(perplexity, "score", full)
    with pytest.raises(UserError, match=r"^out of memory with evaluation\.batch_size=7: lower it, or spread the model"):
        fresh.run("evaluate", f"model={fresh.experiment}/world/models/c", "evaluation.batch_size=7")


def test_the_last_answer_is_asked_for_whoever_speaks_last(fresh: Mini, tmp_path: Path) -> None:
    model, file = fresh.experiment / "world/models/pivot", tmp_path / "chats.jsonl"
    talk = [{"role": "user", "content": "Sort the letters b a c."}, {"role": "assistant", "content": "a b c"}]
    rows = [talk, [*talk, {"role": "user", "content": "Thanks."}]]
    file.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    result = evaluate(model, file, tmp_path / "result.json", max_new_tokens=4)
    samples = [{key: sample[key] for key in ("prompt", "reference", "answer")} for sample in result["samples"]]
    assert samples[0] == samples[1]
    assert samples[0]["reference"] == "a b c"
    assert samples[0]["prompt"] == "Sort the letters b a c."


def test_a_chat_without_a_question_cannot_be_asked_again(fresh: Mini, tmp_path: Path) -> None:
    model, file = fresh.experiment / "world/models/pivot", tmp_path / "texts.jsonl"
    file.write_text('{"text": "a b c"}\n')
    with pytest.raises(
        UserError, match=r"1 of 1 chats hold no answer to a question \(the first: 0\), and evaluation\.g"
    ):
        evaluate(model, file, tmp_path / "result.json")
    options = {"generate": False, "template": "plain"}
    assert "bits_per_byte" in evaluate(model, file, tmp_path / "result.json", **options)["metrics"]


def test_a_base_model_is_asked_in_the_pivots_format(fresh: Mini) -> None:
    models, own = fresh.experiment / "world/models", fresh.root / "base"
    AutoModelForCausalLM.from_pretrained(models / "a").save_pretrained(own)
    tokenizer = AutoTokenizer.from_pretrained(models / "a")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(own)
    options = [f"model={own}", "evaluation.generate=false"]
    with pytest.raises(
        UserError, match=r"base has no chat template; give one with evaluation\.template='<jinja>' or ev"
    ):
        fresh.run("evaluate", *options)
    value = fresh.run("evaluate", *options, "evaluation.template=pivot")
    template = AutoTokenizer.from_pretrained(models / "pivot").chat_template
    given = {"max_length": fresh.cfg("evaluate", *options).chat.max_length, "generate": False, "template": template}
    result = evaluate(own, fresh.experiment / "world/chats/test.jsonl", fresh.root / "own.json", **given)
    assert result["metrics"]["bits_per_byte"]["all"]["value"] == pytest.approx(value, rel=1e-9)
