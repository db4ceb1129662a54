"""Faults at every boundary of every stage, and flipped bytes in every file that a stage opens: what came of each."""

from __future__ import annotations

import os
import random
import re
import resource
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusechat.models.cards import CARD
from tests.faults import hooks, trace
from tests.faults.stages import STAGES, Stage, World, exit_code
from tests.faults.trace import FAULTS, Boundary

WAYS: dict[str, Any] = {"strace": trace, "hooks": hooks}
FOLDED = re.compile(r"\d{3,}(?=\.tmp)|(?<=-)\d+(?=\.tmp)")  # process ids in temporary names


@dataclass(frozen=True)
class Case:
    """A fault and what it led to. met: it struck the file meant; equal: afterwards the same command gave the same files
    and nothing else; told: an error was told without a traceback; state: what the fault left, by a hash.
    """

    stage: str
    fault: str
    call: str
    path: str
    met: bool
    equal: bool
    told: bool
    note: str = ""


@dataclass
class Prepared:
    """A stage with its boundaries, the files that it reads, and the files there are when it has ended undisturbed.

    grown: bytes that it adds; way: how boundaries are found and struck.
    """

    stage: Stage
    boundaries: Sequence[Boundary]
    read: Sequence[str]
    wanted: dict[str, str]
    grown: int
    way: str
    seen: dict[str, tuple[bool, str]] = field(default_factory=dict)  # state after a fault -> came it to the same?


def prepare(world: World, names: Sequence[str] = (), way: str = "strace") -> Iterator[Prepared]:
    """Runs the stages in order, each once undisturbed and once traced; gives those that are to be disturbed."""
    for stage in STAGES:
        world.keep(stage.name)
        if stage.disturbed and (not names or stage.name in names):
            code = world.run(stage)
            assert code == 0, f"{stage.name}: {world.said()[-3000:]}"
            world.learn()
            wanted = world.files()
            shutil.rmtree(world.copies / "after", ignore_errors=True)
            world.keep("after")
            grown = _size(world.copies / "after") - _size(world.copies / stage.name)
            world.restore(stage.name)
            found, read, others = WAYS[way].boundaries(world, stage, world.output.with_name("trace"))
            assert world.files() == wanted, f"{stage.name}: two undisturbed runs differ"
            assert not others, f"{stage.name}: other threads write {others[:3]}"
            mine = [b for b in found if not aside(b.path)]
            world.restore(stage.name)
            there = [
                path for path in read if not (aside(path) or Path(path).name == CARD) and _filled(world.root / path)
            ]
            yield Prepared(stage, mine, there, wanted, grown, way)
            world.restore(stage.name)
        code = world.run(stage)
        assert code == 0, f"{stage.name}: {world.said()[-3000:]}"


def _filled(file: Path) -> bool:
    return file.is_file() and file.stat().st_size > 0


