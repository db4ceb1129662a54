"""Rounds of a mutual training: every side's part in turn, whoever is missing is gone on without, all of it recorded."""

from __future__ import annotations

import csv
import io
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fusechat.app.errors import UserError
from fusechat.app.marks import UNDECIDING, Mark
from fusechat.app.outputs import (
    RECORD,
    read_json,
    settled,
    stage_fingerprint,
    stamp,
    whole_directory,
    write_durably,
    write_json,
)
from fusechat.app.places import writing
from fusechat.models.load import model_identity
from fusechat.mutual.messages import bytes_of
from fusechat.mutual.methods import METHODS, SERVER, Exchange, Method
from fusechat.mutual.sides import LEARNED, PRACTISED, RECEIVED, Side, State, Terms

LOG = logging.getLogger(__name__)
BEGUN, PART = "begun.json", "part.json"  # what an unfinished run is of; that a side's part of a round is done
HOLDS = ("extract", "align", "train", "merge", "mutual")  # stages whose outputs lie inside
OURS = ("sides", "exchange", "rounds")  # folders beside the models
SECTIONS = {"data": "data", "trainer": "trainer", "extraction": "extract", "alignment": "alignment"}  # of `Terms`
Start = Callable[[str, int], None]  # runs a side's part of a round, in a process of its own perhaps


@dataclass(frozen=True)
class Client:
    """path: its base model; chats: its private chats."""

    path: str
    chats: str


@dataclass(frozen=True)
class Federation:
    """A mutual training. server: the base of its LLM; clients: by name; folder: of all outputs. more: of the method.

    Raises `UserError` for an unknown method and for names of clients that folders of ours have.
    """

    method: str
    server: str
    clients: Mapping[str, Client]
    folder: Path
    terms: Terms
    rounds: int = 3

    def __post_init__(self) -> None:
        METHODS[self.method]
        if taken := sorted({SERVER, *OURS} & self.clients.keys()):
            raise UserError(f"mutual.clients: {taken[0]!r} is a folder's name here; call the client otherwise")
        if not self.clients:
            raise UserError("mutual.clients is empty; name at least one, NAME: {path: DIR, chats: FILE}")

    def side(self, name: str) -> Side:
        """A side by its name."""
        own = self.clients.get(name)
        path, private = (own.path, own.chats) if own else (self.server, None)
        return Side(name, path, self.folder / "sides" / name, self.terms, private)

    @property
    def exchange(self) -> Exchange:
        """Where messages go."""
        models = {SERVER: self.server, **{name: client.path for name, client in self.clients.items()}}
        return Exchange(self.folder / "exchange", models)

    @property
    def parts(self) -> Method:
        """What sides do."""
        made: Method = METHODS[self.method].function()
        return made

    @cached_property
    def mark(self) -> Mark:
        """The fingerprint of all that decides a round; how many there are is not part of it."""
        terms = {key: value for key, value in asdict(self.terms).items() if key not in ("imports", "callbacks")}
        for key, section in SECTIONS.items():
            terms[key] = {name: value for name, value in terms[key].items() if name not in UNDECIDING[section]}
        models = {name: model_identity(path) for name, path in self.exchange.models.items()}
        private = {name: client.chats for name, client in self.clients.items()}
        terms["optimizer"] = self.terms.optimizer.settings
        return stage_fingerprint(self.terms.imports, method=self.method, models=models, private=private, terms=terms)

    def part(self, name: str, round: int) -> None:
        """A side's part of a round.

        Before the first the server may have one, 0; after the last there is one more, in which clients take in what was
        said.
        """
        side, done = self.side(name), self.done(name, round)
        if name == SERVER:
            write_json(done, {"left": dict(self.parts.server(side, self.exchange, round))})
        else:
            self.parts.client(side, self.exchange, round, last=round > self.rounds)
            write_json(done, {"last": round > self.rounds})

    def done(self, name: str, round: int) -> Path:
        """The file that says a part is done."""
        return self.side(name).place(round, PART)

    def final(self, name: str) -> State:
        """A side's model after all rounds."""
        side, last = self.side(name), self.rounds + 1
        return side.at(last, LEARNED) or side.at(last, RECEIVED) or side.state(last)


