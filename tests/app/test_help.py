"""--help: what it says, and that it costs nothing: no config is composed and nothing heavy imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fusechat.app import help
from fusechat.app.registry import GROUPS, choices
from fusechat.app.verbs import STARTED, VERBS, WITHOUT_CONFIG, as_typed, module_of, typed
from tests.conftest import ROOT

HEAVY = {"torch", "numba", "transformers", "lightning", "datasets", "wandb", "numpy", "pandas", "rich"}
CONFIGURED = [verb for verb in VERBS if verb not in WITHOUT_CONFIG]


def ask(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, text=True, capture_output=True, env=os.environ | environment)


@pytest.mark.parametrize("verb", CONFIGURED)
def test_help_names_commands_groups_and_choices(verb: str) -> None:
    text = help.text(verb)
    assert f"{typed(verb)} " in text
    assert "\n    fusechat_7b_varm  FuseChat v1 (arXiv 2402.16107)" in text
    assert "HYDRA_FULL_ERROR=1" in text
    for key in GROUPS:
        if names := choices(key):
            assert f"  {key}: {', '.join(names)}\n" in text


@pytest.mark.parametrize("verb", CONFIGURED)
def test_help_imports_nothing_heavy(verb: str) -> None:
    done = ask("-X", "importtime", "-m", module_of(verb), "--help")
    assert done.returncode == 0
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "hydra" in loaded, "the list of imports is read"
    assert not loaded & HEAVY
    assert done.stdout.startswith(help.about(verb))


def test_own_files_are_listed(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text("# @package _global_\n# experiment=mine: my own models\nseed: 1\n")
    assert "    mine              my own models" in help.text("train", [tmp_path])
    assert help.folders_of(["--config-dir", "a", "-cd", "b", "--config-dir=c"]) == [Path("a"), Path("b"), Path("c")]


def test_one_command_for_all() -> None:
    done = ask("-m", "fusechat", "--help")
    assert [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")] == list(VERBS)
    assert ask("-m", "fusechat").stdout == done.stdout
    wrong = ask("-m", "fusechat", "publsih")
    message = "error: fusechat has no command 'publsih'; did you mean publish? (fusechat --help lists them)"
    assert (wrong.returncode, wrong.stderr.strip()) == (1, message)
    assert "  fusechat train experiment=tiny source=a " in ask("-m", "fusechat", "train", "--help").stdout


def test_hints_are_as_the_command_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    hint = "python -m fusechat.extract experiment=tiny, then python train.py or python merge.py; python -m fusechat.extractor"
    monkeypatch.delenv(STARTED, raising=False)
    assert as_typed(hint) == hint
    monkeypatch.setenv(STARTED, "1")
    wanted = "fusechat extract experiment=tiny, then fusechat train or fusechat merge; python -m fusechat.extractor"
    assert as_typed(hint) == wanted
