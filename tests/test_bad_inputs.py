"""Mistakes that people make, each with the one line that it is told in: value, expectation, remedy; nothing is written."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from fusechat.app import door
from fusechat.app.errors import UserError
from fusechat.chats.formats import load_chats
from fusechat.evaluate.answers import load_questions
from fusechat.fusion import Callbacks, Data, FusionLoss, FusionRule, Optimizer
from fusechat.judge.files import read_answers
from fusechat.models.load import load_model
from fusechat.report import report
from tests.conftest import ROOT, Mini, composed

WHOLE = r"expected a whole number from 1 on$"
NUMBER = "expected a number above 0$"
MOST = "expected a number above 0, at most 1"
SETTINGS = [  # verb, override, what is said of it
    ("train", "loss.temperature=0", NUMBER),
    ("train", "loss.temperature=nan", NUMBER),
    ("train", "loss.student_temperature=-1", NUMBER),
    ("train", "sources=[a,a]", r"sources=\['a','a'\]: expected a list of sources, each once"),
    ("train", "data.validation_fraction=-3", "expected a number from 0 to below 1"),
    ("extract", "chat.template=nativ", r"expected pivot, native, plain, or a Jinja text .*; did you mean native\?"),
    ("extract", "chat.max_length=0", "expected a whole number from 2 on"),
    ("extract", "chat.max_length=1", "expected a whole number from 2 on"),
    ("extract", "chat.max_length=-5", "expected a whole number from 2 on"),
    ("extract", "extract.top_p=0", MOST),
    ("extract", "extract.top_p=1.5", MOST),
    ("extract", "extract.tokens_per_batch=0", WHOLE),
    ("extract", "extract.rows_per_shard=0", WHOLE),
    ("extract", "extract.draws=0", WHOLE),
    ("merge", "merge=ties merge.density=0", MOST),
    ("merge", "merge=ties merge.density=2", MOST),
    ("merge", "merge.max_shard_size=0", "expected a size, e.g. 5GB, 200MB or a number of bytes"),
    ("merge", "merge.weighting=softmax merge.temperature=0", NUMBER),
    ("merge", "merge.dtype=foo", "is unknown; use one of: float32, bfloat16, float16"),
    ("merge", "merge.patterns=[{match:'('}]", r"merge\.patterns\[0\]\.match='\(': expected a regular expression"),
    ("extract", "source.dtype=float99", "is unknown; use one of: float32, bfloat16, float16"),
    ("train", "trainer.devices=0", "expected a whole number from 1 on or auto or a list"),
    (
        "train",
        "trainer.accelerator=cuda",
        r"trainer\.accelerator=cuda: none is here; use trainer\.accelerator=cpu or auto",
    ),
    ("align", "alignment.num_proc=0", WHOLE),
    ("align", "alignment.num_proc=-2", WHOLE),
    ("train", "data.batch_size=0", "expected a whole number from 1 on"),
    ("train", "data.bucket=0", WHOLE),
    ("train", "optimizer.lr=-1", NUMBER),
    ("train", "optimizer.lr=nan", NUMBER),
    ("train", "optimizer.schedule=foo", "is unknown; use one of: linear, cosine, "),
    ("train", "loss.kind=[ce]", r"loss\.kind=\['ce'\]: expected a text"),
    ("train", "loss.kind=mse", r"loss\.kind='mse' is unknown; use one of: alm, ce, "),
    ("train", "pivot.dtype=foo", "is unknown; use one of: float32, bfloat16, float16"),
    ("train", "lora.r=0", WHOLE),
    ("evaluate", "evaluation.batch_size=0", "expected a whole number from 1 on or auto"),
    ("evaluate", "evaluation.max_new_tokens=0", WHOLE),
    ("pipeline", "pipeline.steps=null", r"expected auto, or a list of commands, e\.g\. \[tiny,'extract source=a,b'\]"),
    (
        "extract",
        "source.path=/nope",
        r"source\.path=/nope does not exist; expected a model's directory, a GGUF file or a Hub id",
    ),
    ("merge", "targets=DIR", r"targets='DIR': expected a list .*; write 'targets=\[DIR\]'"),
    ("report", "runs=abc", r"runs='abc': expected a list .*; write 'runs=\[abc\]'"),
    ("tiny", "seed=abc", "seed='abc': expected a whole number from 0"),
    ("train", "+loss.temprature=1", r"the config has no key 'loss\.temprature'; did you mean temperature"),
    ("train", "+trainer.devicess=1", r"the config has no key 'trainer\.devicess'; did you mean devices\?"),
    ("train", "trainer.max_epochs=-1 trainer.max_steps=-1", "together never end; give one of them"),
    (
        "train",
        "callbacks.early_stopping=2 data.validation_fraction=0 validation.path=null",
        r"give e\.g\. data\.validation_fraction=0\.05",
    ),
    ("merge", "target=DIR", r"target=DIR is for merge=compress; a merge takes targets='\[DIR,DIR\]'"),
    ("merge_search", "search.space.sce.density=[0.1,7]", r"search\.space\.sce\.density: merge\.density=7: " + MOST),
    ("extract", "source.load_in=4bit", r"source\.load_in=4bit needs bitsandbytes: pip install bitsandbytes"),
    ("train", "logger=wandb", "logger=wandb needs an account"),
    ("train", "preset=qlora", r"pivot\.load_in=4bit needs bitsandbytes: pip install bitsandbytes"),
    ("train", "preset=[flash_attention_2,lora]", r"=flash_attention_2 needs flash_attn: pip install flash-attn"),
    ("train", "pivot.attn_implementation=flash_attention_2", r"in half precision; set trainer\.precision=bf16-mixed"),
    ("extract", "source.attn_implementation=flash_attention_2", r"in half precision; set source\.dtype=bfloat16"),
    (
        "extract",
        "source.attn_implementation=kernels-community/flash-attn2 source.dtype=bfloat16",
        r"source\.attn_implementation='kernels-community/flash-attn2' needs a CUDA device, and none is here",
    ),
    ("train", "chat.train_on=first", r"chat\.train_on='first' is unknown; use one of: all, last"),
    ("train", "data.packing=maybe", r"data\.packing='maybe': expected true or false"),
    ("extract", "chat.path=[]", r"chat\.path=\[\]: expected a path, or a list of paths and of \{path: PATH, rows: N\}"),
    ("evaluate", "model=null", r"^model is missing; run: python -m fusechat\.evaluate model=DIR$"),
]
ABSENT = ("bitsandbytes", "flash_attn")
OUTPUTS = [("train", "output_dir"), ("extract", "output_dir"), ("evaluate", "output_file"), ("report", "output_dir")]
OUTPUTS += [("compare", "output_file"), ("merge", "output_dir"), ("judge", "output_file")]
GIVEN = {
    "evaluate": ["model={root}"],
    "compare": ["first=a.json", "second=b.json"],
    "judge": ["answers=a.jsonl", "judge.base_url=http://localhost/v1", "judge.model=m"],
}


def checked(verb: str, root: Path, *overrides: str) -> None:
    """What a command does before it begins."""
    given = [part.format(root=root) for part in GIVEN.get(verb, [])]
    places = ["experiment=tiny", f"paths.root={root}/runs", f"pivot.path={root}", f"source.path={root}", "logger=csv"]
    door.check_surroundings(door.check_config(composed(verb, [*places, *given, *overrides])))


@pytest.fixture(autouse=True)
def no_accelerator(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.parametrize(("verb", "overrides", "message"), SETTINGS, ids=lambda part: str(part)[:60])
def test_settings(verb: str, overrides: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in ABSENT else name)
    with pytest.raises(UserError, match=message) as told:
        checked(verb, tmp_path, *overrides.split())
    assert "\n" not in str(told.value)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("verb", ["train", "extract", "align", "merge", "report", "merge_search", "tiny", "evaluate"])
def test_what_is_right_passes(verb: str, tmp_path: Path) -> None:
    checked(verb, tmp_path)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(("verb", "key"), OUTPUTS)
def test_outputs_that_cannot_be_written(verb: str, key: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=rf"{key}=.*file/x/y cannot be written \(.*file is a file\); choose another"):
        checked(verb, tmp_path, f"{key}={tmp_path}/file/x/y")


def test_everything_missing_is_named_at_once_with_the_command(tmp_path: Path) -> None:
    own = tmp_path / "experiment"
    own.mkdir()
    (own / "mine.yaml").write_text("# @package _global_\n# mine\nexperiment_name: mine\n")
    command = [sys.executable, "-m", "fusechat.extract", "--config-dir", str(tmp_path), "experiment=mine"]
    done = subprocess.run([*command, f"paths.root={tmp_path}/runs"], cwd=ROOT, text=True, capture_output=True)
    told = done.stderr
    assert done.returncode == 1 and not done.stdout and told.count("\n") == 1
    assert "source.name, source.path, chat.path, pivot.path are missing; run: python -m fusechat.extract" in told
    assert "experiment=mine" in told and "source.name=NAME source.path=DIR chat.path=FILE pivot.path=DIR" in told
    assert not (tmp_path / "runs/mine").exists()


@pytest.mark.parametrize(
    "make",
    [
        lambda: FusionLoss(temperature=0),
        lambda: FusionLoss(student_temperature=float("nan")),
        lambda: FusionRule(level="word"),
        lambda: Optimizer(lr=float("nan")),
        lambda: Optimizer(betas=(0.9,)),
        lambda: Data(bucket=0),
        lambda: Callbacks(early_stopping=0),
    ],
)
def test_python_is_checked_as_the_command_is(make: Any) -> None:
    with pytest.raises(UserError, match=r"^(loss|fusion|optimizer|data|callbacks)\.\w+=.*(: expected|is unknown)"):
        make()


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


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sources=[]"], r"no source takes part in the fusion; name one with source=NAME, or set fusion=sft"),
        (["ckpt_path=/nowhere.ckpt"], r"ckpt_path=/nowhere\.ckpt does not exist; give a \.ckpt of this training"),
        (
            ["ckpt_path={root}/tiny/seed0/world/chats/test.jsonl"],
            r"ckpt_path=.* is no checkpoint; give a \.ckpt of this",
        ),
        (["pivot.path={root}/tiny/seed0/world/models/a"], r"pivot\.path=.* has another vocabulary or chat template"),
    ],
)
def test_training(overrides: list[str], message: str, mini: Mini) -> None:
    given = [part.format(root=mini.root) for part in overrides]
    with pytest.raises(UserError, match=message):
        mini.run("train", "source=a", f"output_dir={mini.root}/bad/bad", *given)
    assert not (mini.root / "bad").exists()


def test_sft_and_evaluation_need_no_source_and_no_chats(mini: Mini) -> None:
    place = f"output_dir={mini.root}/plain/targets/sft"
    nothing = ["source=default", "chat=default", "chat.max_length=256", "trainer.max_steps=1"]
    assert mini.cfg("train", "fusion=sft", *nothing).run_name == "sft"
    mini.run("train", "fusion=sft", place, *nothing)
    model, output = f"model={mini.root}/plain/targets/sft", f"output_file={mini.root}/plain/result.json"
    mini.run("evaluate", model, output, "evaluation.limit=4", "evaluation.generate=false", *nothing)
    assert json.loads((mini.root / "plain/result.json").read_text())["config"]["source"]["path"] == "???"
    shutil.rmtree(mini.root / "plain")


def test_test_questions_among_the_chats_are_told(mini: Mini, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = (mini.experiment / "world/chats/fusion.jsonl").read_text().splitlines()[:4]
    (tmp_path / "tests.jsonl").write_text("\n".join([*lines[:3], CHAT]))
    (tmp_path / "chats.jsonl").write_text("\n".join(lines) + "\n")
    files = [f"chat.path={tmp_path}/chats.jsonl", f"evaluation.chats={tmp_path}/tests.jsonl"]
    with caplog.at_level(logging.WARNING):
        mini.run("extract", "source=a", f"output_dir={tmp_path}/store", *files)
    assert "3 of 4 questions of evaluation.chats=" in caplog.text


def test_no_experiment_is_taken_unless_it_is_named(tmp_path: Path) -> None:
    """What is missing is said at once, all of it, with the shortest command that would do."""
    expected = {
        "extract": "source.name, source.path, chat.path, pivot.path are missing; run: fusechat extract source.name=NAME ",
        "train": "pivot.path, source.name are missing; run: fusechat train pivot.path=DIR source.name=NAME",
        "train fusion=sft": "pivot.path is missing; run: fusechat train fusion=sft pivot.path=DIR",
        "merge": "pivot.path, targets are missing; run: fusechat merge pivot.path=DIR targets='[DIR,DIR]'",
        "merge merge=compress": "pivot.path, target are missing; run: fusechat merge merge=compress pivot.path=DIR target=DIR",
        "evaluate": "model, evaluation.chats are missing; run: fusechat evaluate model=DIR evaluation.chats=FILE",
        "pipeline": "pipeline.steps is missing; run: fusechat pipeline experiment=NAME",
        "align source.name=a pivot.path=DIR chat.path=FILE": "make it with: fusechat extract pivot.path=DIR chat.path=FILE "
        "source=pivot",
    }
    for command, message in expected.items():
        run = [sys.executable, "-m", "fusechat", *command.split()]
        done = subprocess.run(
            run, cwd=tmp_path, text=True, capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
        )
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
        assert message in done.stderr
    assert not list(tmp_path.iterdir()), "nothing is written, no run is opened"


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (
            "['extract source=a','train source=a loss.temperature=0']",
            "step 2 .*: loss.temperature=0: expected a number",
        ),
        ("['extract surce=a']", r"step 1 \(extract surce=a\): the config has no key 'surce'"),
        ('["extract source=\'a"]', r"pipeline\.steps: .* cannot be read \(No closing quotation\); close its quotes"),
    ],
)
def test_a_pipeline_checks_every_step_first(steps: str, message: str, tmp_path: Path) -> None:
    import re

    command = [sys.executable, "-m", "fusechat.pipeline", "experiment=tiny", f"pipeline.steps={steps}"]
    command.append(f"paths.root={tmp_path}")
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    told = done.stdout + done.stderr
    assert done.returncode == 1 and re.search(message, told) and "Traceback" not in told
    assert not (tmp_path / "tiny/seed0/distributions").exists()
