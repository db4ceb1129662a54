"""Show what an experiment's folder holds: done, running and how far, failed and why, stopped and what is kept.

python -m fusechat.status runs/tiny/seed0
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fusechat.app import failures
from fusechat.app.errors import UserError
from fusechat.app.states import STYLES, State, short, state_of
from fusechat.app.streams import Parser
from fusechat.app.verbs import plainly

PARTS = ("world/models", "distributions", "aligned", "targets", "merged")  # folders of outputs, in the order of a run
RESULTS = ("*.json", "lm_eval/*.json", "mt_bench/model_answer/*.jsonl", "alpaca_eval/*.json", "judge/*.json")
BESIDE = re.compile(r"\.(.+)\.(?:lock|tmp|new|old)")  # hidden names that tell of an output
CHECKPOINTS = re.compile(r"(.+)-[0-9a-f]{16}")  # folders of a training that goes on
PART = re.compile(r"(.+)\.[0-9a-f]{16}\.part")


def outputs_of(folder: Path) -> list[Path]:
    """Every output of an experiment, finished or begun, in the order of a run."""
    found = [folder / part / name for part in PARTS for name in sorted(_names(folder / part))]
    targets = {path.name for path in found if path.parent.name == "targets"}
    begun = {made[1] for path in folder.glob("checkpoints/*") if (made := CHECKPOINTS.fullmatch(path.name))}
    found += [folder / "targets" / name for name in sorted(begun - targets)]
    results = {path for pattern in RESULTS for path in (folder / "evaluation").glob(pattern)}
    results |= {
        path.with_name(f"{made[1]}.json")
        for path in (folder / "evaluation").glob("*.part")
        if (made := PART.fullmatch(path.name))
    }
    found += sorted(results)
    found += [folder / "report"] if (folder / "report").is_dir() else []
    failed = [Path(output) for output in failures.last(folder / "logs")]
    known = {path.resolve() for path in found}
    return found + [path for path in failed if path not in known]


def experiments(root: Path) -> list[Path]:
    """The experiments below a folder: itself, or those in it, at any depth."""
    if is_experiment(root):
        return [root]
    inner = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    return [found for path in inner if path.name not in ("outputs", "multirun") for found in experiments(path)]


def is_experiment(folder: Path) -> bool:
    """Whether a folder holds outputs of stages, or tells of failed ones."""
    return (folder / "logs" / failures.NAME).is_file() or any(
        (folder / part).is_dir() for part in (*PARTS, "evaluation")
    )


def show(folder: Path) -> None:
    """Prints an experiment's outputs with their states, and how many there are of each."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    failed = failures.last(folder / "logs")
    states = {path: state_of(path, failed.get(str(path.resolve()))) for path in outputs_of(folder)}
    table = Table("output", "state", "", box=None, pad_edge=False)
    for path, state in states.items():
        table.add_row(short(path, folder), Text(state.kind, STYLES[state.kind]), Text(_told(state)))
    console = Console()
    console = console if console.is_terminal else Console(width=160)
    console.print(Text(str(folder), "italic"), soft_wrap=True)
    console.print(table)
    counts = Counter(state.kind for state in states.values())
    console.print(", ".join(f"{count} {kind}" for kind, count in counts.items()) or "nothing yet")


def main() -> None:
    """The command line."""
    parser = Parser(prog="python -m fusechat.status", description=(__doc__ or "").splitlines()[0])
    root = os.environ.get("FUSECHAT_ROOT", "runs")
    parser.add_argument("folder", nargs="*", default=[root], help=f"experiments, or folders of them (default: {root})")

    def run() -> None:
        for folder in [path for given in parser.parse_args().folder for path in _below(Path(given))]:
            show(folder)

    plainly(run)


def _below(root: Path) -> Sequence[Path]:
    """The experiments of a folder. Raises `UserError` where there are none."""
    if found := experiments(root) if root.is_dir() else []:
        return found
    what = "holds no experiment" if root.is_dir() else "does not exist"
    raise UserError(f"{root} {what}; give an experiment's folder, e.g. runs/tiny/seed0, or one above")


def _names(folder: Path) -> Iterator[str]:
    """What lies in a folder of outputs by name, also what was only begun."""
    for path in folder.glob("*"):
        hidden = BESIDE.fullmatch(path.name)
        if hidden or (path.is_dir() and not path.name.startswith(".")):
            yield hidden[1] if hidden else path.name


def _told(state: State) -> str:
    return "; ".join(filter(None, [state.told, _numbers(state.record or {}) if state.kind == "done" else ""]))


def _numbers(record: Mapping[str, Any]) -> str:
    """What people look at first."""
    if "shards" in record:
        rows, size = (sum(entry[key] for entry in record["shards"]) for key in ("rows", "bytes"))
        return f"{rows:,} chats, {size / 1e6:.1f} MB"
    metrics = record.get("metrics") or {}
    name = next((name for name in metrics if name.endswith("bits_per_byte")), next(iter(metrics), None))
    if name is None:
        return ""
    value = metrics[name]["all"]["value"] if isinstance(metrics[name], Mapping) else metrics[name]
    return f"{name} {value:.4f}"


if __name__ == "__main__":
    main()
