"""--help: what it says, and that it costs nothing: no config is composed and nothing heavy imported."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from fusechat.app import help
from fusechat.app.keys import keys_of
from fusechat.app.needs import NEEDS
from fusechat.app.registry import GROUPS, choices
from fusechat.app.verbs import STARTED, VERBS, WITHOUT_CONFIG, as_typed, module_of, typed
from tests.conftest import ROOT, composed

HEAVY = {"torch", "numba", "transformers", "lightning", "datasets", "wandb", "numpy", "pandas", "rich"}
LEFT_TO_AN_EXPERIMENT = ("tiny.models", "source.path")  # mappings, or told below their group
CONFIGURED = [verb for verb in VERBS if verb not in WITHOUT_CONFIG]


def ask(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, text=True, capture_output=True, env=os.environ | environment)


@pytest.mark.parametrize("verb", CONFIGURED)
def test_help_begins_with_three_examples_and_names_its_own_keys(verb: str) -> None:
    lines = help.text(verb).splitlines()
    assert sum(line.startswith(f"  {typed(verb)} ") for line in lines) >= 3
    told = {line.split("=")[0].strip() for line in lines if re.match(r"  \w[\w.]*=", line)}
    assert {key.name for key in keys_of(verb)} <= told
    assert {key for key in NEEDS.get(verb, ()) if key not in LEFT_TO_AN_EXPERIMENT} <= told
    assert max(map(len, lines)) <= 160 and len(lines) < 130
    assert "--help all" in lines[-5]


@pytest.mark.parametrize(
    ("verb", "told"),
    [
        (
            "train",
            "loss=ce one of alm, ce, forward_kl, hybrid, jsd, reverse_kl, standardized_uld, uld loss.lm_weight=0.9 ",
        ),
        ("train", "loss.lm_weight=0.9 lambda: share of the SFT loss; 1 is plain SFT [a number from 0 to 1] "),
        ("train", "fusion.empty=skip positions the chosen model is silent about: skip, or pivot (as released) "),
        ("pipeline", "and their soup; 0: none [a whole number from 0 on] pipeline.many_to_one=false "),
        ("merge_search", "trials done before are not made again [a whole number from 1 on] search.folder="),
        ("extract", "extract.trainer.devices=auto one process for each, with chats of its own: "),
    ],
)
def test_a_key_has_its_default_its_reason_and_its_type(verb: str, told: str) -> None:
    assert told in " ".join(help.text(verb).split())


def test_every_key_that_is_told_is_one_that_the_config_has() -> None:
    for verb in CONFIGURED:
        cfg = composed(verb, [])
        for key in keys_of(verb):
            assert OmegaConf.is_missing(cfg, key.name) or key.name in _flat(OmegaConf.to_container(cfg)), (verb, key)


def _flat(tree: Any, prefix: str = "") -> set[str]:
    names = set()
    for name, value in tree.items():
        names |= {prefix + name} | (_flat(value, f"{prefix}{name}.") if isinstance(value, dict) else set())
    return names


@pytest.mark.parametrize("verb", CONFIGURED)
def test_all_help_names_commands_groups_and_choices(verb: str) -> None:
    text = help.text(verb, everything=True)
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
    assert "Groups (group=option):" not in done.stdout


def test_own_files_are_listed(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text("# @package _global_\n# experiment=mine: my own models\nseed: 1\n")
    assert "    mine              my own models" in help.text("train", [tmp_path], everything=True)
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
