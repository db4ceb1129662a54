"""What wandb keeps: the offline run files read back, record by record."""

import json
import re
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fusechat.app.errors import UserError
from fusechat.app.tracking import flatten, nested
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
        self.nested = {
            key_of(i): json.loads(i.value_json) for r in found for i in (*r.run.config.update, *r.config.update)
        }
        self.config = flatten(self.nested)
        updates = [i for r in found for i in r.summary.update]
        self.summary = flatten({key_of(i): json.loads(i.value_json) for i in updates})
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


def keys_of_view(tree: Any, at: str = "") -> Iterator[tuple[str, str]]:
    """Where a view's spec names something that runs log, and what."""
    if isinstance(tree, dict):
        if {"section", "name"} == set(tree):
            yield at, f"{tree['section']}:{tree['name']}"
        for key, value in tree.items():
            yield from keys_of_view(value, key)
    elif isinstance(tree, list):
        for value in tree:
            yield from keys_of_view(value, at)
    elif at in ("accessor", "metrics", "xAxis", "metricRegex") or (at == "val" and "/" in str(tree)):
        yield at, str(tree)


def is_logged(name: str, run: Run) -> bool:
    """Whether a run has what a view names, in whichever of wandb's spellings."""
    section, _, key = name.rpartition(":")
    if section == "config":
        return key.replace(".value.", ".", 1) in run.columns
    if section == "summary" or key.startswith("summary_metrics."):
        return key.removeprefix("summary_metrics.") in run.summary
    return section == "run" or any(re.fullmatch(key, logged) for logged in ("_step", *run.history, *run.media))


def test_the_views_name_what_runs_log(fresh: Mini) -> None:
    """The specs, not sent, beside offline runs of the two kinds of job that they show."""
    from fusechat.app.workspace import views

    train = followed(fresh, "train", "source=a", "trainer.max_steps=2", "trainer.log_every_n_steps=1")
    evaluate = followed(fresh, "evaluate", f"model={fresh.experiment}/targets/a")
    made = views("me", "fusechat", "tiny")
    assert [view.name for view in made] == ["tiny: settings", "tiny: curves by source", "tiny: answers"]
    named = set()
    for view, run in zip(made, (train, train, evaluate), strict=True):
        spec = view._to_model().spec.model_dump(by_alias=True, exclude_none=True)["section"]
        (runs,) = spec["runSets"]
        asked = {item["key"]["name"]: item["value"] for item in runs["filters"]["filters"]}
        assert asked == {"jobType": run.about.job_type, "tags": ["tiny"]} and "tiny" in run.about.tags
        keys = [name for _, name in keys_of_view(spec)]
        assert len(keys) > 5 and not [name for name in keys if not is_logged(name, run)]
        named |= set(keys)
    assert {"config:loss.value.lm_weight", "config:fusion.value.rule", "summary:validation/bits_per_byte.min"} <= named
    assert {"train/sft", "train/fusion", "wins/all/.*", "config:source.value.name", "evaluation/answers"} <= named
    assert not is_logged("config:loss.value.lm_weigth", train) and not is_logged("train/stf", train)
    everywhere = views("me", "fusechat")[0]
    assert everywhere.name == "fusechat: settings"
    assert everywhere.runset_settings.filters == """Metric("JobType") == 'train'"""


def test_views_are_saved_where_wandb_is_asked_for(monkeypatch: pytest.MonkeyPatch, fresh: Mini) -> None:
    import wandb
    import wandb_workspaces.workspaces as ws

    from fusechat.app import workspace

    with pytest.raises(UserError) as error:
        fresh.run("report", "report.workspace=true")
    told = "report.workspace=true saves views in wandb's project; add logger=wandb, after 'wandb login'"
    assert str(error.value) == told
    monkeypatch.setattr(ws.Workspace, "save", lambda self: setattr(self, "_internal_name", "nw-1-v") or self)
    monkeypatch.setattr(ws.Workspace, "url", property(lambda self: f"{self.entity}/{self.project}/{self.name}"))
    assert [*workspace.save_views("me", "p", None)][2] == "me/p/p: answers"

    def refuse(self: Any) -> None:
        raise wandb.errors.CommError("no such\nentity")

    monkeypatch.setattr(ws.Workspace, "save", refuse)
    with pytest.raises(UserError) as error:
        [*workspace.save_views("me", "p", None)]
    assert str(error.value) == "wandb took no view (no such entity); log in with 'wandb login', check logger.entity"


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
