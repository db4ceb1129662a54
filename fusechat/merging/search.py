"""Search for the merge of lowest held-out bits per byte: optuna over methods and their settings."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusechat.app.errors import UserError, one_of
from fusechat.app.outputs import RECORD, read_json, replace, sealed_line, whole_lines, write_durably, write_json
from fusechat.app.progress import progress, spell
from fusechat.merging.recipe import Recipe
from fusechat.merging.run import make
from fusechat.stores.units import bits_per_byte

if TYPE_CHECKING:
    import torch

LOG = logging.getLogger(__name__)
COLUMN = "held-out bits per byte"
Candidate = Callable[[str, Mapping[str, Any]], tuple[Recipe, Mapping[str, Any]]]
Space = Mapping[str, Mapping[str, Sequence[Any]]]  # method -> setting -> values to choose from


def search(
    candidate: Candidate,
    score: Callable[[Path], float],
    space: Space,
    folder: Path,
    output_dir: Path,
    *,
    trials: int,
    seed: int,
    overwrite: bool = False,
) -> float:
    """Tries merges; leaves the best in ``output_dir`` and a table in ``folder``. Returns the lowest score.

    candidate: method and settings -> recipe, and what its ``fusechat.json`` is to hold. score: of a merged model,
    lower is better. The sampler is seeded and scores are kept, so that a search that was killed takes the same way.
    Raises `UserError` where optuna is missing.
    """
    try:
        import optuna
    except ImportError as error:
        raise UserError("a search needs optuna: pip install 'fusechat[sweep]'") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    known = Trials(score, folder, output_dir)
    known.check_output(overwrite)

    def objective(trial: Any) -> float:
        method = trial.suggest_categorical("method", list(space))
        chosen = {key: trial.suggest_categorical(f"{method}.{key}", values) for key, values in space[method].items()}
        recipe, record = candidate(method, chosen)
        return known.value(recipe, record, {"method": method, **chosen})

    study = optuna.create_study(direction="minimize", sampler=optuna.samplers.TPESampler(seed=seed))
    with progress("search", trials, "merges", bar=False) as tell:  # each merge shows its own
        study.optimize(objective, n_trials=trials, callbacks=[lambda study, _: tell(1, lambda: _best(study))])
    return known.table(tell.seconds)


def _best(study: Any) -> str:
    return f"best {study.best_value:.4f} bits per byte"


class Trials:
    """Merges, scores and remembers."""

    def __init__(self, score: Callable[[Path], float], folder: Path, output_dir: Path) -> None:
        self.score, self.folder, self.output = score, folder, output_dir
        self.file = folder / "trials.jsonl"
        self.done = whole_lines(self.file)
        if not (folder / RECORD).exists():
            write_json(folder / RECORD, {"stage": "merge_search"})

    def check_output(self, overwrite: bool) -> None:
        """Raises `UserError` where the output is the merge of somebody else, unless ``overwrite``."""
        record = read_json(self.output / RECORD) if (self.output / RECORD).exists() else {}
        ours = record.get("searched") or record.get("fingerprint") in [trial["fingerprint"] for trial in self.done]
        if record and not ours and not overwrite:
            hint = "add overwrite=true to replace it, or output_dir=DIR to keep both"
            raise UserError(f"{self.output} holds a merged model that no search has left there; {hint}")

    def value(self, recipe: Recipe, record: Mapping[str, Any], choice: Mapping[str, Any]) -> float:
        """The score of one merge; the model stays where it is the best so far. choice: what the table says of it."""
        known = next((trial[COLUMN] for trial in self.done if trial["fingerprint"] == recipe.mark), None)
        if known is not None:
            return float(known)
        place = self.folder / "candidate"
        make(recipe, place, overwrite=True, record={**record, "searched": True})
        value = self.score(place)
        if value < min((trial[COLUMN] for trial in self.done), default=math.inf):
            replace(self.output.resolve(), place)
        else:
            shutil.rmtree(place)
        self.done.append({COLUMN: value, **choice, "fingerprint": recipe.mark})
        with self.file.open("a") as file:
            file.write(sealed_line(self.done[-1]))
        LOG.info("%s: %.4f bits per byte", " ".join(f"{key}={value}" for key, value in choice.items()), value)
        return value

    def table(self, seconds: float) -> float:
        """Writes and prints the table; returns the lowest score. seconds: what the search took."""
        import pandas as pd

        from fusechat.report.results import markdown

        frame = pd.DataFrame(self.done).drop(columns="fingerprint").sort_values(COLUMN).round(5)
        write_durably(self.folder / "results.csv", frame.to_csv(index=False).encode())
        write_durably(self.folder / "results.md", markdown(frame).encode())
        print(markdown(frame))
        value, method = float(frame[COLUMN].iloc[0]), frame["method"].iloc[0]
        told = f"the best of {len(frame)} merge(s): {method}, {value:.4f} held-out bits per byte"
        LOG.info(f"{told}; in {spell(seconds)}, {self.output}")
        return value


def space_of(space: Space, methods: Sequence[str]) -> Space:
    """The part of a search space that belongs to ``methods``. Raises `UserError` for one it does not know."""
    for method in methods:
        one_of(method, tuple(space), "search.methods")
    return {method: space[method] for method in methods}


def held_out(path: str, *, validation_fraction: float, split_seed: int, **options: Any) -> list[Any]:
    """The chats that training held out. options: of `load_chats`. Raises `UserError` where it held out none."""
    from fusechat.chats.formats import in_validation, load_chats

    chats, _ = load_chats(path, **options)
    found = [row["messages"] for row in chats if in_validation(row["id"], validation_fraction, split_seed)]
    if not found:
        raise UserError(
            f"data.validation_fraction={validation_fraction} holds out no chat of {path}; "
            "a search needs some, e.g. 0.05"
        )
    return found


def mean_bits(
    path: Path,
    chats: Sequence[Any],
    *,
    max_length: int,
    dtype: str,
    device: torch.device,
    device_map: str | None,
    batch_size: int,
    trust_remote_code: bool = False,
) -> float:
    """Bits per byte of a model over all chats together, on ``device`` where no device_map spreads it."""
    from fusechat.chats.render import renderer_for
    from fusechat.evaluate import perplexity
    from fusechat.models.load import load_model, load_tokenizer

    tokenizer = load_tokenizer(str(path), trust_remote_code=trust_remote_code)
    renderer = renderer_for(tokenizer, tokenizer, "native", max_length)
    model = load_model(
        str(path), dtype=dtype, device_map=device_map, device=device, trust_remote_code=trust_remote_code
    )
    found = perplexity.score(model, renderer, chats, batch_size)
    return float(bits_per_byte(sum(f["nats"] for f in found), sum(f["bytes"] for f in found)))
