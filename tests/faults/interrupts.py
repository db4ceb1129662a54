"""Ctrl-C in the middle of every stage: python -m tests.faults.interrupts FOLDER.

Prints a line a stage: exit code, what it said, and what the same command did not make as an undisturbed one does.
"""

from __future__ import annotations

import gc
import json
import shutil
import sys
from pathlib import Path

from tests.faults import hooks
from tests.faults.cases import Prepared, aside, repeated
from tests.faults.stages import STAGES, World, warm_up


def main(folder: Path) -> None:
    """Each stage once undisturbed, once interrupted, and once to go on."""
    warm_up()
    gc.collect()
    gc.freeze()
    world = World(folder)
    for stage in STAGES:
        if not stage.disturbed:
            assert world.run(stage) == 0, world.said()
            continue
        world.keep("before")
        found = [b for b in hooks.boundaries(world, stage, folder / "trace")[0] if not aside(b.path)]
        world.learn()
        prepared = Prepared(stage, found, [], world.files(), 0, "hooks")
        world.restore("before")
        code, met = hooks.disturbed(world, stage, folder / "trace", found[len(found) // 2], "SIGINT")
        said, differing = world.said().splitlines(), repeated(world, prepared)[1]
        print(json.dumps([stage.name, code if met else "not met", said, differing]), flush=True)
        shutil.rmtree(world.copies / "before")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
