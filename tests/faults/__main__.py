"""Disturbs every stage and writes docs/reliability.md: python -m tests.faults (make faults).

Two processes share the cases; the worlds lie in memory where /dev/shm is.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from tests.faults import page
from tests.faults.cases import Case, Prepared, all_faults, damaged, full, limited, may_mount, prepare
from tests.faults.stages import World, warm_up
from tests.faults.trace import possible

FLIPS = 1000
SHARES = (0.02, 0.2, 0.5, 0.8)  # of what a stage writes, before there is no room


def work(folder: Path, part: int, parts: int, given: argparse.Namespace) -> None:
    """One process: its share of the boundaries and flips of every stage, a line a case."""
    flips, stages, every, way, shares = given.flips, given.stages, given.every, given.way, given.shares
    warm_up()
    gc.collect()
    gc.freeze()  # forked processes leave these objects' memory shared
    world, draw = World(folder / str(part)), random.Random(part)
    ready: list[Prepared] = []
    with (folder / f"{part}.jsonl").open("w") as file:

        def write(cases: Iterable[Case]) -> None:
            for case in cases:
                file.write(json.dumps(asdict(case)) + "\n")
                file.flush()

        for prepared in prepare(world, stages, way):
            ready.append(prepared)
            write(all_faults(world, prepared, every, given.all, part, parts))
            if part == parts - 1:
                write(limited(world, prepared, share) for share in shares)
                write(full(world, prepared, share) for share in shares if may_mount(folder / "mounted"))
        pairs = [(prepared, path) for prepared in ready for path in prepared.read]
        count = flips * (part + 1) // parts - flips * part // parts
        write(damaged(world, *pair, draw) for pair in draw.choices(pairs, k=count if pairs else 0))


def main() -> int:
    """The command line; 1 where a case did not come to the same end."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part", type=int, help="internal: the number of this process")
    parser.add_argument("--folder", type=Path, help="internal: where the processes meet")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--flips", type=int, default=FLIPS, help="bytes changed on the disk")
    parser.add_argument("--every", type=int, default=1, help="disturb one in so many boundaries")
    parser.add_argument("--all", action="store_true", help="every error at every boundary, not one in turn")
    parser.add_argument("--stages", nargs="*", default=[], help="some stages alone")
    parser.add_argument("--shares", nargs="*", type=float, default=SHARES, help="of what a stage writes: then no room")
    parser.add_argument("--way", choices=("strace", "hooks"), default="strace" if possible() else "hooks")
    parser.add_argument("--page", type=Path, help="where the page is written")
    given = parser.parse_args()
    if given.part is not None:
        work(given.folder, given.part, given.processes, given)
        return 0
    if given.way == "hooks":
        print("strace is not there or may not attach: boundaries are Python's audit events alone", file=sys.stderr)
    started, memory = time.perf_counter(), "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="faults-", dir=memory) as name:
        folder = Path(name)
        command = [sys.executable, "-m", "tests.faults", *sys.argv[1:], "--folder", name]
        children = [subprocess.Popen([*command, "--part", str(part)]) for part in range(given.processes)]
        failed = [child.wait() for child in children]
        lines = [line for part in sorted(folder.glob("*.jsonl")) for line in part.read_text().splitlines()]
    cases = [Case(**json.loads(line)) for line in lines]
    for case in page.wrong(cases):
        print(case)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    minutes = (used.ru_utime + used.ru_stime) / 60
    print(page.summary(cases, time.perf_counter() - started, minutes))
    if given.page:
        given.page.write_text(page.page(cases, given.way, given.every, minutes, given.all))
    return int(any(failed) or bool(page.wrong(cases)))


if __name__ == "__main__":
    sys.exit(main())