def mutual(federation: Federation, start: Start | None = None, *, overwrite: bool = False) -> list[dict[str, Any]]:
    """Runs all rounds; leaves every side's model in ``folder/NAME``. Returns what is recorded of each round.

    start: runs a part, `Federation.part` in this process unless given; a client's that raises `UserError` or
    `TimeoutError` is missing from the round. A round that is recorded is not run again: a killed run goes on with the
    next. Raises `UserError` where the server's part fails, and for a folder of other settings unless ``overwrite``.
    """
    folder, mark = federation.folder, stage_fingerprint(round=federation.rounds, of=str(federation.mark))
    reads = [*federation.exchange.models.values(), *(client.chats for client in federation.clients.values())]
    known = lambda place: (place / BEGUN).exists()
    LOG.info("%d public chats, %d clients", len(federation.terms.chats), len(federation.clients))  # read before a claim
    with writing(folder, "mutual", reads=reads, known=known, holds=HOLDS):
        _begin(federation, overwrite)
        if settled(folder / RECORD, mark, what="mutual training", keep="output_dir=DIR", overwrite=True) is None:
            (folder / RECORD).unlink(missing_ok=True)
        run = start or federation.part
        if "first" in METHODS[federation.method].needs and not federation.done(SERVER, 0).exists():
            run(SERVER, 0)
        records = [_round(federation, round, run) for round in range(1, federation.rounds + 1)]
        for name in federation.clients:
            _attempt(federation, name, federation.rounds + 1, run)
        for name in federation.exchange.models:
            _keep(federation.final(name), folder / name)
        write_durably(folder / "rounds.csv", _table(_rows(federation)).encode())
        write_json(folder / RECORD, {**stamp(mark), "stage": "mutual", "method": federation.method, "rounds": records})
    return records


def _begin(federation: Federation, overwrite: bool) -> None:
    """Says whose folder it is. Raises `UserError` where other settings have begun there."""
    folder, begun = federation.folder, federation.folder / BEGUN
    if overwrite and folder.exists():
        shutil.rmtree(folder)
    settled(begun, federation.mark, what="mutual training", keep="output_dir=DIR")
    if not begun.exists():
        write_json(begun, {**stamp(federation.mark), "stage": "mutual"})


def _round(federation: Federation, round: int, run: Start) -> dict[str, Any]:
    """One round: the clients' parts, then the server's. Returns its record, from the disk where it is there."""
    record, began = federation.folder / "rounds" / f"{round:02d}.json", time.monotonic()
    if record.exists():
        return read_json(record)
    exchange, missing = federation.exchange, dict[str, str]()
    for name in exchange.clients:
        if (reason := _attempt(federation, name, round, run)) and not exchange.place(round, name).exists():
            missing[name] = reason
    if not federation.done(SERVER, round).exists():
        run(SERVER, round)
    missing |= read_json(federation.done(SERVER, round))["left"]
    for name, reason in missing.items():
        LOG.warning("round %d goes on without %s: %s", round, name, reason)
    sent = {name: bytes_of(exchange.place(round, name)) for name in exchange.models}
    heard = [name for name in exchange.clients if name not in missing]
    found = {"round": round, "clients": heard, "missing": missing, "bytes": sent}
    write_json(record, {**found, "seconds": time.monotonic() - began})
    LOG.info("round %d of %d: %d clients, %s bytes", round, federation.rounds, len(heard), f"{sum(sent.values()):,}")
    return found


def _attempt(federation: Federation, name: str, round: int, run: Start) -> str:
    """Runs a client's part unless it is done; why it could not be, if so."""
    done, last = federation.done(name, round), round > federation.rounds
    if done.exists() and (last or not read_json(done)["last"]):
        return ""
    try:
        run(name, round)
    except TimeoutError as error:
        return str(error) or "it was late"
    except UserError as error:
        return str(error)
    return ""


def _keep(state: State, place: Path) -> None:
    """A side's last model under its name, by hard links; nothing for a base that was never trained."""
    if state.adapter is None:
        return
    link = lambda source, target: os.link(source, target)
    with whole_directory(place, overwrite=True) as directory:
        shutil.copytree(state.model, directory, copy_function=link, dirs_exist_ok=True)


def _rows(federation: Federation) -> Iterator[dict[str, Any]]:
    """A line for everything that a side has learned or practised: held-out numbers, whom it heard, what it sent."""
    names = list(federation.exchange.models)
    for round in range(1, federation.rounds + 2):
        for name in names:
            side = federation.side(name)
            for stage in (LEARNED, PRACTISED):
                if (state := side.at(round, stage)) is None or (round > federation.rounds and stage == PRACTISED):
                    continue
                held = read_json(Path(state.model) / RECORD)
                wins = held["wins"].get("all", {})
                line = {"round": round, "side": name, "stage": stage, "steps": held["steps"]}
                line |= {"bits_per_byte": held["metrics"].get("validation/bits_per_byte")}
                line |= {"learned": 1 - wins.get("pivot", 0.0) if stage == LEARNED else None}
                line |= {f"from_{other}": wins.get(other) for other in names}
                yield line | {"sent_bytes": bytes_of(federation.exchange.place(round, name))}


def _table(rows: Iterator[dict[str, Any]]) -> str:
    lines, text = list(rows), io.StringIO()
    if lines:
        writer = csv.DictWriter(text, lines[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    return text.getvalue()
