"""Mutual training as a federation over Flower: its ServerApp and ClientApp carry messages and start parts, no more.

    flwr run DIR SUPERLINK --run-config 'settings="experiment=NAME output_dir=DIR"'     (docs/mutual.md)

Each side composes its own config, from ``settings``: the server's in the run's configuration, a client's in that of its
SuperNode, with ``mutual.side=NAME``. A side's part of a round is the command that the local way starts. What travels
are the files of `fusechat.mutual.messages`, the round's number, what must be alike, and names; where a part fails, the
server is told that it failed, and the reason stays in the client's log.
"""

from __future__ import annotations

import json
import logging
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fusechat.app.command import run_stage
from fusechat.app.errors import UserError
from fusechat.app.marks import differing
from fusechat.app.outputs import write_json
from fusechat.mutual.__main__ import composed, federation_of, part_of
from fusechat.mutual.messages import packed, unpacked

if TYPE_CHECKING:
    from fusechat.mutual.federation import Federation

LOG = logging.getLogger(__name__)
PART, MESSAGE, SIDE, FAILED = "part", "message", "side", "failed"  # records of what travels
POLL = 1.0  # seconds between looks for SuperNodes that have come
ASKED = 60.0  # seconds in which a SuperNode says who it is
server = ServerApp()
client = ClientApp()  # in lines of their own: Flower looks for them without an import


@server.main()
def serve(grid: Grid, context: Context) -> None:
    """All rounds, the server's parts here and the clients' wherever they are."""
    given = shlex.split(str(context.run_config["settings"]))
    run_stage(lambda cfg: _serve(grid, cfg, given), composed(given))


def _serve(grid: Grid, cfg: Any, given: Sequence[str]) -> None:
    from fusechat.mutual import mutual

    federation = federation_of(cfg)
    far = Clients(grid, federation, 60 * cfg.mutual.timeout if cfg.mutual.timeout else None)
    mutual(federation, part_of(given, None), clients=far, overwrite=cfg.overwrite)


class Clients:
    """The clients behind a grid. timeout: seconds for which a round waits for them; None: until all have answered."""

    def __init__(self, grid: Grid, federation: Federation, timeout: float | None) -> None:
        self.grid, self.federation, self.timeout = grid, federation, timeout
        self.names: dict[int, str] = {}  # of SuperNodes that have said them

    def __call__(self, names: Sequence[str], round: int) -> Mapping[str, str]:
        """Has the clients do their parts of a round and takes what they send; those who could not, and why."""
        began, exchange = time.monotonic(), self.federation.exchange
        nodes = self._found(names, began)
        content = _part(self.federation, round)
        left = self.timeout and max(1.0, self.timeout - (time.monotonic() - began))
        replies = self._ask(dict.fromkeys(nodes.values(), content), "train", left)
        failed = dict[str, str]()
        for name in names:
            if name not in nodes:
                failed[name] = f"no SuperNode is there with mutual.side={name}"
            elif (reply := replies.get(nodes[name])) is None:
                failed[name] = "it was late"
            elif reason := _told(reply) or self._taken(reply, exchange.place(round, name)):
                failed[name] = reason
            else:
                write_json(self.federation.done(name, round), {"last": round > self.federation.rounds})
        return failed

    def _taken(self, reply: RecordDict, place: Path) -> str:
        """Writes the message of a reply, if it has one; why it could not be, if so."""
        try:
            if files := _files(reply):
                unpacked(files, place)
        except UserError as error:
            return str(error)
        return ""

    def _found(self, names: Sequence[str], began: float) -> dict[str, int]:
        """The nodes of these clients, waited for as long as a round may."""
        while True:
            there = set(self.grid.get_node_ids())
            unknown = {node: RecordDict() for node in there - self.names.keys()}
            for node, reply in self._ask(unknown, "query", self.timeout and min(self.timeout, ASKED)).items():
                if SIDE in reply:
                    self.names[node] = str(reply.config_records[SIDE]["name"])
            nodes = dict[str, int]()
            for node in (node for node in self.names if node in there):  # in the order in which they came
                if (first := nodes.setdefault(self.names[node], node)) != node:
                    LOG.warning(
                        "SuperNodes %d and %d both say they are %s; the first is", first, node, self.names[node]
                    )
            late = self.timeout is not None and time.monotonic() - began > self.timeout
            if late or not set(names) - nodes.keys():
                return {name: node for name, node in nodes.items() if name in names}
            time.sleep(POLL)

    def _ask(self, content: Mapping[int, RecordDict], kind: str, timeout: float | None) -> dict[int, RecordDict]:
        """What nodes answer, those that do in time."""
        messages = [Message(given, dst_node_id=node, message_type=kind) for node, given in content.items()]
        replies = self.grid.send_and_receive(messages, timeout=timeout) if messages else []
        return {
            reply.metadata.src_node_id: reply.content if reply.has_content() else _failure("its ClientApp failed")
            for reply in replies
        }


