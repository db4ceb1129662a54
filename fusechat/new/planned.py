"""What an experiment's outputs will take, from its own models and chats: for one that `fusechat new` has not made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusechat.app.errors import UserError

if TYPE_CHECKING:
    from fusechat.new.estimates import Expected, Work

Values = Mapping[str, Any]
PIVOT = "pivot"


@dataclass(frozen=True)
class Estimate:
    """outputs: as `Work.outputs` has them; unknown: what is not in them, and why."""

    outputs: Mapping[str, Expected]
    unknown: Sequence[str] = ()


def estimate(jobs: Sequence[tuple[str, Values]]) -> Estimate:
    """jobs: verb and config of each, as plain data. Models and chats are opened where they lie here; none is fetched.

    What cannot be read is not estimated, nor is what follows from it; nothing is raised for it.
    """
    chosen = next((values for verb, values in jobs if verb in ("extract", "train")), None)
    if chosen is None:
        return Estimate({}, ["nothing is extracted or trained"])
    paths = {PIVOT: str(chosen["pivot"]["path"])}
    paths |= {str(v["source"]["name"]): str(v["source"]["path"]) for verb, v in jobs if verb == "extract"}
    missing = {name: path for name, path in paths.items() if not Path(path).exists()}
    unknown = [f"{name}: {path} is not on this disk" for name, path in missing.items()]
    if PIVOT in missing:
        return Estimate({}, unknown)
    try:
        work = _work(jobs, chosen, {name: path for name, path in paths.items() if name not in missing})
    except (UserError, OSError) as error:
        return Estimate({}, [*unknown, " ".join(str(error).split())])
    if work.speed is None:
        unknown.append("times: the pivot's speed was not measured: it is no directory, or too large for this machine")
    return Estimate(work.outputs(), unknown)


def _work(jobs: Sequence[tuple[str, Values]], chosen: Values, paths: Mapping[str, str]) -> Work:
    from fusechat.new.starting import starting

    start = starting()  # before what it measures is imported
    from fusechat.chats.formats import load_chats
    from fusechat.chats.render import renderer_for
    from fusechat.models.load import load_tokenizer
    from fusechat.new.estimates import Work
    from fusechat.new.facts import facts_of, lengths_of
    from fusechat.new.work import sample_of, speed_here

    chat = chosen["chat"]
    _check_here(chat["path"], "chat.path")
    reading = {key: chat[key] for key in ("format", "split", "name", "limit", "seed")}
    rows = load_chats(chat["path"], **reading)[0].to_list()
    tokenizers = {name: load_tokenizer(path) for name, path in paths.items()}
    options = {key: chat[key] for key in ("max_length", "end_of_turn", "train_on")}
    renderers = {
        name: renderer_for(tokenizer, tokenizers[PIVOT], chat["template"], **options)
        for name, tokenizer in tokenizers.items()
    }
    sample = sample_of(rows)
    pivot, *sources = [facts_of(name, paths[name], tokenizer) for name, tokenizer in tokenizers.items()]
    return Work(
        pivot,
        sources,
        {name: lengths_of(renderer(sample)) for name, renderer in renderers.items()},
        len(rows),
        _tests(jobs),
        start,
        speed_here(pivot, renderers[PIVOT], rows),
        epochs=_epochs(jobs, len(rows)),
        k=_kept(jobs),
    )


def _epochs(jobs: Sequence[tuple[str, Values]], chats: int) -> float:
    """How often the first training sees every chat."""
    from fusechat.new.estimates import EPOCHS

    train = next((values for verb, values in jobs if verb == "train"), None)
    if train is None:
        return EPOCHS
    epochs, steps = train["trainer"]["max_epochs"] or EPOCHS, train["trainer"].get("max_steps") or -1
    limits = [float(epochs)] if epochs > 0 else []  # -1: steps alone end it
    return min([*limits, *([steps * train["data"]["global_batch"] / chats] if steps > 0 else [])], default=EPOCHS)


def _kept(jobs: Sequence[tuple[str, Values]]) -> int:
    """Tokens kept of each position, at most."""
    from fusechat.new.estimates import K

    return next((int(values["extract"].get("top_k") or K) for verb, values in jobs if verb == "extract"), K)


def _tests(jobs: Sequence[tuple[str, Values]]) -> int:
    """How many chats the first evaluation asks; 0 where it is of another kind."""
    from fusechat.chats.formats import load_chats

    asked = next((values["evaluation"] for verb, values in jobs if verb == "evaluate"), None)
    if asked is None or asked["kind"] != "chats":
        return 0
    _check_here(asked["chats"], "evaluation.chats")
    return len(load_chats(asked["chats"], split="test", limit=asked.get("limit"))[0])


def _check_here(given: Any, key: str) -> None:
    """Raises `UserError` for chats that lie elsewhere: a dry run fetches nothing."""
    from fusechat.chats.mixture import paths_of

    if away := [path for path in paths_of(given) if not Path(path).exists()]:
        raise UserError(f"{key}: {', '.join(away)} is not on this disk")
