"""What wandb keeps: the offline run files read back, record by record."""

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fusechat.app.errors import UserError
from tests.conftest import Mini

BLOCK = 32768  # LevelDB's log format: blocks of records with crc (4 bytes), length (2) and type (1: whole, 2, 3, 4: first, middle, last)


def records(file: Path) -> Iterator[Any]:
    """The protobuf records of an offline run."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = file.read_bytes(), 7, b""
    while at + 7 <= len(data):  # what is not flushed yet is left out
        if BLOCK - at % BLOCK < 7:
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        if at + 7 + length > len(data):
            return
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def key_of(item: Any) -> str:
    return item.key or "/".join(item.nested_key)


def files(world: Mini) -> set[Path]:
    return set(world.experiment.rglob("offline-run-*/*.wandb"))


def ended(file: Path, seconds: float = 120) -> list[Any]:
    """The records of a run once its last one, the exit, is in the file: another process writes it."""
    last = time.monotonic() + seconds
    while True:
        found = [*records(file)]
        if any(record.WhichOneof("record_type") == "exit" for record in found):
            return found
        assert time.monotonic() < last, f"{file} has no exit record"
        time.sleep(0.1)


def followed(world: Mini, name: str, *overrides: str) -> "Run":
    """Runs an entry; what the one run that it has logged says."""
    before = files(world)
    world.run(name, *overrides, "logger=wandb_offline")
    (made,) = files(world) - before
    return Run(made)


class Run:
    """What the file of an ended run says."""

    def __init__(self, file: Path) -> None:
        found = ended(file)
        self.about = next(r.run for r in found if r.WhichOneof("record_type") == "run")
        self.config = {
            key_of(i): json.loads(i.value_json) for r in found for i in (*r.run.config.update, *r.config.update)
        }
        self.history = {key_of(i): json.loads(i.value_json) for r in found for i in r.history.item}
        self.columns = {key: value for key, value in self.config.items() if not key.startswith("_")}
        self.media = {key.removesuffix("/_type") for key in self.history if key.endswith("/_type")}
        self.metrics = {r.metric.name: r.metric for r in found if r.WhichOneof("record_type") == "metric"}
        requests = [
            r.request.log_artifact.artifact for r in found if r.request.WhichOneof("request_type") == "log_artifact"
        ]
        self.artifacts = {
            a.name: a
            for a in [*requests, *(r.artifact for r in found if r.WhichOneof("record_type") == "artifact")]
            if a.name
        }


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
    assert not any(isinstance(value, dict) for key, value in run.columns.items()), "flat: columns to compare"
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
