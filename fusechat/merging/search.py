"""Search for the merge of lowest held-out bits per byte: optuna over methods and their settings.

python -m fusechat.merge_search experiment=tiny search.trials=20
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from fusechat.app.command import plain
from fusechat.app.errors import UserError, one_of
from fusechat.app.outputs import whole_lines
from fusechat.stores.units import bits_per_byte

LOG = logging.getLogger(__name__)
COLUMN = "held-out bits per byte"


def run(cfg: DictConfig) -> float:
    """Tries ``search.trials`` merges; leaves the best in ``output_dir`` and the table in ``search.folder``. Returns its bits per byte."""
    try:
        import optuna
    except ImportError as error:
        raise UserError("a search needs optuna: pip install 'fusechat[sweep]'") from error
    space = plain(cfg.search.space)
    for method in cfg.search.methods:
        one_of(method, tuple(space), "search.methods")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    trials = Trials(cfg)

    def objective(trial: Any) -> float:
        method = trial.suggest_categorical("method", list(cfg.search.methods))
        chosen = {key: trial.suggest_categorical(f"{method}.{key}", values) for key, values in space[method].items()}
        return trials.value(method, chosen)

    study = optuna.create_study(direction="minimize", sampler=optuna.samplers.TPESampler(seed=cfg.seed))
    study.optimize(objective, n_trials=cfg.search.trials)
    return trials.finish()


class Trials:
    """Merges, scores and remembers. The sampler is seeded and values are remembered, so a search that was killed takes the same way."""

    def __init__(self, cfg: DictConfig) -> None:
        from hydra.core.hydra_config import HydraConfig

        self.cfg, self.folder, self.output = cfg, Path(cfg.search.folder), Path(cfg.output_dir)
        given = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
        self.given = [o for o in given if not o.startswith(("search.", "merge.", "merge=", "output_dir="))]
        self.chats = held_out(cfg)
        self.file = self.folder / "trials.jsonl"
        self.done = whole_lines(self.file)

    def value(self, method: str, settings: dict[str, Any]) -> float:
        """Held-out bits per byte of one merge; the model stays where it is the best so far."""
        from hydra import compose

        from fusechat.merging import run as merge_run

        overrides = [f"merge={method}", *(f"merge.{key}={value}" for key, value in settings.items())]
        place = self.folder / "candidate"
        plan = merge_run.plan(
            compose("merge", [*self.given, *overrides, f"output_dir={place}", "overwrite=true", "logger=none"])
        )
        known = next((t[COLUMN] for t in self.done if t["fingerprint"] == plan.mark), None)
        if known is not None:
            return float(known)
        plan.write(plan.merge())
        bits = self.score(place)
        best = min((t[COLUMN] for t in self.done), default=float("inf"))
        if bits < best:
            shutil.rmtree(self.output, ignore_errors=True)
            self.output.parent.mkdir(parents=True, exist_ok=True)
            place.rename(self.output)
        else:
            shutil.rmtree(place)
        self.done.append({COLUMN: bits, "method": method, **settings, "fingerprint": plan.mark})
        with self.file.open("a") as file:
            file.write(json.dumps(self.done[-1]) + "\n")
        LOG.info("%s: %.4f bits per byte", " ".join(overrides), bits)
        return bits

    def score(self, path: Path) -> float:
        """Bits per byte of the model on the held-out chats."""
        from fusechat.chats.render import renderer_for
        from fusechat.evaluate import perplexity
        from fusechat.models import load as models

        tokenizer = models.load_tokenizer(str(path))
        renderer = renderer_for(tokenizer, tokenizer, "native", self.cfg.chat.max_length)
        model = models.load_model(str(path), dtype=self.cfg.pivot.dtype, device_map=self.cfg.evaluation.device_map)
        found = perplexity.score(model, renderer, self.chats, self.cfg.search.batch_size)
        return float(bits_per_byte(sum(f["nats"] for f in found), sum(f["bytes"] for f in found)))

    def finish(self) -> float:
        """Writes and prints the table; returns the best value."""
        import pandas as pd

        from fusechat.report.results import markdown

        frame = pd.DataFrame(self.done).drop(columns="fingerprint").sort_values(COLUMN).round(5)
        frame.to_csv(self.folder / "results.csv", index=False)
        (self.folder / "results.md").write_text(markdown(frame))
        print(markdown(frame))
        LOG.info("the best of %d merges is in %s", len(frame), self.output)
        return float(frame[COLUMN].iloc[0])


def held_out(cfg: DictConfig) -> list[Any]:
    """The chats that training held out. Raises `UserError` where it held out none."""
    from fusechat.chats.formats import in_validation, load_chats

    reading = {key: cfg.chat[key] for key in ("format", "split", "name", "limit", "streaming")}
    chats, _ = load_chats(cfg.chat.path, **reading)
    fraction, seed = cfg.data.validation_fraction, cfg.data.split_seed
    found = [row["messages"] for row in chats if in_validation(row["id"], fraction, seed)]
    if not found:
        raise UserError(
            f"data.validation_fraction={fraction} holds out no chat of {cfg.chat.path}; a search needs some, e.g. 0.05"
        )
    return found
