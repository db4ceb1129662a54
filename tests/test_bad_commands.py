"""Commands that miss something or do not fit what is there: told in one line that names the remedy; nothing is written."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fusechat.app.errors import UserError
from tests.conftest import ROOT, Mini
from tests.test_bad_files import CHAT


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
