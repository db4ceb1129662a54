"""What a command costs before any work: --help, and a run that finds its output there. CPU seconds of child processes.

python -m tests.benchmarks startup
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fusechat.app.verbs import VERBS, module_of
from tests.benchmarks.measure import table
from tests.conftest import MINI, ROOT

REPEATS = 5


def commands(root: Path) -> dict[str, list[str]]:
    """Verb -> the arguments of a command whose output is there after its first run, in the order that makes them."""
    here = root / "tiny/seed0"
    model = f"{here}/targets/a"
    result = f"output_file={here}/evaluation/a.json"
    found = {
        "tiny": [],
        "extract": ["source=a"],
        "align": ["source=a"],
        "train": ["source=a"],
        "merge": ["merge=linear", f"targets=[{model},{here}/targets/sft]"],
        "evaluate": [f"model={model}", result],
        "compare": [
            f"first={here}/evaluation/a.json",
            f"second={here}/evaluation/pivot.json",
            f"output_file={root}/c.csv",
        ],
        "report": [],
        "preview": [],
    }
    given = [*MINI, f"paths.root={root}", "callbacks.progress_bar=false"]
    return {verb: [*given, "experiment=tiny", *own] for verb, own in found.items()}


def make(root: Path, asked: dict[str, list[str]]) -> None:
    """Everything that the commands find there."""
    here, given = root / "tiny/seed0", asked["tiny"]
    first = [("tiny", []), ("extract", ["source=pivot"]), ("extract", ["source=a"]), ("align", ["source=a"])]
    first += [("train", ["fusion=sft", "run_name=sft"])]
    pivot = [f"model={here}/world/models/pivot", f"output_file={here}/evaluation/pivot.json"]
    for verb, own in first:
        start([module_of(verb), *given, *own])
    for verb, arguments in asked.items():
        if verb == "compare":
            start([module_of("evaluate"), *given, *pivot])
        start([module_of(verb), *arguments])


def start(arguments: Sequence[str]) -> None:
    """``python -m`` with these arguments. Raises `subprocess.CalledProcessError` with what it said."""
    command = [sys.executable, "-m", *arguments]
    try:
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        print(error.stdout, error.stderr, sep="\n", file=sys.stderr)
        raise


def seconds(command: Sequence[str]) -> float:
    """CPU seconds, user and system, of a child process and its children: the median of `REPEATS`."""
    taken = []
    for _ in range(REPEATS):
        before = _children()
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True)
        taken.append(_children() - before)
    return statistics.median(taken)


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Prints the table."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch = seconds(["-c", "import torch"])
    rows: list[list[object]] = []
    with tempfile.TemporaryDirectory(prefix="fusechat-startup-") as folder:
        asked = commands(Path(folder))
        make(Path(folder), asked)
        for verb in VERBS:
            there = seconds(["-m", module_of(verb), *asked[verb]]) if verb in asked else None
            told = ["-", "-"] if there is None else [there, there - torch]
            rows.append([verb, seconds(["-m", module_of(verb), "--help"]), *told])
    print(f"import torch alone: {torch:.2f} CPU s; medians of {REPEATS}")
    table("CPU seconds before any work", ["verb", "--help", "nothing left to do", "less import torch"], rows)


if __name__ == "__main__":
    main()
