"""What wandb keeps: the offline run files read back, record by record."""

import json
from pathlib import Path

import pytest

from fusechat.app.errors import UserError
from fusechat.app.trees import flatten, nested
from tests.app.runs import followed
from tests.conftest import Mini


def test_a_training_run(fresh: Mini) -> None:
    options = ["source=a", "trainer.log_every_n_steps=1", "trainer.max_steps=3", "logger.tags=[mine]"]
    run = followed(fresh, "train", *options, "callbacks.samples=2", "+trainer.val_check_interval=2")
    assert "train/samples" in run.media
    (table, *_) = sorted(fresh.experiment.rglob("media/table/train/samples_*.table.json"))
    said = json.loads(table.read_text())
    assert said["columns"] == ["step", "prompt", "reference", "answer"] and len(said["data"]) in (2, 4)
    assert (run.about.run_group, run.about.job_type, run.about.project) == ("tiny-seed0", "train", "fusechat")
    assert run.about.display_name == "train-a-seed0"
    assert list(run.about.tags) == ["tiny", "train", "min_ce", "a", "mine"]
    assert (run.config["loss.lm_weight"], run.config["fusion.rule"], run.config["sources"]) == (0.5, "min_ce", ["a"])
    assert not any("." in key for key in run.nested), "wandb finds no key with a dot in its name"
    assert 15 <= len(run.columns) <= 27, sorted(run.columns)
    wanted = {
        "train/loss",
        "train/sft",
        "train/fusion",
        "train/tokens_per_second",
        "train/gradient_norm",
        "validation/bits_per_byte",
    }
    assert wanted | {"coverage/a", "wins/all/a", "wins/all/pivot", "wins/sort/a", "trainer/global_step"} <= set(
        run.history
    )
    assert run.metrics["validation/bits_per_byte"].summary.min
    assert run.metrics["validation/bits_per_byte"].step_metric == "trainer/global_step"
    header = next((fresh.experiment / "logs").rglob("train-a/*/metrics.csv")).read_text().splitlines()[0].split(",")
    assert {"coverage/a", "wins/all/a", "train/sft"} <= set(header), "the CSV beside it has the same"
    made = run.artifacts["target-a"]
    record = json.loads((fresh.experiment / "targets/a/fusechat.json").read_text())
    assert json.loads(made.metadata) == {
        "fingerprint": record["fingerprint"],
        "inputs": {"distributions-pivot": record["stores"]["pivot"], "aligned-a": record["stores"]["a"]},
    }
    assert all(entry.ref.startswith("file://") for entry in made.manifest.contents), "by reference, not uploaded"


def test_distributions_merges_and_answers(fresh: Mini) -> None:
    run = followed(fresh, "extract", "source=b", "extract.top_k=9", "overwrite=true")
    assert run.about.job_type == "extract"
    assert run.history["extract/bits_per_byte"] > 0
    assert run.columns["extract.top_k"] == 9 and run.columns["source.name"] == "b" and len(run.columns) < 25
    assert "distributions-b" in run.artifacts
    run = followed(fresh, "align", "source=b", "overwrite=true")
    inputs = set(json.loads(run.artifacts["aligned-b"].metadata)["inputs"])
    assert inputs == {"distributions-pivot", "distributions-b"}
    for name in "ab":
        fresh.run("train", f"source={name}", "trainer.max_steps=2")
    targets = ",".join(str(fresh.experiment / "targets" / name) for name in "ab")
    run = followed(fresh, "merge", f"targets=[{targets}]")
    assert list(run.about.tags) == ["tiny", "merge", "varm"]
    assert {"merge.method", "merge.granularity", "targets", "pivot.path", "seed"} <= set(run.columns) and len(
        run.columns
    ) < 25
    assert "merge.name" not in run.columns and "loss.lm_weight" not in run.columns, "nothing of other jobs"
    assert run.media == {"merge/weights", "merge/heatmap"}
    assert set(json.loads(run.artifacts["merged-varm_matrix"].metadata)["inputs"]) == {"target-a", "target-b"}
    fresh.run("evaluate", f"model={fresh.experiment}/world/models/pivot")
    run = followed(fresh, "evaluate", f"model={fresh.experiment}/targets/a")
    assert {"evaluation/bits_per_byte/all", "evaluation/accuracy/all", "evaluation/accuracy/sort"} <= set(run.history)
    assert run.columns["model"].endswith("targets/a") and len(run.columns) < 20
    assert list(run.about.tags) == ["tiny", "evaluate", "targets-a", "chats"]
    assert run.about.display_name == "evaluate-targets-a-seed0"
    file = next(fresh.experiment.rglob("answers_*.table.json"))
    table = json.loads(file.read_text())
    assert table["columns"] == ["skill", "prompt", "reference", "pivot's answer", "answer"]
    assert all(isinstance(cell, str) for row in table["data"] for cell in row)
    pictures = {"report/comparisons", "report/training", "report/wins", "report/merge_weights_varm_matrix"}
    assert pictures <= followed(fresh, "report").media


def test_nested_is_what_flatten_flattens() -> None:
    tree = {"a": {"b": 1, "c": {"d": [2]}}, "e": None}
    assert nested(flatten(tree)) == tree


def test_online_without_a_key_says_how_to_go_offline(fresh: Mini, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setattr(Path, "home", lambda: fresh.root)
    with pytest.raises(
        UserError,
        match=r"logger=wandb needs an account: run 'wandb login', set WANDB_API_KEY, or use logger=wandb_offline",
    ):
        fresh.run("train", "source=a", "logger=wandb")


def test_what_the_command_line_gave_is_a_column(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it is none of the usual ones: it is what a sweep compares."""
    from fusechat.app import columns

    values = {"stage": "train", "experiment_name": "x", "seed": 3, "trainer.precision": "32-true", "trainer.devices": 2}
    assert set(columns.columns(values)) == {"stage", "experiment_name", "seed"}
    monkeypatch.setattr(
        columns, "task_overrides", lambda: ["trainer.precision=32-true", "trainer.devices=2", "trainer=cpu"]
    )
    assert set(columns.columns(values)) == {"stage", "experiment_name", "seed", "trainer.precision"}
    assert columns.tags({**values, "fusion.rule": "sft", "sources": ["a"]}) == ["x", "train", "sft"], (
        "no source took part"
    )
