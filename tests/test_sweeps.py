"""Sweeps: a grid, several processes, a search; failed jobs are named and the others finish."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from submitit.slurm.slurm import _make_sbatch_string

import train
from fusechat import merge_search
from fusechat.app.command import CONF
from fusechat.merge_search import held_out_chats
from fusechat.merging.search import COLUMN
from tests.conftest import ROOT, Mini

QUIET = ["hydra/job_logging=stdout", "hydra/hydra_logging=disabled"]


def sweep(monkeypatch: pytest.MonkeyPatch, world: Mini, *overrides: str) -> None:
    """``python train.py -m ...`` in this process."""
    GlobalHydra.instance().clear()
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setattr(sys, "argv", ["train.py", "-m", *world.base, *QUIET, *overrides])
    train.main()


def search(monkeypatch: pytest.MonkeyPatch, world: Mini, *overrides: str) -> float:
    """``python -m fusechat.merge_search`` in this process; the best value."""
    GlobalHydra.instance().clear()
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setattr(sys, "argv", ["merge_search", *world.base, *QUIET, *overrides])
    merge_search.main()
    return min(t[COLUMN] for t in trials(world))


def trials(world: Mini) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (world.experiment / "merge_search/trials.jsonl").read_text().splitlines()]


def metric(world: Mini, name: str) -> float:
    record = json.loads((world.experiment / "targets" / name / "fusechat.json").read_text())
    return float(record["metrics"]["validation/bits_per_byte"])


def test_a_grid_trains_every_combination(fresh: Mini, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = ["source=a,b", "loss.lm_weight=.5,.9", "trainer.max_steps=2"]
    sweep(monkeypatch, fresh, *grid)
    names = {path.name for path in (fresh.experiment / "targets").iterdir()}
    assert names == {f"{source}_lm_weight_{weight}" for source in "ab" for weight in (0.5, 0.9)}
    before = {path: path.stat().st_mtime_ns for path in fresh.experiment.glob("targets/*/model.safetensors")}
    sweep(monkeypatch, fresh, *grid)
    assert before == {path: path.stat().st_mtime_ns for path in before}, "the same sweep again trains nothing"


def test_optuna_minimises_validation_bits_per_byte(fresh: Mini, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep(
        monkeypatch,
        fresh,
        "sweep=optuna",
        "hydra.sweeper.n_trials=3",
        "hydra.sweeper.params={loss.lm_weight:'choice(0.1,0.9)'}",
        "trainer.max_steps=2",
    )
    (results,) = fresh.root.glob("multirun/*/*/optimization_results.yaml")
    found: dict[str, Any] = yaml.safe_load(results.read_text())
    assert found["best_value"] == pytest.approx(min(metric(fresh, f"search_{i}") for i in range(3)))
    assert found["best_params"]["loss.lm_weight"] in (0.1, 0.9)


def test_joblib_names_the_failed_job_and_finishes_the_others(fresh: Mini) -> None:
    command = [
        sys.executable,
        "train.py",
        "-m",
        *fresh.base,
        "sweep=joblib",
        "trainer.max_steps=2",
    ]
    done = subprocess.run(
        [*command, "source=a", "loss.lm_weight=0.5,7"],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 1
    assert "1 job(s) failed" in done.stderr
    assert "loss.lm_weight=7" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert (fresh.experiment / "targets/a_lm_weight_0.5/model.safetensors").exists(), "named by what the jobs differ in"


def test_a_merge_search_ends_with_a_table_and_the_best_model(fresh: Mini, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "ab":
        fresh.run("train", f"source={name}", "trainer.max_steps=2", "loss.lm_weight=0.5")
    targets = ",".join(str(fresh.experiment / "targets" / name) for name in "ab")
    options = [
        f"targets=[{targets}]",
        "search.trials=6",
        "search.methods=[varm,ties,linear]",
        "validation.path=null",
        "data.validation_fraction=0.3",
    ]
    best = search(monkeypatch, fresh, *options)
    made = trials(fresh)
    assert len({t["fingerprint"] for t in made}) == len(made) >= 2
    merged = fresh.experiment / "merged/search"
    served = transformers.pipeline("text-generation", model=str(merged))(
        [{"role": "user", "content": "Sort b a."}], max_new_tokens=2
    )
    assert served[0]["generated_text"][-1]["role"] == "assistant"
    assert (
        json.loads((merged / "fusechat.json").read_text())["fingerprint"]
        == min(made, key=lambda t: t[COLUMN])["fingerprint"]
    )
    assert (fresh.experiment / "merge_search/results.md").read_text().count("\n") == len(made) + 2
    assert not (fresh.experiment / "merge_search/candidate").exists()
    assert (
        len(held := held_out_chats(fresh.cfg("merge_search", "validation.path=null", "data.validation_fraction=0.3")))
        > 5
    )
    assert scored_one_by_one(merged, held) == pytest.approx(best)
    file = fresh.experiment / "merge_search/trials.jsonl"
    file.write_text(file.read_text().splitlines()[0] + '\n{"cut')
    assert search(monkeypatch, fresh, *options) == best
    assert trials(fresh) == made, "a search that was killed takes the same way"


def scored_one_by_one(path: Path, held: list[Any]) -> float:
    from math import log

    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fusechat.chats.render import ChatRenderer
    from fusechat.evaluate.perplexity import score

    renderer = ChatRenderer(AutoTokenizer.from_pretrained(path), max_length=256)
    found = [score(AutoModelForCausalLM.from_pretrained(path), renderer, [chat], 1)[0] for chat in held]
    return sum(f["nats"] for f in found) / log(2) / sum(f["bytes"] for f in found)


def test_a_search_without_held_out_chats_is_refused(fresh: Mini) -> None:
    from fusechat.app.errors import UserError

    with pytest.raises(UserError, match=r"data\.validation_fraction=0\.0 holds out no chat of .*; a search needs some"):
        fresh.run("merge_search", "validation.path=null", "data.validation_fraction=0.0")
    with pytest.raises(UserError, match=r"search\.methods='best' is unknown; use one of: varm, sce, ties"):
        fresh.run("merge_search", "search.methods=[best]")


def test_a_sweep_without_jobs_is_an_error(
    fresh: Mini, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        sweep(monkeypatch, fresh, "seed=range(0,0)")
    assert "the sweep has no jobs: one of its choices is empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stage", "asked"),
    [
        ("train", ["nodes=2", "ntasks-per-node=8", "gpus-per-node=8"]),
        ("extract", ["nodes=1", "ntasks-per-node=1", "gpus-per-node=4"]),
        ("evaluate", ["nodes=1", "ntasks-per-node=1", "gpus-per-node=1"]),
        ("merge", ["nodes=1", "ntasks-per-node=1"]),
    ],
)
def test_a_slurm_job_has_as_many_tasks_as_its_stage_has_ranks(stage: str, asked: list[str]) -> None:
    """The script that submitit would send."""
    GlobalHydra.instance().clear()
    numbers = ["trainer.devices=8", "trainer.num_nodes=2", "extract.trainer.devices=4"]
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose(stage, ["sweep=slurm", *numbers], return_hydra_config=True)
    queue = {key: cfg.hydra.launcher[key] for key in ("nodes", "tasks_per_node", "gpus_per_node", "cpus_per_task")}
    queue["ntasks_per_node"] = queue.pop("tasks_per_node")
    lines = _make_sbatch_string("true", folder="x", **queue).splitlines()
    shown = [line.removeprefix("#SBATCH --") for line in lines if "node" in line and line.startswith("#SBATCH")]
    assert sorted(shown) == sorted(asked)


def test_a_slurm_job_needs_its_number_of_devices(
    fresh: Mini, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        sweep(monkeypatch, fresh, "sweep=slurm", "trainer=fsdp", "source=a,b")
    assert capsys.readouterr().err == (
        "error: a cluster's job asks for a number of devices, and auto is none: give e.g. trainer.devices=8 for a "
        "training, extract.trainer.devices=8 for an extraction\n"
    )


def test_the_slurm_sweep_submits_each_job(fresh: Mini) -> None:
    """Through submitit's local executor, which takes the same settings as a cluster."""
    pivot = fresh.experiment / "world/models/pivot"
    for name in ("t1", "t2"):
        shutil.copytree(pivot, fresh.root / name)
    slurm = [
        "sweep=slurm",
        "hydra/launcher=submitit_local",
        "hydra.launcher.gpus_per_node=0",
    ]
    jobs = [f"targets=[{fresh.root}/t1,{fresh.root}/t2]", "merge=task_arithmetic", "merge.scale=0.5,1.0"]
    done = subprocess.run(
        [sys.executable, "merge.py", "-m", *fresh.base, *slurm, *jobs],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert {path.parent.name for path in fresh.experiment.glob("merged/*/model.safetensors")} == {
        "task_arithmetic_scale_0.5",
        "task_arithmetic_scale_1.0",
    }
    assert len([*fresh.root.glob("multirun/*/*/.submitit/*/*_submitted.pkl")]) == 2
