"""Sweeps: a grid, several processes, a search; failed jobs are named and the others finish."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra

import train
from tests.conftest import Mini

ROOT = Path(__file__).parent.parent
QUIET = ["hydra/job_logging=stdout", "hydra/hydra_logging=disabled"]


def sweep(monkeypatch: pytest.MonkeyPatch, world: Mini, *overrides: str) -> None:
    """``python train.py -m ...`` in this process."""
    GlobalHydra.instance().clear()
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setattr(sys, "argv", ["train.py", "-m", *world.base, *QUIET, f"hydra.sweep.dir={world.root}/sweep", *overrides])
    train.main()


def metric(world: Mini, name: str) -> float:
    record = json.loads((world.experiment / "targets" / name / "fusechat.json").read_text())
    return float(record["metrics"]["validation/bits_per_byte"])


def test_a_grid_trains_every_combination(fresh: Mini, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = ["source=a,b", "fusion=min_ce,avg_ce", "trainer.max_steps=2", "run_name=${source.name}_${fusion.rule}"]
    sweep(monkeypatch, fresh, *grid)
    assert {path.name for path in (fresh.experiment / "targets").iterdir()} == {"a_min_ce", "a_avg_ce", "b_min_ce", "b_avg_ce"}
    before = {path: path.stat().st_mtime_ns for path in fresh.experiment.glob("targets/*/model.safetensors")}
    sweep(monkeypatch, fresh, *grid)
    assert before == {path: path.stat().st_mtime_ns for path in before}, "the same sweep again trains nothing"


def test_optuna_minimises_validation_bits_per_byte(fresh: Mini, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep(
        monkeypatch, fresh, "sweep=optuna", "hydra.sweeper.n_trials=3", "hydra.sweeper.params={loss.lm_weight:'choice(0.1,0.9)'}",
        "trainer.max_steps=2",
    )  # fmt: skip
    found: dict[str, Any] = yaml.safe_load((fresh.root / "sweep/optimization_results.yaml").read_text())
    assert found["best_value"] == pytest.approx(min(metric(fresh, f"search_{i}") for i in range(3)))
    assert found["best_params"]["loss.lm_weight"] in (0.1, 0.9)


def test_joblib_names_the_failed_job_and_finishes_the_others(fresh: Mini) -> None:
    command = [sys.executable, "train.py", "-m", *fresh.base, f"hydra.sweep.dir={fresh.root}/sweep", "sweep=joblib", "trainer.max_steps=2"]
    done = subprocess.run([*command, "source=a", "run_name=x", "loss.lm_weight=0.5,7"], cwd=ROOT, text=True, capture_output=True, timeout=300)
    assert done.returncode == 1
    assert "1 job(s) failed" in done.stderr
    assert "loss.lm_weight=7" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert (fresh.experiment / "targets/x/model.safetensors").exists()
