"""What sides do in a round: FedMKT, FedCoLLM, and what they are compared with.

A method is a class with two functions here, or in a module of one's own, and one file in ``conf/mutual``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from fusechat.app.errors import UserError
from fusechat.app.registry import Family
from fusechat.mutual.averaging import averaged, shapes
from fusechat.mutual.messages import AGAIN, Message, post, read
from fusechat.mutual.sides import Side, State
from fusechat.stores.store import DistributionStore

METHODS = Family("mutual.method", needs=("first", "one_model"))
"""Needs: ``first``: the server has a part before the first round, 0, and says something to begin with; ``one_model``:
all clients have the same base.
"""

SERVER = "server"  # the name of the side that all others talk with


@dataclass(frozen=True)
class Exchange:
    """The folder through which messages go. models: side -> its base model, whose tokenizer all know."""

    folder: Path
    models: Mapping[str, str]

    @property
    def clients(self) -> list[str]:
        """Their names."""
        return [name for name in self.models if name != SERVER]

    def place(self, round: int, sender: str) -> Path:
        """Where a message lies."""
        return self.folder / f"round-{round:02d}" / sender

    def read(self, round: int, sender: str) -> Message | None:
        """The message; None where there is none. Raises `UserError` for one that cannot be taken."""
        place = self.place(round, sender)
        return read(place, sender, round) if place.exists() else None


class Method(Protocol):
    """The parts of a round. Each may be run again: what is whole is kept."""

    def client(self, side: Side, exchange: Exchange, round: int, last: bool) -> None:
        """A client's part. last: the rounds are over, what the server said last is taken in and nothing is sent."""

    def server(self, side: Side, exchange: Exchange, round: int) -> Mapping[str, str]:
        """The server's part. Returns the clients that it could not hear, with the reason of each."""


@METHODS.register("fedmkt", "distributions of public chats both ways, learned from where the sender knows better")
class FedMKT:
    """FedMKT (arXiv 2406.02224): private chats, then what the clients say teaches the server, and the other way."""

    def client(self, side: Side, exchange: Exchange, round: int, last: bool) -> None:
        """Learns from the server's last message, practises, and tells."""
        state = side.state(round)
        told = exchange.read(round - 1, SERVER)
        if told is not None:
            heard = side.hear(told, exchange.models[SERVER], round)
            state = side.learn(state, {SERVER: heard}, round)
        if not last:
            _tell(side, side.practise(state, round), exchange, round)

    def server(self, side: Side, exchange: Exchange, round: int) -> Mapping[str, str]:
        """Learns from the clients that it hears, and tells."""
        state = side.state(round)
        heard, left = _hear(side, state, exchange, round)
        _tell(side, side.learn(state, heard, round) if heard else state, exchange, round)
        return left


@METHODS.register("one_way", "the server tells and learns nothing: distillation of the LLM into the clients")
class OneWay(FedMKT):
    """What FedMKT is compared with: LLM -> SLM alone."""

    def server(self, side: Side, exchange: Exchange, round: int) -> Mapping[str, str]:
        """Tells."""
        _tell(side, side.state(round), exchange, round)
        return {}


@METHODS.register("standalone", "the clients practise and nobody hears of it")
class Standalone:
    """What all are compared with: as many epochs of private chats, and no message."""

    def client(self, side: Side, exchange: Exchange, round: int, last: bool) -> None:
        """Practises."""
        if not last:
            side.practise(side.state(round), round)

    def server(self, side: Side, exchange: Exchange, round: int) -> Mapping[str, str]:
        """Nothing."""
        return {}


@METHODS.register("fedavg", "adapters of clients of one shape, averaged by the server", needs=("first", "one_model"))
class FedAvg:
    """FedAvg (arXiv 1602.05629) of low-rank factors: θ = Σ_i n_i θ_i / Σ_i n_i, n_i private chats of client i."""

    def client(self, side: Side, exchange: Exchange, round: int, last: bool) -> None:
        """Takes in the adapter that the server has sent, practises, and sends its own."""
        told = exchange.read(round - 1, SERVER)
        if told is None or told.adapter is None:
            raise UserError(f"the server has sent no adapter in round {round - 1}; run its part again")
        state = side.receive(told.adapter, round)
        if not last:
            adapter, chats = side.practise(state, round).adapter, len(DistributionStore(side.folder / "private"))
            place = exchange.place(round, side.name)
            post(place, sender=side.name, round=round, adapter=adapter, trained_on=chats)

    def server(self, side: Side, exchange: Exchange, round: int) -> Mapping[str, str]:
        """Averages the adapters, lets the LLM and the small model learn from each other, and sends the adapter."""
        small, left = self.small(side, exchange), dict[str, str]()
        if round == 0:
            state = small.receive(None, round)
        else:
            before = exchange.read(round - 1, SERVER)
            assert before is not None and before.adapter is not None
            adapters, left = _adapters(exchange, round, before)
            state = small.receive(averaged(before, adapters, small.place(round, ""), small.terms), round)
            state = self.distil(side, small, state, round)
        post(exchange.place(round, SERVER), sender=SERVER, round=round, adapter=state.adapter)
        small.forget(round)
        return left

    def small(self, side: Side, exchange: Exchange) -> Side:
        """The clients' model as the server has it."""
        return replace(side, name="small", path=exchange.models[exchange.clients[0]], folder=side.folder / "small")

    def distil(self, side: Side, small: Side, state: State, round: int) -> State:
        """The small model after what the server does beside averaging: nothing."""
        return state


@METHODS.register(
    "fedcollm", "averaged adapters, and mutual distillation with the server's LLM", needs=("first", "one_model")
)
class FedCoLLM(FedAvg):
    """FedCoLLM (arXiv 2411.11707): FedAvg, and on the public chats L = CE + KL in both directions at the server."""

    def distil(self, side: Side, small: Side, state: State, round: int) -> State:
        """The LLM learns from the averaged model and the other way; the LLM's adapter stays."""
        large = side.state(round)
        stores = {"small": small.speak(state), SERVER: side.speak(large)}
        side.learn(large, {"small": stores["small"]}, round)
        return small.learn(state, {SERVER: stores[SERVER]}, round)


def _adapters(exchange: Exchange, round: int, like: Message) -> tuple[dict[str, Message], dict[str, str]]:
    """The adapters that fit what was sent, and the reasons of those that do not."""
    found, left, known = dict[str, Message](), dict[str, str](), shapes(like)
    for name in exchange.clients:
        try:
            if (message := exchange.read(round, name)) is not None:
                if shapes(message) != known:
                    raise UserError(f"{name} sends factors of other names or shapes than it was sent; {AGAIN}")
                found[name] = message
        except UserError as error:
            left[name] = str(error)
    return found, left


def _tell(side: Side, state: State, exchange: Exchange, round: int) -> None:
    store = DistributionStore(side.speak(state))
    post(exchange.place(round, side.name), sender=side.name, round=round, store=store)


def _hear(side: Side, state: State, exchange: Exchange, round: int) -> tuple[dict[str, Path], dict[str, str]]:
    """The stores of the clients that can be heard and aligned, and the reasons of the others that have sent one."""
    heard, left = dict[str, Path](), dict[str, str]()
    for name in exchange.clients:
        try:
            if (message := exchange.read(round, name)) is not None:
                store = side.hear(message, exchange.models[name], round)
                side.align(state, name, store, round)
                heard[name] = store
        except UserError as error:
            left[name] = str(error)
    return heard, left
