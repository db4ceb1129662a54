"""Who takes part in a mutual training, on what terms, and where each side's part of a round is done."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fusechat.app.errors import UserError
from fusechat.app.marks import PARTS, UNDECIDING, Mark
from fusechat.app.outputs import read_json, stage_fingerprint, whole_directory, write_json
from fusechat.app.surroundings import check_place
from fusechat.chats.formats import load_chats
from fusechat.chats.mixture import Given
from fusechat.models.gguf import check_plain
from fusechat.models.load import check_context, load_config, model_identity
from fusechat.mutual.methods import METHODS, SERVER, Exchange, Method
from fusechat.mutual.sides import LEARNED, RECEIVED, Side, State, Terms

PART = "part.json"  # says that a side's part of a round is done
OURS = ("sides", "exchange", "rounds")  # folders beside the models
SECTIONS = {"data": "data", "trainer": "trainer", "extraction": "extract", "alignment": "alignment"}  # of `Terms`
AVERAGING = ("average", "average_settings")  # of `Terms`: decide nothing where no adapters are averaged
PLACES = ("public", "host", "validation")  # of `Terms`: paths, of each side's own machine


@dataclass(frozen=True)
class Client:
    """path: its base model; chats: its private chats, as ``chat.path``; None where they lie on a machine of its own."""

    path: str
    chats: Given | None = None


@dataclass(frozen=True)
class Federation:
    """A mutual training. server: the base of its LLM; clients: by name; folder: of all outputs.

    Raises `UserError` for an unknown method, for names of clients that folders of ours have, and for clients of several
    models where the method averages adapters.
    """

    method: str
    server: str
    clients: Mapping[str, Client]
    folder: Path
    terms: Terms
    rounds: int = 3

    def __post_init__(self) -> None:
        needs = METHODS[self.method].needs
        if taken := sorted({SERVER, *OURS} & self.clients.keys()):
            raise UserError(f"mutual.clients: {taken[0]!r} is a folder's name here; call the client otherwise")
        if not self.clients:
            raise UserError("mutual.clients is empty; name at least one, NAME: {path: DIR, chats: FILE}")
        if "one_model" in needs and len(paths := {client.path for client in self.clients.values()}) > 1:
            told = f"adapters of one model alone are averaged, the clients have {len(paths)}"
            raise UserError(f"{told} ({', '.join(sorted(paths))}); use mutual=fedmkt")

    def check(self) -> None:
        """Raises `UserError` for what each side would stop at: models or chats that are not there, or too long."""
        for name, path in self.exchange.models.items():
            role = "pivot.path" if name == SERVER else f"mutual.clients.{name}.path"
            check_place(path, role)
            check_plain(path, role)
        for path in sorted({*self.exchange.models.values()}):
            check_context(load_config(path), path, self.terms.chat.get("max_length", 2048))
        for name, client in self.clients.items():
            try:
                load_chats(client.chats or self.terms.chats)
            except UserError as error:
                raise UserError(f"mutual.clients.{name}.chats: {error}") from error

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
        models = {name: model_identity(path) for name, path in self.exchange.models.items()}
        private = {name: client.chats for name, client in self.clients.items()}
        terms = self._deciding()
        return stage_fingerprint(self.terms.imports, method=self.method, models=models, private=private, terms=terms)

    def mark_of(self, record: Path) -> str:
        """The fingerprint; of what an earlier version began, whose fingerprint held `AVERAGING` always, the one there.

        record: what says by which settings a folder was begun.
        """
        held = read_json(record) if record.exists() else {}
        parts, unheeded = held.get(PARTS, {}), tuple(f"terms.{key}" for key in AVERAGING)
        said = {key: value for key, value in parts.items() if not key.startswith(unheeded)}
        return str(held["fingerprint"]) if said == self.mark.parts else self.mark

    @property
    def agreed(self) -> Mark:
        """The fingerprint of what all sides must have alike, whatever machine their files are on."""
        terms = {key: value for key, value in self._deciding().items() if key not in PLACES}
        return stage_fingerprint(self.terms.imports, method=self.method, rounds=self.rounds, terms=terms)

    def _deciding(self) -> dict[str, Any]:
        undeciding = ("imports", "callbacks", *(() if "one_model" in METHODS[self.method].needs else AVERAGING))
        terms = {key: value for key, value in asdict(self.terms).items() if key not in undeciding}
        for key, section in SECTIONS.items():
            terms[key] = {name: value for name, value in terms[key].items() if name not in UNDECIDING[section]}
        return {**terms, "optimizer": self.terms.optimizer.settings}

    def part(self, name: str, round: int) -> None:
        """A side's part of a round; after it the weights of rounds before go, which no later round reads.

        Before the first the server may have one, 0; after the last there is one more, in which clients take in what was
        said.
        """
        side, last = self.side(name), round > self.rounds
        if name == SERVER:
            write_json(self.done(name, round), {"left": dict(self.parts.server(side, self.exchange, round))})
        else:
            self.parts.client(side, self.exchange, round, last=last)
            write_json(self.done(name, round), {"last": last})
        if not last:  # else more rounds may go on from there
            side.forget(round)

    def done(self, name: str, round: int) -> Path:
        """The file that says a part is done."""
        return self.side(name).place(round, PART)

    def final(self, name: str) -> State:
        """A side's model after all rounds."""
        side, last = self.side(name), self.rounds + 1
        return side.at(last, LEARNED) or side.at(last, RECEIVED) or side.state(last)

    def keep(self, name: str) -> Path | None:
        """Keeps a side's last model under its name, by hard links; None for a base that was never trained here."""
        state, place = self.final(name), self.folder / name
        if state.adapter is None:
            return None
        with whole_directory(place, overwrite=True) as directory:
            if not state.has_weights:
                self.side(name).restore(state, directory)
            shutil.copytree(state.model, directory, copy_function=_link, dirs_exist_ok=True)
        return place


def _link(source: str, target: str) -> None:
    if not Path(target).exists():
        os.link(source, target)