def _part(federation: Federation, round: int) -> RecordDict:
    """What the server sends for a round: its number, what must be alike, and what it has said last."""
    from fusechat.mutual.methods import SERVER

    agreed = json.dumps(dict(federation.agreed.parts))
    said = packed(federation.exchange.place(round - 1, SERVER))
    return RecordDict({PART: ConfigRecord({"round": round, "agreed": agreed}), MESSAGE: ConfigRecord(dict(said))})


def _failure(reason: str) -> RecordDict:
    return RecordDict({FAILED: ConfigRecord({"reason": reason})})


def _told(reply: RecordDict) -> str:
    return str(reply.config_records[FAILED]["reason"]) if FAILED in reply else ""


def _files(content: RecordDict) -> dict[str, bytes]:
    """The files of a message. Raises `UserError` for what is none."""
    found = dict(content.config_records[MESSAGE]) if MESSAGE in content else {}
    return {name: value for name, value in found.items() if isinstance(value, bytes)}


def _quietly(answer: Callable[[Message, Context], RecordDict]) -> Callable[[Message, Context], Message]:
    """An answer of which nothing leaves but what it returns: Flower would send an exception's text."""

    def answered(message: Message, context: Context) -> Message:
        try:
            content = answer(message, context)
        except Exception:
            LOG.exception("this side could not answer")
            content = _failure("its part could not begin; its SuperNode's log says why")
        return Message(content, reply_to=message)

    return answered


@client.query()
@_quietly
def introduce(message: Message, context: Context) -> RecordDict:
    """Says which client this is."""
    cfg = composed(shlex.split(str(context.node_config["settings"])))
    return RecordDict({SIDE: ConfigRecord({"name": str(cfg.mutual.side)})})


@client.train()
@_quietly
def take_part(message: Message, context: Context) -> RecordDict:
    """Does this client's part of a round, in a process of its own, with what the server has said."""
    from fusechat.mutual.methods import SERVER

    given = shlex.split(str(context.node_config["settings"]))
    cfg = composed(given)
    federation, name = federation_of(cfg), str(cfg.mutual.side)
    part = message.content.config_records[PART]
    round = int(part["round"])  # type: ignore[arg-type]
    if differs := differing(json.loads(str(part["agreed"])), dict(federation.agreed.parts), "at the server"):
        return _failure(f"its settings are others than the server's ({differs})")
    if files := _files(message.content):
        unpacked(files, federation.exchange.place(round - 1, SERVER))
    try:
        part_of(given, cfg.mutual.timeout)(name, round)
    except (UserError, TimeoutError) as error:  # its own words: whose part of what, and how it ended
        return _failure(str(error))
    if round > federation.rounds:
        federation.keep(name)
    return RecordDict({MESSAGE: ConfigRecord(dict(packed(federation.exchange.place(round, name))))})
