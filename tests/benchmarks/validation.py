"""Which validation set ranks the demo's targets as its test does: Spearman's ρ of bits per byte over the eight targets.

python -m tests.benchmarks.validation runs/tiny/seed0        a finished demo; two to three minutes on one core
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

from fusechat.evaluate import evaluate
from fusechat.tiny.chats import World, generate
from tests.benchmarks.measure import table


def chat_sets(experiment: Path, seed: int) -> dict[str, list[dict[str, Any]]]:
    """Chats as noisy as the fusion chats, which no target was trained on; and what validation.path names."""
    world, own = World(seed), (experiment / "world/chats/validation.jsonl").read_text().splitlines()
    noisy = {f"120 like the fusion chats, draw {n}": generate(world, 120, f"noisy {n}", wrong=0.2) for n in range(3)}
    noisy["400 like the fusion chats"] = generate(world, 400, "noisy 3", wrong=0.2)
    clean = {"400 right answers, any question": generate(world, 400, "clean 1")}
    return noisy | clean | {"400 right answers, questions of no fusion chat": [json.loads(line) for line in own]}


def bits(model: Path, chats: Path, output: Path) -> float:
    """Bits per byte of a model on a file of chats."""
    found = evaluate(model, chats, output, generate=False)
    return float(found["metrics"]["bits_per_byte"]["all"]["value"])


def main() -> None:
    """Prints the table."""
    experiment = Path(sys.argv[1])
    targets = sorted(path for path in (experiment / "targets").iterdir() if (path / "fusechat.json").exists())
    seed = int(re.findall(r"\d+", experiment.name)[-1])
    with tempfile.TemporaryDirectory() as folder:
        rows, place = [], Path(folder)
        test = [bits(t, experiment / "world/chats/test.jsonl", place / f"test-{t.name}.json") for t in targets]
        for number, (name, chats) in enumerate(chat_sets(experiment, seed).items()):
            file = place / f"{number}.jsonl"
            file.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
            found = spearmanr([bits(t, file, place / f"{number}-{t.name}.json") for t in targets], test)
            rows.append([name, f"{found.statistic:.2f}", f"{found.pvalue:.3f}"])
    table(f"rank correlation with the test's bits per byte, {len(targets)} targets", ["validation set", "ρ", "p"], rows)


if __name__ == "__main__":
    main()
