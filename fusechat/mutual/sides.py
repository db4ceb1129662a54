"""A side of a mutual training, server or client: its model over the rounds, and what it does with chats and messages.

Everything a side makes lies in a folder of its own, each output with its fingerprint: what a kill leaves whole is not
made again. A side reads its own folder, the public chats and messages, and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from fusechat.align import align
from fusechat.app.errors import UserError
from fusechat.app.outputs import RECORD, fingerprint, settled, stamp, whole_directory
from fusechat.app.trainer import seed_everything
from fusechat.chats.formats import load_chats
from fusechat.chats.mixture import Given
from fusechat.extract import extract
from fusechat.fusion import Callbacks, Data, FusionLoss, FusionRule, Optimizer, train
from fusechat.fusion.adapters import export
from fusechat.fusion.run import LORA
from fusechat.fusion.training import ADAPTER
from fusechat.models.load import load_tokenizer, model_identity, tokenizer_identity
from fusechat.models.whole import ADAPTER_WEIGHTS, write_record
from fusechat.mutual.hearing import Heard
from fusechat.mutual.messages import AGAIN, Message
from fusechat.stores.store import DistributionStore

LEARNED, PRACTISED, RECEIVED = "learned", "practised", "received"  # states of a model, by what came last
STAGES = (RECEIVED, LEARNED, PRACTISED)  # in the order of a round
MERGED = "*.safetensors*"  # files of a model's weights, in one piece or several


@dataclass(frozen=True)
class Terms:
    """What all sides agree on.

    public: the chats that all know, as ``chat.path``, reading: options of `load_chats`; host: the model whose chat
    template ``template="pivot"`` names. chat: template, max_length, end_of_turn, train_on. extraction: options of
    `extract`, alignment: of `align`. rule and loss: of learning from others; epochs: of private chats in a round,
    trainer's max_epochs is of the public ones. lora: without ``enabled``. average: the method of
    `fusechat.merging.METHODS` by which adapters are averaged, with its settings. seed: with the round's number it
    decides each training.
    """

    public: Given
    host: str
    chat: Mapping[str, Any]
    rule: FusionRule
    loss: FusionLoss
    reading: Mapping[str, Any] = field(default_factory=dict)
    extraction: Mapping[str, Any] = field(default_factory=dict)
    alignment: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Optimizer = field(default_factory=Optimizer)
    data: Data = field(default_factory=Data)
    callbacks: Callbacks = field(default_factory=Callbacks)
    lora: Mapping[str, Any] = field(default_factory=dict)
    average: str = "linear"
    average_settings: Mapping[str, Any] = field(default_factory=dict)
    trainer: Mapping[str, Any] = field(default_factory=dict)
    epochs: int = 1
    validation: str | None = None
    seed: int = 0
    imports: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def chats(self) -> Any:
        """The public chats, a `datasets.Dataset`."""
        return load_chats(self.public, **self.reading)[0]


@dataclass(frozen=True)
class State:
    """A side's model at some point: a directory (of the base: or a Hub id), and its adapter, which the base has not."""

    model: str
    adapter: Path | None = None

    @property
    def has_weights(self) -> bool:
        """Whether its merged weights are there still; its adapter always is."""
        return any(Path(self.model).glob(MERGED))

    @property
    def name(self) -> str:
        """Its place in the side's folder."""
        return "base" if self.adapter is None else "-".join(Path(self.model).parts[-2:])