def _size(folder: Path) -> int:
    return sum(-(-f.stat().st_size // 4096) * 4096 for f in folder.rglob("*") if f.is_file())


def aside(path: str) -> bool:
    """Caches and logs."""
    parts = Path(path).parts
    return not parts or parts[0] in ("cache", "hydra") or "logs" in parts


def struck(world: World, prepared: Prepared, boundary: Boundary, fault: str) -> Case:
    """A fault, then the same command again."""
    stage = prepared.stage
    world.restore(stage.name)
    code, met = WAYS[prepared.way].disturbed(world, stage, world.output.with_name("trace"), boundary, fault)
    said = world.said()
    told = fault == "SIGKILL" or code == 0 or (code == 1 and "Traceback" not in said)
    state = str(sorted((FOLDED.sub("N", path), content) for path, content in world.files().items()))
    if state not in prepared.seen:
        prepared.seen[state] = repeated(world, prepared)
    equal, note = prepared.seen[state]
    note = note or ("" if told else said.strip().splitlines()[-1][:200])
    return Case(stage.name, fault, boundary.call, boundary.path, met, equal, told, note)


def repeated(world: World, prepared: Prepared) -> tuple[bool, str]:
    """Runs the command again; whether the files are those of an undisturbed run, and what differs where not."""
    code = world.run(prepared.stage)
    if code != 0:
        return False, f"exit code {code}: {world.said().strip().splitlines()[-1][:200]}"
    found, wanted = world.files(), prepared.wanted
    differing = sorted(path for path in {*found, *wanted} if found.get(path) != wanted.get(path))
    return not differing, ", ".join(differing[:3])


def all_faults(
    world: World, prepared: Prepared, every: int, whole: bool, part: int = 0, parts: int = 1
) -> Iterator[Case]:
    """Faults at one in ``every`` boundaries, drawn at random; of these, one process's part. whole: every error at each."""
    chosen = sorted(random.Random(0).sample(range(len(prepared.boundaries)), -(-len(prepared.boundaries) // every)))
    for number in chosen[part::parts]:
        for fault in FAULTS if whole else in_turn(prepared.boundaries, number):
            yield struck(world, prepared, prepared.boundaries[number], fault)


def in_turn(boundaries: Sequence[Boundary], number: int) -> list[str]:
    """SIGKILL and one of the errors, in turn among the boundaries of a call; all of them where these are few."""
    kill, *errors = FAULTS
    alike = [index for index, boundary in enumerate(boundaries) if boundary.call == boundaries[number].call]
    return [kill, errors[alike.index(number) % len(errors)]] if len(alike) >= len(errors) else [*FAULTS]


def limited(world: World, prepared: Prepared, share: float) -> Case:
    """No file may grow beyond a share of the largest that the stage leaves (RLIMIT_FSIZE)."""
    made = [path for path in prepared.wanted if not (world.copies / prepared.stage.name / path).exists()]
    largest = max(((world.copies / "after" / path).stat().st_size for path in made), default=1)
    size = int(largest * share)
    world.restore(prepared.stage.name)
    with world.output.open("w") as file, subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=file) as said:
        assert said.stdin is not None
        pipe = said.stdin.fileno()

        def limit() -> None:  # what a stage prints is no file of its own
            os.dup2(pipe, 1), os.dup2(pipe, 2)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

        code = exit_code(os.waitpid(world.start(prepared.stage, limit), 0)[1])
    return _judged(world, prepared, "RLIMIT_FSIZE", f"{share:.0%} of the largest file", code)


def full(world: World, prepared: Prepared, share: float) -> Case:
    """The disk, a tmpfs of its own, is full after a share of what the stage adds; then there is room again."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1g", "tmpfs", world.root], check=True)
    try:
        world.restore(prepared.stage.name)
        used = _used(world.root)
        size = used + int(share * max(16 << 10, prepared.grown))
        subprocess.run(["mount", "-o", f"remount,size={size}", world.root], check=True)
        code = world.run(prepared.stage)
        subprocess.run(["mount", "-o", "remount,size=1g", world.root], check=True)
        return _judged(world, prepared, "full disk", f"{share:.0%} of what it adds", code)
    finally:
        subprocess.run(["umount", world.root], check=True)


def may_mount(folder: Path) -> bool:
    """Whether file systems may be mounted here."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True)
    return done.returncode == 0 and subprocess.run(["umount", folder]).returncode == 0


def _used(place: Path) -> int:
    status = os.statvfs(place)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


def _judged(world: World, prepared: Prepared, fault: str, path: str, code: int) -> Case:
    said = world.said()
    told = code == 0 or (code == 1 and "Traceback" not in said)
    equal, note = repeated(world, prepared)
    note = note or ("" if told else said.strip().splitlines()[-1][:200])
    return Case(prepared.stage.name, fault, "write", path, code != 0, equal, told, note)


def damaged(world: World, prepared: Prepared, path: str, draw: random.Random) -> Case:
    """One byte changed, of a file that the stage reads, its times as before; the command must not take it.

    A stage that makes such a file anew, so that all is as it should be, has found the damage too.
    """
    world.restore(prepared.stage.name)
    file = world.root / path
    before, data = file.stat(), bytearray(file.read_bytes())
    at = draw.randrange(len(data))
    data[at] ^= draw.randrange(1, 256)
    with file.open("r+b") as opened:
        opened.write(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    code, place = world.run(prepared.stage), str(file.relative_to(world.root))
    told = code == 0 or (code == 1 and "Traceback" not in world.said())
    found = code != 0 or (world.files() == prepared.wanted and file.read_bytes() != bytes(data))
    last = world.said().strip().splitlines()[-1:] or [""]
    return Case(prepared.stage.name, "damage", "read", place, True, found, told, f"byte {at}: {last[0][:200]}")
