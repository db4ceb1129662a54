"""What `make gpu` runs on a card runs here on the CPU with tiny shapes: only the device and the shapes differ."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tests.benchmarks import data, experiment, gpu, step, trainer
from tests.benchmarks.card import TINY
from tests.conftest import ROOT

LOSSES = ["SFT, transformers' loss", "SFT, lambda 1", step.FUSION]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_steps(precision: str) -> None:
    rows = step.steps(TINY, "cpu", precision)
    assert [row[4] for row in rows] == LOSSES
    assert all(row[5] > 0 for row in rows)


def test_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    gpu.measured(TINY, "cpu")
    printed = capsys.readouterr().out
    assert [line.removeprefix("### ") for line in printed.splitlines() if line.startswith("###")] == [*gpu.PARTS]
    for what in (*LOSSES, "SFT + fusion, ours", "extraction", "| ties | cpu |", "merge of two by varm"):
        assert what in printed
    moved = float(printed.split("relative change of a matrix ")[1].split()[0])
    assert 1e-6 < moved < 1e-2


def test_lora_where_memory_wants_it() -> None:
    rows = experiment.three_steps(TINY, "cpu", full=False)
    assert [row[3].startswith("LoRA") for row in rows] == [False, True, True, False, False]


def test_a_part_that_begins_too_late_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    gpu.measured(TINY, "cpu", limit=-1.0)
    assert capsys.readouterr().out.count("left out after") == len(gpu.PARTS)


def test_a_loss_that_does_not_fit_is_a_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError

    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    cleared: list[int] = []
    seconds, megabytes = gpu.cost(full, "cuda", lambda: cleared.append(1))
    assert seconds != seconds and megabytes != megabytes
    assert cleared


def test_without_a_gpu_make_gpu_says_so(tmp_path: Path) -> None:
    for tool in ("make", "sh"):
        (tmp_path / tool).symlink_to(shutil.which(tool) or tool)
    outer = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")  # of make test, which may have started this
    environment = {name: value for name, value in os.environ.items() if name not in outer} | {"PATH": str(tmp_path)}
    made = subprocess.run(["make", "gpu"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (made.returncode, made.stderr) == (0, "")
    assert made.stdout == "make gpu: nvidia-smi sees no GPU on this machine, nothing was run\n"


def test_sft_is_that_of_transformers_trainer(tmp_path: Path) -> None:
    """The same batches, weights, optimizer, schedule and clipping: the same loss after three steps."""
    (_, ours, *_), (_, theirs, *_) = trainer.compared((32, 2, 64, 4, 2, data.V), 3, tmp_path)
    assert ours == pytest.approx(theirs, abs=1e-5)
