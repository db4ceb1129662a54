"""docs/reliability.md from the cases."""

from __future__ import annotations

from collections.abc import Sequence

from tests.faults.cases import Case
from tests.faults.trace import FAULTS

EACH, IN_TURN = (
    "ENOSPC, EIO, EDQUOT",
    "ENOSPC, EIO and EDQUOT in turn, each where a stage makes less than three such calls",
)
TEXT = """# Reliability

Made by `make faults` ({faults} faults, {flips} changed bytes; {minutes:.0f} minutes of user + system CPU, shared by two
processes). Every stage runs on a very small world, once undisturbed under {way}; each of its calls that changes a file (open, write, fsync, rename, unlink, mkdir, …, of Python, torch,
safetensors and Arrow alike) is a boundary. Then it runs again and again, and at {each} the process is
killed (SIGKILL), and the call fails ({errors}). After each fault the same command is run again: it must end with the
same bytes in the same files, and no other file may be left.

Below: how many faults were struck, and of how many the repeated command came to the same files. {unmet} faults struck the same call
at another file than was meant.

{table}

Errors told in one line, without a traceback: {told}.

## No room

{room}

## Damage

One byte, at random, of one file that the stage opens is changed on the disk, times of modification restored. The stage
must refuse the file, naming it, or make it anew. Model cards are left out: they are text that people edit.

{damage}
"""


def wrong(cases: Sequence[Case]) -> list[Case]:
    """Cases that did not come to the same end, or damage that was taken."""
    return [case for case in cases if not case.equal or not case.told]


def summary(cases: Sequence[Case], seconds: float, minutes: float) -> str:
    """One line. minutes: of user and system CPU."""
    done = f"{len(cases)} cases in {seconds:.0f} s, {minutes:.1f} minutes of CPU"
    return f"{done}, {len(wrong(cases))} wrong, {_unmet(cases)} faults met another file"


def _unmet(cases: Sequence[Case]) -> int:
    return sum(not case.met for case in cases if case.fault in FAULTS)


def page(cases: Sequence[Case], way: str, every: int, minutes: float, whole: bool) -> str:
    """The page. minutes: of user and system CPU; whole: each error was struck at each boundary, not one in turn."""
    faults = [case for case in cases if case.fault in FAULTS]
    room = [case for case in cases if case.fault in ("full disk", "RLIMIT_FSIZE")]
    flips = [case for case in cases if case.fault == "damage"]
    errors = [case for case in faults if case.fault != "SIGKILL"]
    told = f"{sum(case.told for case in errors)} of {len(errors)}"
    return TEXT.format(
        way="strace" if way == "strace" else "Python's audit hooks",
        each="each boundary" if every == 1 else f"one in {every} of them, drawn at random,",
        errors=EACH if whole else IN_TURN,
        minutes=minutes,
        unmet=_unmet(faults),
        faults=len(faults),
        flips=len(flips),
        table=_table(faults, ["boundaries", *FAULTS]),
        told=told,
        damage=_flips(flips),
        room=_room(room),
    )


def _table(cases: Sequence[Case], columns: list[str]) -> str:
    lines = ["| stage | call | " + " | ".join(columns) + " |", "|---|---|" + "---:|" * len(columns)]
    stages = [*dict.fromkeys(case.stage for case in cases)]
    pairs = {(case.stage, case.call) for case in cases}
    for stage, call in sorted(pairs, key=lambda pair: (stages.index(pair[0]), pair)):
        own = [case for case in cases if (case.stage, case.call) == (stage, call)]
        by_fault = {fault: [case for case in own if case.fault == fault] for fault in FAULTS}
        cells = [f"{sum(c.equal for c in found)} of {len(found)} equal" for found in by_fault.values()]
        lines.append(f"| {stage} | {call} | {max(map(len, by_fault.values()))} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _room(cases: Sequence[Case]) -> str:
    """Disks and files that are full: a tmpfs of a size of its own, grown before the command runs again; RLIMIT_FSIZE."""
    lines = ["| stage | no room | cases | met | equal |", "|---|---|---:|---:|---:|"]
    for stage, fault in dict.fromkeys((case.stage, case.fault) for case in cases):
        own = [case for case in cases if (case.stage, case.fault) == (stage, fault)]
        counts = f"{len(own)} | {sum(case.met for case in own)} | {sum(case.equal for case in own)}"
        lines.append(f"| {stage} | {fault} | {counts} |")
    return "\n".join(lines)


def _flips(cases: Sequence[Case]) -> str:
    lines = ["| stage | bytes changed | files | taken |", "|---|---:|---:|---:|"]
    for stage in dict.fromkeys(case.stage for case in cases):
        own = [case for case in cases if case.stage == stage]
        taken = sum(not case.equal for case in own)
        lines.append(f"| {stage} | {len(own)} | {len({case.path for case in own})} | {taken} |")
    return "\n".join(lines)
