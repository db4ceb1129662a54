"""Rounds of a mutual training: every side's part in turn, whoever is missing is gone on without, all of it recorded."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fusechat.app.errors import UserError
from fusechat.app.outputs import RECORD, read_json, settled, stage_fingerprint, stamp, write_durably, write_json
from fusechat.app.places import writing
from fusechat.mutual.federation import Federation
from fusechat.mutual.messages import bytes_of
from fusechat.mutual.methods import METHODS, SERVER
from fusechat.mutual.outcome import lines, table, told

LOG = logging.getLogger(__name__)
BEGUN = "begun.json"  # what an unfinished run is of
HOLDS = ("extract", "align", "train", "merge", "mutual")  # stages whose outputs lie inside
Start = Callable[[str, int], None]  # runs a side's part of a round, in a process of its own perhaps
Together = Callable[[Sequence[str], int], Mapping[str, str]]  # runs clients' parts; whose failed, and why


def mutual(
    federation: Federation, start: Start | None = None, *, clients: Together | None = None, overwrite: bool = False
) -> list[dict[str, Any]]:
    """Runs all rounds; leaves every side's model in ``folder/NAME``. Returns what is recorded of each round.

    start: runs a part, `Federation.part` in this process unless given; a client's that raises `UserError` or
    `TimeoutError` is missing from the round. clients: runs those of several clients, on machines of their own perhaps;
    one after the other by ``start`` unless given. A round that is recorded is not run again: a killed run goes on with
    the next. Raises `UserError` where the server's part fails, and for a folder of other settings unless ``overwrite``.
    """
    folder, began = federation.folder, time.monotonic()
    of = federation.mark if overwrite else federation.mark_of(folder / BEGUN)
    mark = stage_fingerprint(round=federation.rounds, of=str(of))
    reads = [*federation.exchange.models.values(), *(client.chats for client in federation.clients.values())]
    known = lambda place: (place / BEGUN).exists()
    federation.check()
    LOG.info("%d public chats, %d clients", len(federation.terms.chats), len(federation.clients))  # read before a claim
    with writing(folder, "mutual", reads=reads, known=known, holds=HOLDS):
        _begin(federation, of, overwrite)
        if settled(folder / RECORD, mark, what="mutual training", keep="output_dir=DIR", overwrite=True) is None:
            (folder / RECORD).unlink(missing_ok=True)
        run = start or federation.part
        together = clients or (lambda names, round: _in_turn(run, names, round))
        if "first" in METHODS[federation.method].needs and not federation.done(SERVER, 0).exists():
            run(SERVER, 0)
        records = [_round(federation, round, run, together) for round in range(1, federation.rounds + 1)]
        for name, reason in _clients(federation, federation.rounds + 1, together).items():
            LOG.warning("%s has not taken in what was said last: %s", name, reason)
        for name in federation.exchange.models:
            federation.keep(name)
        found = list(lines(federation))
        write_durably(folder / "rounds.csv", table(found).encode())
        write_json(folder / RECORD, {**stamp(mark), "stage": "mutual", "method": federation.method, "rounds": records})
    LOG.info(told(federation, found, records, time.monotonic() - began))
    return records


def _begin(federation: Federation, mark: str, overwrite: bool) -> None:
    """Says whose folder it is. Raises `UserError` where other settings have begun there."""
    folder, begun = federation.folder, federation.folder / BEGUN
    if overwrite and folder.exists():
        shutil.rmtree(folder)
    if begun.exists() and read_json(begun).get("fingerprint") == mark:
        ended = len([*folder.glob("rounds/*.json")])
        LOG.info("%s: begun before with the same settings, goes on after round %d", folder, ended)
    elif settled(begun, mark, what="mutual training", keep="output_dir=DIR") is None:
        write_json(begun, {**stamp(mark), "stage": "mutual"})


def _round(federation: Federation, round: int, run: Start, together: Together) -> dict[str, Any]:
    """One round: the clients' parts, then the server's. Returns its record, from the disk where it is there."""
    record, began = federation.folder / "rounds" / f"{round:02d}.json", time.monotonic()
    if record.exists():
        return read_json(record)
    exchange, failed = federation.exchange, _clients(federation, round, together)
    missing = {name: reason for name, reason in failed.items() if not exchange.place(round, name).exists()}
    if not federation.done(SERVER, round).exists():
        run(SERVER, round)
    missing |= read_json(federation.done(SERVER, round))["left"]
    for name, reason in missing.items():
        LOG.warning("round %d goes on without %s: %s", round, name, reason)
    sent = {name: bytes_of(exchange.place(round, name)) for name in exchange.models}
    heard = [name for name in exchange.clients if name not in missing]
    found = {"round": round, "clients": heard, "missing": missing, "bytes": sent, "seconds": time.monotonic() - began}
    write_json(record, found)
    LOG.info("round %d of %d: %d clients, %s bytes", round, federation.rounds, len(heard), f"{sum(sent.values()):,}")
    return found


def _clients(federation: Federation, round: int, together: Together) -> Mapping[str, str]:
    """Runs the parts of the clients whose part is not done; whose could not be, and why."""
    last, todo = round > federation.rounds, list[str]()
    for name in federation.clients:
        done = federation.done(name, round)
        if not (done.exists() and (last or not read_json(done)["last"])):
            todo.append(name)
    return together(todo, round) if todo else {}


def _in_turn(run: Start, names: Sequence[str], round: int) -> dict[str, str]:
    failed = dict[str, str]()
    for name in names:
        try:
            run(name, round)
        except TimeoutError as error:
            failed[name] = str(error) or "it was late"
        except UserError as error:
            failed[name] = str(error)
    return failed