@dataclass(frozen=True)
class Side:
    """name; path: its base model; folder: all that it makes. private: its own chats; None: it has none."""

    name: str
    path: str
    folder: Path
    terms: Terms
    private: Given | None = None

    def place(self, round: int, stage: str) -> Path:
        """Where a round's outputs lie."""
        return self.folder / f"round-{round:02d}" / stage

    def state(self, before: int) -> State:
        """The model as the last rounds before ``before`` have left it."""
        found = [self.at(round, stage) for round in range(before) for stage in STAGES]
        return next((state for state in reversed(found) if state), State(self.path))

    def at(self, round: int, stage: str) -> State | None:
        """The model that a stage of a round has made; None where it has not."""
        place = self.place(round, stage)
        return State(str(place), place / ADAPTER) if (place / RECORD).exists() else None

    def forget(self, round: int) -> None:
        """Removes the merged weights of rounds before ``round``, if that has made a model; they can be `restore`d."""
        if not any(self.at(round, stage) for stage in STAGES):
            return
        for file in (
            file for before in range(round) for stage in STAGES for file in self.place(before, stage).glob(MERGED)
        ):
            file.unlink()

    def restore(self, state: State, directory: Path) -> None:
        """Writes the model of a state anew, from its base and adapter."""
        assert state.adapter is not None
        export(self.path, {**LORA, **self.terms.lora}, load_file(state.adapter / ADAPTER_WEIGHTS), directory)

    def practise(self, state: State, round: int) -> State:
        """Trains on the private chats, L_SFT alone."""
        options = {"kind": "top_k", "top_k": 1}  # what is read of this store are its tokens
        store = self._extract(self.path, self.private, self.folder / "private", options)
        return self._train(state, store, {}, round, PRACTISED, FusionRule("sft"), self.terms.epochs)

    def receive(self, adapter: Mapping[str, Any] | None, round: int) -> State:
        """The base with an adapter that was sent, or averaged; None: as adapters begin. Raises `UserError`."""
        place, lora = self.place(round, RECEIVED), {**LORA, **self.terms.lora}
        content = None if adapter is None else {name: tensor.numpy().tobytes() for name, tensor in adapter.items()}
        told = content and sha256(b"".join(name.encode() + content[name] for name in sorted(content))).hexdigest()
        mark = fingerprint(base=model_identity(self.path), adapter=told, lora=dict(lora), seed=self.terms.seed)
        if settled(place / RECORD, mark, what="model", keep="output_dir=DIR") is None:
            seed_everything(self.terms.seed)
            with whole_directory(place, overwrite=True) as directory:
                export(self.path, lora, adapter, directory)
                write_record(directory, {**stamp(mark), "stage": "mutual", "name": self.name})
        return State(str(place), place / ADAPTER)

    def speak(self, state: State) -> Path:
        """The store of what the model says of the public chats."""
        return self._extract(state.model, self.terms.chats, self.folder / "public" / state.name, self.terms.extraction)

    def hear(self, message: Message, model: str, round: int) -> Path:
        """The store of what a sender says of them, read with the tokenizer of its base ``model``.

        Raises `UserError` for a message without knowledge, of other chats or of another vocabulary.
        """
        sender, chats = message.envelope.sender, self.terms.chats
        if message.knowledge is None:
            raise UserError(f"{sender} tells nothing of the public chats; {AGAIN}")
        known = tokenizer_identity(load_tokenizer(model))
        if message.envelope.tokenizer != known:
            told = f"{sender} tells of another vocabulary ({message.envelope.tokenizer}) than {model} has ({known})"
            raise UserError(f"{told}; {AGAIN}")
        options = {**self.terms.extraction, "rows_per_shard": len(chats)}
        store = self._extract(model, chats, self.place(round, f"heard/{sender}"), options, Heard(message))
        if message.envelope.chats != DistributionStore(store).manifest["chats"]:
            raise UserError(f"{sender} tells of other public chats than {self.terms.public}; {AGAIN}")
        return store

    def learn(self, state: State, others: Mapping[str, Path], round: int) -> State:
        """Trains on the public chats, L = λ L_SFT + (1 − λ) L_Fusion, with what others say of them.

        others: name -> store. The model's own distributions say where it knows better.
        """
        own = self.speak(state)
        aligned = {name: self.align(state, name, store, round) for name, store in others.items()}
        return self._train(state, own, aligned, round, LEARNED, self.terms.rule, None)

    def align(self, state: State, name: str, store: Path, round: int) -> Path:
        """What another says, brought onto this side's tokens."""
        place = self.place(round, f"aligned/{name}")
        align(self.speak(state), store, place, imports=self.terms.imports, **self.terms.alignment)
        return place

    def _extract(
        self, model: str, chats: Any, output: Path, options: Mapping[str, Any], told: Heard | None = None
    ) -> Path:
        host = self.terms.host if self.terms.chat.get("template") == "pivot" else None
        more: dict[str, Any] = {**self.terms.chat, **options, "seed": self.terms.seed, "imports": self.terms.imports}
        name = told.message.envelope.sender if told else self.name
        extract(model, chats, output, name=name, pivot=host, told=told, **more)
        return output

    def _train(
        self,
        state: State,
        store: Path,
        aligned: Mapping[str, Path],
        round: int,
        stage: str,
        rule: FusionRule,
        epochs: int | None,
    ) -> State:
        terms, place = self.terms, self.place(round, stage)
        lora = {**terms.lora, "enabled": True, "adapter": state.adapter and str(state.adapter)}
        train(
            self.path,
            store,
            aligned,
            place,
            rule=rule,
            loss=terms.loss,
            optimizer=terms.optimizer,
            data=replace(terms.data, shuffle_seed=terms.seed + round),
            callbacks=terms.callbacks,
            lora=lora,
            trainer={**terms.trainer, **({"max_epochs": epochs} if epochs else {})},
            max_length=terms.chat.get("max_length", 2048),
            validation=terms.validation,
            seed=terms.seed + round,
            imports=terms.imports,
        )
        made = self.at(round, stage)
        assert made is not None
        return made
