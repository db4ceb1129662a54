"""Whether what a job makes is there and fits, as far as configs and records tell: no model is opened for it.

A record lists what decided its output; what the job's config says by now is compared with that. What only opened chats
and tokenizers tell is not: where those have changed, a stage may refuse what is `done` here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusechat.app.failures import Failure
from fusechat.app.marks import PARTS, differing, flat
from fusechat.app.outputs import MANIFEST, read_json
from fusechat.app.states import State, state_of
from fusechat.app.texts import json_object
from fusechat.models.load import model_identity

OWN = ("fusion", "loss", "optimizer", "data", "lora", "trainer", "seed")
COMPARED = {  # verb -> name in the record: key of the config
    "tiny": {"seed": "seed"},
    "extract": {"extract": "extract", "store.logprobs": "store.logprobs", "dtype": "source.dtype"}
    | {"max_length": "chat.max_length", "end_of_turn": "chat.end_of_turn", "train_on": "chat.train_on"},
    "align": {"token_map": "token_map.name", "sequence": "alignment.sequence", "unmatched": "alignment.unmatched"}
    | {"logprobs": "store.logprobs"},
    "train": {name: name for name in OWN},
    "merge": {"merge": "merge", "seed": "seed"},
    "evaluate": {"evaluation": "evaluation", "seed": "seed"},
}
CHOICE = ("name", "split", "format", "limit", "seed")  # keys of chat that choose among a file's chats
CONFIG = "config.json"  # of a model
PLACES = {"evaluate": [("evaluation", "chats"), ("evaluation", "questions")]}  # where files lie decides nothing
Values = Mapping[str, Any]


@dataclass(frozen=True)
class Job:
    """What one job of a pipeline makes. values: its config as plain data; output: None where it writes nothing."""

    verb: str
    values: Values
    output: Path | None

    def state(self, failures: Mapping[str, Failure], remade: set[Path]) -> State:
        """The state of the output; one that is there and does not fit is stale. remade: outputs that are not done."""
        if self.output is None:
            return State("to do", "it writes no output")
        found = state_of(self.output, failures.get(str(self.output.resolve())))
        if found.kind == "done" and (why := self._stale(found.record or {}, remade)):
            return State("stale", why)
        return found

    @property
    def bytes(self) -> int | None:
        """What a target or a merged model is likely to take: the pivot's weights, in fp32. None: not known."""
        pivot = Path(self.values["pivot"]["path"]) if self.verb in ("train", "merge") else None
        if pivot is None or not (pivot / CONFIG).is_file():
            return None
        config, files = json_object(pivot / CONFIG), pivot.glob("*.safetensors")
        half = (config.get("dtype") or config.get("torch_dtype")) in ("float16", "bfloat16")
        return sum(file.stat().st_size for file in files) * (2 if half else 1) or None

    def _stale(self, record: Values, remade: set[Path]) -> str:
        there = flat(
            record.get(PARTS) or {name: record[name] for name in ("seed",) if name in record}
        )  # the tiny models'
        now = {name: value for name, value in flat(self._decides()).items() if name in there}
        there = {name: there[name] for name in now}
        if self.verb == "extract":
            there, now = (own | chosen for own, chosen in zip((there, now), self._chosen(record), strict=True))
        if found := differing(there, now):
            return found
        return next((f"{path} is not done" for path in self.reads if path.resolve() in remade), "")

    def _chosen(self, store: Values) -> tuple[dict[str, Any], dict[str, Any]]:
        """Which of their files' chats a store was made of, as asked for then and now, where that is another choice.

        A limit beyond all chats chooses none of them, and a seed decides of mixtures alone.
        """
        there, now, rows = store.get("chat", {}), self.values["chat"], sum(each["rows"] for each in store["shards"])
        keys = [key for key in CHOICE if key in there and there[key] != now[key]]
        if "parts" not in store:
            keys = [key for key in keys if key != "seed"]
        if (there.get("limit") or rows + 1) > rows <= (now["limit"] or rows):
            keys = [key for key in keys if key != "limit"]
        return {f"chat.{key}": there[key] for key in keys}, {f"chat.{key}": now[key] for key in keys}

    def _decides(self) -> dict[str, Any]:
        settings = {name: _at(self.values, key) for name, key in COMPARED.get(self.verb, {}).items()}
        for name, key in PLACES.get(self.verb, ()):
            settings[name] = {k: value for k, value in settings[name].items() if k != key}
        return settings | _identities(self.verb, self.values, self.reads)

    @property
    def reads(self) -> list[Path]:
        """The outputs of earlier jobs that this one reads."""
        values, experiment = self.values, Path(self.values["paths"]["experiment"])
        stores, aligned = experiment / "distributions", experiment / "aligned"
        if self.verb == "extract":
            return [Path(values["source"]["path"])]
        if self.verb == "align":
            return [stores / "pivot", stores / str(values["source"]["name"])]
        if self.verb == "train":
            sources = [] if values["fusion"]["rule"] == "sft" else values["sources"]
            return [stores / "pivot", *(aligned / str(name) for name in sources)]
        if self.verb == "merge":
            return [Path(path) for path in values["targets"]]
        if self.verb == "report":
            return sorted((experiment / "evaluation").glob("*.json"))
        return [Path(values["model"])] if self.verb == "evaluate" else []


def jobs_of(verb: str, values: Values) -> list[Job]:
    """A command as jobs with one output each: the tiny world is one for each of its models."""
    if verb == "tiny":
        world = Path(values["output_dir"]) / "models"
        return [Job(verb, values, world / name) for name in values["tiny"]["models"]]
    output = values.get("output_file") or values.get("output_dir")
    return [Job(verb, values, Path(output) if output else None)]


def _identities(verb: str, values: Values, reads: list[Path]) -> dict[str, Any]:
    """What records say of a job's inputs, as it is by now; nothing of inputs that are not there."""
    made = [_fingerprint(path) for path in reads]
    if verb == "align" and None not in made:
        return dict(zip(("pivot", "source"), made, strict=True))
    if verb == "train":
        stores = {} if None in made else {"stores": made}
        return stores | {"pivot": _identity(values["pivot"]["path"], values["pivot"]["revision"])}
    if verb == "merge" and all(path.is_dir() for path in reads):
        return {"inputs": [_identity(path) for path in (values["pivot"]["path"], *reads)]}
    if verb == "extract":
        return {"model": _identity(values["source"]["path"], values["source"]["revision"])}
    return {"model": _identity(values["model"])} if verb == "evaluate" and reads[0].exists() else {}


def _identity(path: str | Path, revision: str | None = None) -> str:
    return model_identity(str(path), revision)


def _fingerprint(store: Path) -> str | None:
    manifest = store / MANIFEST
    return str(read_json(manifest)["fingerprint"]) if manifest.is_file() else None


def _at(values: Values, key: str) -> Any:
    for part in key.split("."):
        values = values[part]
    return values
