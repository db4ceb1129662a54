"""Models, chats, questions and answers that are broken are told with file and place."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from fusechat.app.errors import UserError
from fusechat.chats.formats import load_chats
from fusechat.evaluate.answers import load_questions
from fusechat.judge.files import read_answers
from fusechat.models.load import load_model
from fusechat.report import report


def small_model(path: Path) -> Path:
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=32, **shape)).save_pretrained(path)
    return path


NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.fill_(float("nan")), rf"holds NaN or inf in {NAME}; copy or download the model again"),
        (lambda w: w.index_fill_(0, torch.tensor([3]), float("-inf")), rf"holds NaN or inf in {NAME}"),
        (lambda w: None, rf"lacks {NAME}, 1 tensors in all; copy or download the model again"),
        (lambda w: w[:5].clone(), "its tensors have other shapes than its config.json says"),
    ],
)
def test_a_model_is_complete_and_finite_or_refused(change: Any, message: str, tmp_path: Path) -> None:
    file = small_model(tmp_path / "m") / "model.safetensors"
    tensors = load_file(file)
    changed = change(tensors.pop(NAME))
    save_file(tensors | ({} if changed is None else {NAME: changed}), file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=message):
        load_model(str(tmp_path / "m"))


CHAT = '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (CHAT.encode() * 3 + b'{"messages": \n', r"x\.jsonl, line 4: not JSON \(.*\); mend or remove the line"),
        (
            CHAT.encode() * 2 + CHAT.encode().replace(b"q", b"\xff"),
            r"x\.jsonl, line 3: byte 0xff is no UTF-8; save the",
        ),
        (CHAT.encode() + b"[" * 100_000, r"x\.jsonl, line 2: not JSON \(maximum recursion depth"),
        (b'{"messages": [{"role": "user", "content": "q"}]}\n' * 2, r"the assistant has no text in any of 2 chats"),
        (b'{"messages": [{"role": "assistant", "content": " "}]}\n', r"the assistant has no text in any of 1 chats"),
        (b'{"messages": ["q", "a"]}\n', r"chat 0: a turn is not a role with a text"),
        (CHAT.replace('"a"', "[1]").encode(), r"chat 0: a turn is not a role with a text \(its content is a list of"),
        (CHAT.replace('"a"', '["a"]').encode(), r"chat 0: a turn is not a role with a text \(its content is a list of"),
        (
            CHAT.encode() + CHAT.replace('"q"', "[1]").encode(),
            r"chat 1: a turn is not a role with a text \(its content",
        ),
        (CHAT.encode() + b'{"messages": 7}\n', r"chat 1: a turn is not a role with a text"),
        (b"", r"x\.jsonl is empty; see chat\.path"),
    ],
)
def test_chats(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message) as told:
        load_chats(tmp_path / "x.jsonl")
    assert "\n" not in str(told.value)


def test_chats_without_an_answer_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "x.jsonl").write_text(CHAT + '{"messages": [{"role": "user", "content": "q"}]}\n')
    assert len(load_chats(tmp_path / "x.jsonl")[0]) == 2
    assert "the assistant has no text in 1 of 2 chats" in caplog.text


QUESTION = '{"question_id": 1, "turns": ["q"]}\n'


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        ("", "mt_bench", "holds no questions"),
        ("[]", "alpaca_eval", "holds no questions"),
        (QUESTION * 2 + "{", "mt_bench", r"q\.jsonl, line 3: not JSON"),
        ('[\n{"instruction": "q"},\n{]', "alpaca_eval", r"q\.jsonl, line 3: not JSON"),
        ('{"question_id": 1, "turns": []}', "mt_bench", r"question 1: expected turns: a list of questions, found \[\]"),
        ('{"question_id": 1, "turns": "q"}', "mt_bench", "question 1: expected turns: a list of questions"),
        ('[{"instruction": 7}]', "alpaca_eval", "question 1: expected instruction: a text"),
    ],
)
def test_questions(content: str, kind: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        load_questions(tmp_path / "q.jsonl", kind)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no answers"),
        ("[]", "holds no answers"),
        ('{"choices": [{"turns": ["a"]}]}', r"answer 1: expected question_id and choices"),
        ('{"question_id": 1, "choices": []}', r"answer 1: expected question_id and choices"),
        ('{"question_id": 1, "choices": [{"turns": [3]}]}', r"answer 1: expected question_id and choices"),
        ('[{"instruction": "q"}]', r"answer 1: expected instruction and output"),
        ('{"question_id": 1', r"a\.jsonl, line 1: not JSON"),
    ],
)
def test_answers_to_judge(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text(QUESTION)
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        read_answers(tmp_path / "a.jsonl", tmp_path / "q.jsonl")


def test_a_baseline_that_is_no_evaluation(tmp_path: Path) -> None:
    sample = {"id": "1", "tag": "", "nats": 1.0, "bytes": 2.0, "tokens": 1.0}
    result = {"name": "models-a", "model": "a", "tests": "t", "samples": [sample], "metrics": {}}
    result["metrics"] = {"bits_per_byte": {"all": {"value": 1.0, "low": 1.0, "high": 1.0}}}
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation/models-a.json").write_text(json.dumps(result))
    with pytest.raises(UserError, match=r"report\.baseline='foo' is in no evaluation; use one of: models-a"):
        report([tmp_path], tmp_path / "report", baseline="foo")
    assert not (tmp_path / "report").exists()
