"""The command: keys that it heeds, parts as processes of their own, and the published settings."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fusechat.app.errors import UserError
from fusechat.app.outputs import read_json
from fusechat.mutual import __main__ as command
from fusechat.stores.store import DistributionStore
from tests.conftest import ROOT, composed, run_entry
from tests.mutual.conftest import Small


def overrides(small: Small, out: Path) -> list[str]:
    client = f"{{path: {small.root}/a, chats: {small.root}/private_a.jsonl}}"
    given = [f"pivot.path={small.root}/server", f"chat.path={small.root}/public.jsonl", "chat.template=native"]
    given += [
        f"mutual.clients={{a: {client}}}",
        f"output_dir={out}",
        "fusion=dual_min_ce",
        "extract.top_k=4",
        "lora.r=2",
    ]
    given += ["trainer.max_epochs=1", "chat.max_length=128", "data.validation_fraction=0.0", "mutual.rounds=1"]
    return [*given, f"paths.root={out.parent}/runs", "logger=none", "callbacks.progress_bar=false"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("preset=flash_attention_2", r"pivot.attn_implementation=flash_attention_2 is not heeded by mutual: all sides"),
        ("lora.adapter=somewhere", r"lora.adapter=somewhere is not heeded by mutual: .*; leave it out"),
    ],
)
def test_keys_that_are_not_heeded_are_refused(given: str, message: str, small: Small, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        run_entry("mutual", [*overrides(small, tmp_path / "out"), given])
    assert not (tmp_path / "out").exists()


def test_clients_of_an_experiment_are_replaced_as_the_message_says(tmp_path: Path) -> None:
    own, command = "mutual.clients={a: {path: x, chats: y}}", [sys.executable, "-m", "fusechat.mutual"]
    run = lambda *given: subprocess.run(
        [*command, "experiment=fedmkt_tiny", *given, "--cfg", "job"], cwd=ROOT, capture_output=True, text=True
    )
    refused = run(own)
    assert refused.returncode == 2
    assert (
        f"mutual.clients has other keys than these; replace all of them with: '~mutual.clients' '+{own}'"
        in refused.stderr
    )
    shown = run("~mutual.clients", f"+{own}").stdout
    assert "  clients:\n    a:\n      path: x\n" in shown and "private_c1.jsonl" not in shown


def test_a_part_by_its_command(small: Small, tmp_path: Path) -> None:
    run_entry("mutual", [*overrides(small, tmp_path / "out"), "mutual.side=a", "mutual.round=1"])
    assert json.loads((tmp_path / "out/sides/a/round-01/part.json").read_text())["last"] is False
    assert sorted(file.name for file in (tmp_path / "out/exchange/round-01/a").iterdir()) == [
        "envelope.json",
        "knowledge.arrow",
    ]


def test_parts_are_processes_and_a_late_one_is_ended(small: Small, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fusechat.mutual", *overrides(small, tmp_path / "out"), "mutual=standalone"]
    late = subprocess.run([*command, "mutual.timeout=0.001"], cwd=ROOT, capture_output=True, text=True)
    assert late.returncode == 0, late.stderr
    assert "round 1 goes on without a: its part took more than mutual.timeout=0.001 minutes" in late.stderr
    assert not (tmp_path / "out/a").exists()
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "out/sides/a/round-02/part.json").exists(), "the part after the last round"


def test_the_published_settings() -> None:
    cfg = composed("mutual", ["experiment=fedmkt_tiny"])
    assert (cfg.lora.r, cfg.lora.lora_alpha, cfg.lora.lora_dropout, cfg.loss.lm_weight) == (8, 16, 0.05, 0.9)
    assert (list(cfg.optimizer.betas), cfg.optimizer.weight_decay, cfg.optimizer.warmup_ratio) == (
        [0.9, 0.95],
        0.1,
        0.008,
    )
    assert (cfg.trainer.gradient_clip_val, cfg.data.global_batch, cfg.fusion.rule) == (1.0, 4, "dual_min_ce")
    assert cfg.mutual.rounds <= 10 and cfg.mutual.epochs == cfg.trainer.max_epochs == 1


def test_chats_may_be_mixtures(small: Small, tmp_path: Path) -> None:
    part = "{{path: {}/{}.jsonl, rows: {}}}".format
    given = [f"chat.path=[{part(small.root, 'public', 8)}]", f"validation.path=[{part(small.root, 'public', 3)}]"]
    both = f"[{part(small.root, 'private_a', 4)},{part(small.root, 'private_b', 2)}]"
    given += [f"mutual.clients={{a: {{path: {small.root}/a, chats: {both}}}}}", "mutual.side=a", "mutual.round=1"]
    run_entry("mutual", [*overrides(small, tmp_path / "out"), *given])
    stores = [DistributionStore(tmp_path / "out/sides/a" / name) for name in ("private", "public/round-01-practised")]
    assert [len(store) for store in stores] == [6, 8]
    held = read_json(tmp_path / "out/sides/a/round-01/practised/fusechat.json")
    assert held["metrics"]["validation/bits_per_byte"] > 0


def test_parts_are_started_with_folders_of_configs_before_what_is_set(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hydra's parser takes nothing more of what is set once an option has come after some of it."""
    from hydra._internal.utils import get_args_parser

    commands = list[list[str]]()
    monkeypatch.setattr(command, "passed_on", lambda *but: (["seed=1", "+a=2"], ["--config-dir", "some"]))
    monkeypatch.setattr(command, "run_child", lambda given, limit: commands.append(list(given)) or 0)
    monkeypatch.setattr("fusechat.mutual.mutual", lambda federation, start, overwrite: start("a", 1))
    run_entry("mutual", overrides(small, tmp_path / "out"))
    known = get_args_parser().parse_args(commands[0][3:])
    assert known.config_dir == "some" and known.overrides[:4] == ["seed=1", "+a=2", "mutual.side=a", "mutual.round=1"]
