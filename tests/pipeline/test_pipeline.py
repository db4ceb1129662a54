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

from fusechat.app.errors import UserError
from fusechat.pipeline.steps import is_sweep, parse
from tests import warm
from tests.conftest import MINI, ROOT, run_entry

SHORT = [*MINI, "logger=none", "callbacks.checkpoint_every_n_steps=2", "evaluation.max_new_tokens=4"]
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


def start(root: Path, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fusechat.pipeline", "experiment=tiny", *SHORT, f"paths.root={root}", *overrides]
    return subprocess.Popen(
        command, cwd=ROOT, start_new_session=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


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


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def child_of(process: subprocess.Popen[str]) -> int:
    """The step that a pipeline runs now, once it has begun its work."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not (found := children.read_text().split()):
        assert process.poll() is None
        time.sleep(0.01)
    return int(found[0])


@pytest.mark.parametrize(("stop", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 143)])
def test_a_step_does_not_outlive_its_pipeline(tmp_path: Path, stop: signal.Signals, code: int) -> None:
    process = start(tmp_path)
    child = child_of(process)
    while not list(tmp_path.glob("tiny/seed0/world/chats/*.jsonl")):
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, stop)
    process.communicate(timeout=60)
    assert process.returncode == code
    deadline = time.time() + 60
    while alive(child) and time.time() < deadline:
        time.sleep(0.05)
    assert not alive(child)


def test_ctrl_c_ends_the_step_and_the_pipeline(tmp_path: Path) -> None:
    process = start(tmp_path)
    child = child_of(process)
    while not list(tmp_path.glob("tiny/seed0/world/chats/*.jsonl")):
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert not alive(child)
    assert "Traceback" not in output


def test_a_failing_step_is_named_after_its_cause(tmp_path: Path) -> None:
    process = start(tmp_path, "pipeline.steps=['align source=a']")
    output, _ = process.communicate(timeout=120)
    lines = output.splitlines()
    assert process.returncode == 1
    assert "python -m fusechat.extract experiment=tiny source=pivot" in lines[-2] + lines[-3]
    shown = "step 1 of 1 failed (exit code 1): python -m fusechat.align experiment=tiny "
    assert shown in lines[-1]
    assert lines[-1].endswith(" source=a"), "nothing of Hydra's own"
    assert "Traceback" not in output


def test_unknown_steps_are_refused_before_any_work(tmp_path: Path) -> None:
    process = start(tmp_path, "pipeline.steps=[tiny,'evalute model=x']")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "pipeline.steps: 'evalute' is no stage; use one of: tiny, preview, extract," in output
    assert "did you mean evaluate?" in output
    assert not (tmp_path / "tiny").exists()


def test_a_steps_line_is_a_sweep_where_it_has_several_values() -> None:
    assert parse("train source=a,b seed=1") == ("train", ["source=a,b", "seed=1"])
    assert is_sweep(["source=a,b"])
    assert is_sweep(["model=${paths.root}/a,${paths.root}/b"])
    assert not is_sweep(["sources=[a,b]", "run_name=x"])


def test_a_pipeline_started_by_torchrun_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(
        UserError, match=r"this is one of WORLD_SIZE=8: start it without torchrun; trainer\.devices and"
    ):
        run_entry("pipeline", ["experiment=tiny"])
