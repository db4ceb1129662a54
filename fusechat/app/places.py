"""Where a stage may write: decided in one place, before anything is loaded, for every command and Python call.

A stage replaces only what its own kind has made, as the output's record says; never an input, a folder above or inside
one, or a folder that it does not recognise, with ``overwrite`` or without.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from fusechat.app.errors import UserError
from fusechat.app.locks import held
from fusechat.app.outputs import MANIFEST, RECORD, tidy
from fusechat.app.sealed import unsealed

P = ParamSpec("P")
R = TypeVar("R")
CLAIM = "fingerprint"  # of a store, from its first shard on
OLD = {"distributions": "extract", "aligned": "align"}  # kind -> stage, of stores that do not name it
Known = Callable[[Path], bool]


@contextmanager
def writing(
    output: Path,
    stage: str,
    *,
    reads: Iterable[Any] = (),
    file: bool = False,
    known: Known | None = None,
    holds: Sequence[str] = (),
) -> Iterator[None]:
    """Holds an output for its stage, if it may write there; before, what a killed process has left is made good.

    reads: the inputs; what is no existing path among them (a Hub id) is passed over. file: the output is no folder.
    known: recognises outputs without a record (of earlier versions, or of a form that has no room for one). holds:
    stages whose outputs lie inside this one. Raises `UserError`.
    """
    check_inputs(output, reads)
    place = output.resolve()
    with held(place, _choose(file)) as first:
        if first:
            tidy(place)
            check_owner(output, stage, file=file, known=known, holds=holds)
        yield


def writes(
    stage: str, *, reads: Sequence[str] = (), output: str = "output_dir", known: Known | None = None
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator of a stage's function: runs it inside `writing`. reads, output: the names of its parameters.

    An output that is None is not written.
    """

    def wrap(run: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(run)

        @functools.wraps(run)
        def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
            given = signature.bind(*args, **kwargs).arguments
            if given.get(output) is None:
                return run(*args, **kwargs)
            inputs = [given.get(name) for name in reads]
            with writing(Path(given[output]), stage, reads=inputs, file=output == "output_file", known=known):
                return run(*args, **kwargs)

        return guarded

    return wrap


def check_inputs(output: Path, reads: Iterable[Any]) -> None:
    """Raises `UserError` where an output is an input, or above or inside one."""
    choose = "choose another place for the output"
    try:
        place = output.resolve()
    except RuntimeError as error:  # so says pathlib
        raise UserError(f"{output} is a symbolic link that leads back to itself; {choose}") from error
    for given in paths_in(reads):
        path = given.resolve()
        if place == path:
            raise UserError(f"{output} is an input of this command; {choose}")
        if place in path.parents:
            raise UserError(f"{output} lies above the input {given}; {choose}")
        if path in place.parents:
            raise UserError(f"{output} lies inside the input {given}; {choose}")


def check_owner(
    output: Path, stage: str, *, file: bool = False, known: Known | None = None, holds: Sequence[str] = ()
) -> None:
    """Raises `UserError` where an output is there and anything but what ``stage`` has made."""
    choose = _choose(file)
    if not output.exists() or (output.is_dir() and not file and not any(output.iterdir())):
        return
    if not (output.is_dir() or output.is_file()):  # some can be read without end
        raise UserError(f"{output} is a device, pipe or socket; {choose}")
    if output.is_dir() == file:
        raise UserError(f"{output} is a {'folder' if file else 'file'}; {choose}")
    owner = stage_of(output)
    if owner != stage and not (owner is None and known is not None and known(output)):
        if owner is None and (record := _unreadable(output)):
            raise UserError(
                f"{record} is half-written or not JSON; if {output} is to be made anew, remove it; or {choose}"
            )
        found = f"what {owner} has made" if owner else "what fusechat has not made"
        raise UserError(f"{output} holds {found}, and {stage} replaces only its own; {choose}")
    for inner in (record.parent for name in (RECORD, MANIFEST) for record in output.glob(f"*/**/{name}")):
        if stage_of(inner) not in holds:
            raise UserError(f"{output} has another output inside, {inner}; {choose}, or move that")


def stage_of(output: Path) -> str | None:
    """The stage that made an output, as its record says; None where it has none. A result is its own record."""
    for record in [output] if output.is_file() else [output / RECORD, output / MANIFEST]:
        if (stage := _stage(record)) is not None:
            return stage
    return claimed(output).get("stage")


def claimed(output: Path) -> Mapping[str, Any]:
    """What an unfinished store says of itself: fingerprint (first line), and as JSON below it its stage and parts."""
    if not (output / CLAIM).is_file():
        return {}
    mark, _, rest = (output / CLAIM).read_text(encoding="utf-8", errors="replace").partition("\n")
    remedy = "remove the folder and run the same command again"
    return {"fingerprint": mark, **(unsealed(rest.encode(), output / CLAIM, remedy) if rest.strip() else {})}


def paths_in(values: Iterable[Any]) -> Iterator[Path]:
    """Every existing path among values, sequences and mappings of them."""
    for value in values:
        if isinstance(value, (str, Path)):
            if value and Path(value).exists():
                yield Path(value)
        elif isinstance(value, Mapping):
            yield from paths_in(value.values())
        elif isinstance(value, (list, tuple)):
            yield from paths_in(value)


def _unreadable(output: Path) -> Path | None:
    """A record that is there and does not say what made its folder, not being JSON."""
    for record in (output / RECORD, output / MANIFEST):
        try:
            if record.is_file():
                json.loads(record.read_bytes())
        except ValueError:
            return record
    return None


def _choose(file: bool) -> str:
    return f"choose another with {'output_file=FILE' if file else 'output_dir=DIR'}"


def _stage(record: Path) -> str | None:
    """The stage that a JSON record of ours names."""
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict):
        return None
    stage = content.get("stage", OLD.get(str(content.get("kind"))) if "shards" in content else None)
    return stage if isinstance(stage, str) else None
