"""What wandb keeps: the offline run files read back, record by record."""

import json
import struct
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
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def key_of(item: Any) -> str:
    return item.key or "/".join(item.nested_key)


class Run:
    """What a run's file says."""

    def __init__(self, world: Mini) -> None:
        file = next(iter(sorted(world.experiment.rglob("offline-run-*/*.wandb"), key=lambda f: f.stat().st_mtime)[-1:]))
        found = [*records(file)]
        self.about = next(r.run for r in found if r.WhichOneof("record_type") == "run")
        self.config = {
            key_of(i): json.loads(i.value_json) for r in found for i in (*r.run.config.update, *r.config.update)
        }
        self.history = {key_of(i): json.loads(i.value_json) for r in found for i in r.history.item}
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
    fresh.run(
        "train",
        "source=a",
        "logger=wandb_offline",
        "trainer.log_every_n_steps=1",
        "trainer.max_steps=3",
        "logger.tags=[mine]",
    )
    run = Run(fresh)
    assert (run.about.run_group, run.about.job_type, run.about.project) == ("tiny", "train", "fusechat")
    assert list(run.about.tags) == ["tiny", "train", "a", "mine"]
    assert (run.config["loss.lm_weight"], run.config["fusion.rule"], run.config["source.name"]) == (0.5, "min_ce", "a")
    assert not any(isinstance(value, dict) for key, value in run.config.items() if not key.startswith("_")), (
        "flat: columns to compare"
    )
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
    fresh.run("extract", "source=b", "extract.top_k=9", "overwrite=true", "logger=wandb_offline")
    run = Run(fresh)
    assert run.about.job_type == "extract"
    assert run.history["extract/bits_per_byte"] > 0
    assert "distributions-b" in run.artifacts
    fresh.run("align", "source=b", "overwrite=true", "logger=wandb_offline")
    assert set(json.loads(Run(fresh).artifacts["aligned-b"].metadata)["inputs"]) == {
        "distributions-pivot",
        "distributions-b",
    }
    for name in "ab":
        fresh.run("train", f"source={name}", "trainer.max_steps=2")
    targets = ",".join(str(fresh.experiment / "targets" / name) for name in "ab")
    fresh.run("merge", f"targets=[{targets}]", "logger=wandb_offline")
    run = Run(fresh)
    assert list(run.about.tags) == ["tiny", "merge", "varm"]
    assert run.media == {"merge/weights", "merge/heatmap"}
    assert set(json.loads(run.artifacts["merged-varm_matrix"].metadata)["inputs"]) == {"target-a", "target-b"}
    fresh.run("evaluate", f"model={fresh.experiment}/world/models/pivot")
    fresh.run("evaluate", f"model={fresh.experiment}/targets/a", "logger=wandb_offline")
    run = Run(fresh)
    assert {"evaluation/bits_per_byte/all", "evaluation/accuracy/all", "evaluation/accuracy/sort"} <= set(run.history)
    file = next(fresh.experiment.rglob("answers_*.table.json"))
    table = json.loads(file.read_text())
    assert table["columns"] == ["skill", "prompt", "reference", "pivot's answer", "answer"]
    assert all(isinstance(cell, str) for row in table["data"] for cell in row)
    fresh.run("report", "logger=wandb_offline")
    assert {"report/results", "report/training", "report/wins", "report/merge_weights_varm_matrix"} <= Run(fresh).media


def test_online_without_a_key_says_how_to_go_offline(fresh: Mini, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setattr(Path, "home", lambda: fresh.root)
    with pytest.raises(
        UserError,
        match=r"logger=wandb needs an account: run 'wandb login', set WANDB_API_KEY, or use logger=wandb_offline",
    ):
        fresh.run("train", "source=a", "logger=wandb")
