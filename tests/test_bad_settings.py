"""Settings that cannot be meant are told in one line before any work starts."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fusechat.app import door
from fusechat.app.errors import UserError
from fusechat.fusion import Callbacks, Data, FusionLoss, FusionRule, Optimizer
from tests.conftest import ROOT, composed

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
