"""The whole pipeline on the miniature world: reuse, and the same result after a kill at any stage."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

from fusechat.pipeline.steps import is_sweep, parse
from tests import warm
from tests.conftest import ROOT
from tests.pipeline.runs import SHORT, start

TARGETS = "${paths.experiment}/targets"
ONE_OF_EACH = [  # every kind of stage, few processes: each takes seconds to start
    "tiny",
    "extract source=pivot,a",
    "align source=a",
    "train source=a",
    "train fusion=sft run_name=sft_1",
    f"merge merge.granularity=layer 'targets=[{TARGETS}/a,{TARGETS}/sft_1]'",
    f"evaluate model='{TARGETS}/a','{TARGETS}/sft_1'",
    "report",
]


def steps(*lines: str) -> str:
    """The override that gives a pipeline these steps."""
    quoted = [line.replace("\\", "\\\\").replace('"', '\\"').replace("'", "\\'") for line in lines]
    return "pipeline.steps=[" + ",".join(f"'{line}'" for line in quoted) + "]"


def warm_start(root: Path, *overrides: str) -> ForkServerProcess:
    """As ``start``, forked; what it says is in ``root``.log."""
    return warm.start("fusechat.pipeline", ["experiment=tiny", *SHORT, f"paths.root={root}", *overrides], log_of(root))


def finished(root: Path, *overrides: str) -> str:
    """What a whole run says, forked."""
    process = warm_start(root, *overrides)
    process.join(900)
    output = log_of(root).read_text()
    assert process.exitcode == 0, output[-3000:]
    return output


def log_of(root: Path) -> Path:
    return root.with_name(f"{root.name}.log")


def results(root: Path) -> dict[str, str]:
    """Hash of every model and distribution, and every metric: what must not depend on interruptions."""
    experiment = root / "tiny/seed0"
    found = {
        str(f.relative_to(root)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in sorted(experiment.rglob("*.safetensors"))
    }
    found |= {
        str(f.relative_to(root)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in sorted(experiment.rglob("*.arrow"))
    }
    return found | {
        f.name: json.dumps(json.loads(f.read_text())["metrics"]) for f in sorted(experiment.glob("evaluation/*.json"))
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("undisturbed")
    finished(root)
    return root


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind of stage once, undisturbed, each an interpreter of its own as people have it."""
    root = tmp_path_factory.mktemp("short")
    process = start(root, steps(*ONE_OF_EACH))
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output[-3000:]
    return root


def test_everything_is_there(undisturbed: Path) -> None:
    experiment = undisturbed / "tiny/seed0"
    report = {f.name for f in (experiment / "report").iterdir()}
    assert {
        "index.html",
        "results.csv",
        "results.md",
        "comparisons.csv",
        "comparisons.png",
        "skills.png",
        "wins.png",
        "alignment.png",
    } <= report
    page = (experiment / "report/index.html").read_text()
    assert "<svg" in page
    assert not re.search(r"""(src|href)=['"]?https?:""", page.replace("xlink:href", "")), "asks no other host"
    assert len(list((experiment / "evaluation").glob("*.json"))) == 18


def test_a_second_run_reuses_everything(short: Path) -> None:
    before = results(short)
    times = {f: f.stat().st_mtime_ns for f in (short / "tiny/seed0/targets").rglob("*.safetensors")}
    assert finished(short, steps(*ONE_OF_EACH)).count("skip:") >= 8
    assert results(short) == before
    assert times == {f: f.stat().st_mtime_ns for f in times}


def test_killed_again_and_again_it_ends_the_same(short: Path, tmp_path: Path) -> None:
    """kill -9 of the whole group as soon as each of these appears: in the world, in training, in the merge."""
    marks = ["world/models/a", "checkpoints/a-*/*.ckpt", "merged/.varm_layer*.tmp"]
    root = tmp_path / "runs"
    experiment = root / "tiny/seed0"
    for mark in marks:
        process = warm_start(root, steps(*ONE_OF_EACH))
        deadline = time.time() + 300
        while time.time() < deadline and process.is_alive() and not list(experiment.glob(mark)):
            time.sleep(0.005)
        assert process.is_alive() and process.pid, log_of(root).read_text()[-3000:]
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
    finished(root, steps(*ONE_OF_EACH))
    assert results(root) == results(short)
    assert not list(experiment.rglob(".*.tmp"))


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], cwd=ROOT, text=True, capture_output=True, timeout=120)


def test_errors_are_one_line_with_a_remedy(tmp_path: Path) -> None:
    done = run("train.py", "experiment=tiny", "source=a", f"paths.root={tmp_path}")
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    told = "world/models/pivot does not exist; expected a model's directory, a GGUF file or a Hub id (owner/name); make it with: "
    assert told + "python -m fusechat.tiny" in done.stderr


def test_traceback_when_asked_for(tmp_path: Path) -> None:
    command = [sys.executable, "train.py", "source=a", f"paths.root={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, env=os.environ | {"HYDRA_FULL_ERROR": "1"})
    assert "Traceback" in done.stderr


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["loss.lm_wieght=1"], "the config has no key 'loss.lm_wieght'; did you mean lm_weight"),
        (["experiment=tinny"], "did you mean tiny"),
        (
            ["merge=linear", "merge.granularity=layer"],
            "has no key 'merge.granularity'; merge=linear knows: device, dry_run, dtype, max_shard_size, name, normalize",
        ),
        (["+fusion=min"], "did you mean min_ce"),
    ],
)
def test_unknown_keys_and_groups_name_the_near_ones(overrides: list[str], message: str) -> None:
    done = run("train.py", *overrides)
    assert done.returncode == 2
    assert message in done.stderr


def test_failed_jobs_of_a_sweep_are_named_and_the_others_finish(short: Path, tmp_path: Path) -> None:
    root = shutil.copytree(short, tmp_path / "runs")
    targets = root / "tiny/seed0/targets"
    done = run(
        "train.py",
        "-m",
        "experiment=tiny",
        *SHORT,
        f"paths.root={root}",
        "source=a",
        "run_name=x,y",
        "loss.kind=ce,mse",
        "overwrite=true",
    )
    assert done.returncode == 1
    assert "2 job(s) failed" in done.stderr
    assert "run_name=x loss.kind=mse" in done.stderr
    assert (targets / "x").exists()
    assert (targets / "y").exists()


def test_a_steps_line_is_a_sweep_where_it_has_several_values() -> None:
    assert parse("train source=a,b seed=1") == ("train", ["source=a,b", "seed=1"])
    assert is_sweep(["source=a,b"])
    assert is_sweep(["model=${paths.root}/a,${paths.root}/b"])
    assert not is_sweep(["sources=[a,b]", "run_name=x"])
