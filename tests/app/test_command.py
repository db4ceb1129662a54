"""What a command says and how it ends: one line for a mistake, exit codes, signals, and the causes of a sweep's jobs."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fusechat.app.locks import held
from tests.conftest import ROOT

COMPARE = [sys.executable, "-m", "fusechat.compare"]


def start(folder: Path, *overrides: str, **environment: str) -> "subprocess.Popen[str]":
    """``python -m fusechat.compare``, which is quick to start."""
    command = [*COMPARE, *overrides, f"paths.root={folder}/runs"]
    environment = {**os.environ, "FUSECHAT_OUTPUTS": "", "PYTHONPATH": str(ROOT), **environment}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=folder, env=environment, text=True, **pipes)


def run(folder: Path, *overrides: str) -> "tuple[int, list[str]]":
    """Exit code and lines of both streams."""
    with start(folder, *overrides) as process:
        out, err = process.communicate(timeout=60)
    return process.returncode, [*out.splitlines(), *err.splitlines()]


@pytest.mark.parametrize(
    ("overrides", "code", "said"),
    [
        (["first='abc"], 2, "error: LexerNoViableAltException: first='abc"),
        (["first=[a,b"], 2, "error: "),
        (["first=~/x"], 2, f"error: first=~/x: write the folder out, first={Path.home()}/x; ~ is not taken here"),
        (["frist=a"], 2, "error: the config has no key 'frist'; did you mean first"),
        (["experiment=tinny"], 2, "error: In 'compare': Could not find 'experiment/tinny'"),
        (["preset=null"], 2, "error: preset=null: expected one of flash_attention_2, lora, qlora; ~preset leaves"),
        (["first=x", "merge=3"], 2, "error: merge=3: expected one of breadcrumbs, compress, "),
        (
            ["merge=linear,ties", "merge.density=1", "-m"],
            2,
            "no key 'merge.density'; merge=linear knows: device, dry_run",
        ),
        (["first=${nope}"], 2, "Interpolation key 'nope' not found"),
        (
            ["first=/nope", "second=/nope"],
            1,
            "first=/nope is no result file; give one that python -m fusechat.evaluate has written",
        ),
    ],
)
def test_a_mistake_is_one_line(overrides: list[str], code: int, said: str, tmp_path: Path) -> None:
    ended, lines = run(tmp_path, *overrides)
    assert (ended, len(lines)) == (code, 1), lines
    assert said in lines[0]


def test_a_runs_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    code, lines = run(tmp_path, "first=a", "second=b")
    assert (code, len(lines)) == (1, 1), lines
    assert lines[0].startswith(f"error: {tmp_path}/runs/")
    assert lines[0].endswith(
        "cannot be made (Not a directory), where a job's config is kept; give another place with paths.root=DIR"
    )


def test_an_experiment_of_ones_own_is_near_too(tmp_path: Path) -> None:
    """Names of the folder that was given, and of one that lies here and was not."""
    (tmp_path / "my_conf/experiment").mkdir(parents=True)
    (tmp_path / "my_conf/experiment/mine.yaml").write_text("# @package _global_\nmodels: {a: x/a, b: x/b}\n")
    for overrides, said in (
        (["--config-dir", "my_conf", "experiment=mein"], "; did you mean mine"),
        (["experiment=mine"], "; it is in my_conf/experiment/mine.yaml: add --config-dir my_conf"),
    ):
        code, lines = run(tmp_path, *overrides)
        assert (code, len(lines)) == (2, 1) and said in lines[0]
    mine = ["--config-dir", "my_conf", "experiment=mine", "first='${models.nope}'"]
    code, lines = run(tmp_path, *mine)
    said = "first cannot be resolved: Interpolation key 'models.nope' not found; models has a, b"
    assert (code, len(lines)) == (2, 1) and lines[0].endswith(said)


def test_a_sweep_repeats_the_causes_at_its_end(tmp_path: Path) -> None:
    """Wherever -m stands: by itself, argparse takes it only before the first override."""
    code, lines = run(tmp_path, "first=/nope,/nada", "-m", "second=/nope", "output_file='${paths.root}/x'")
    assert code == 1
    assert lines[-3:] == [
        "2 job(s) failed:",
        *(
            f"  first={name} second=/nope output_file='${{paths.root}}/x' paths.root={tmp_path}/runs: first={name} is no result file; "
            "give one that python -m fusechat.evaluate has written"
            for name in ("/nope", "/nada")
        ),
    ]
    assert not any("Traceback" in line for line in lines)


@pytest.fixture
def results(tmp_path: Path) -> list[str]:
    """Two results to compare, and where the comparison goes."""
    content = '{"stage": "evaluate", "samples": [], "metrics": {}}'
    for name in ("a", "b"):
        (tmp_path / f"{name}.json").write_text(content)
    return [f"first={tmp_path}/a.json", f"second={tmp_path}/b.json", f"output_file={tmp_path}/c.csv"]


def test_where_another_process_holds_the_output(tmp_path: Path, results: list[str]) -> None:
    with held(tmp_path / "c.csv"):
        code, lines = run(tmp_path, *results)
        assert (code, len(lines)) == (3, 1), lines
        assert f"c.csv is being written by another process (host {os.uname().nodename}, pid {os.getpid()}," in lines[0]
        code, lines = run(tmp_path, "-m", *results)
        assert code == 3
        assert "pid" in lines[-1]


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGTERM, 143, "ended by SIGTERM"), (signal.SIGINT, 130, "interrupted")]
)
def test_signals(number: signal.Signals, code: int, word: str, tmp_path: Path, results: list[str]) -> None:
    with held(tmp_path / "c.csv"), start(tmp_path, *results, "wait=true") as process:
        assert process.stderr is not None
        assert "waiting: " in process.stderr.readline()
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (code, f"{word}; the same command goes on from what is whole\n")
    assert not list(tmp_path.glob(".*"))


def test_a_signal_that_a_library_makes_another_error_of(tmp_path: Path, results: list[str]) -> None:
    lines = [
        "try:",
        "    os.kill(os.getpid(), signal.SIGINT)",
        "except BaseException:",
        "    raise ValueError from None",
    ]
    (tmp_path / "broken_into.py").write_text("\n".join(["import os, signal", *lines]))
    with start(tmp_path, *results, "imports=[broken_into]", PYTHONPATH=f"{ROOT}{os.pathsep}{tmp_path}") as process:
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "interrupted; the same command goes on from what is whole\n")
