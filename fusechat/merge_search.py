"""Search for the merge of lowest held-out bits per byte: optuna over methods and their settings.

python -m fusechat.merge_search experiment=tiny search.trials=20
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from fusechat.app.command import entry, experiment_of, imported, plain, provenance
from fusechat.app.hints import task_overrides
from fusechat.app.places import writing

if TYPE_CHECKING:
    from fusechat.merging.recipe import Recipe

OWN = ("search.", "merge.", "merge=", "output_dir=", "overwrite=")  # overrides that are the search's, not its merges'


def run(cfg: DictConfig) -> float:
    """Tries merges; leaves the best in ``output_dir``, a table in ``search.folder``. Returns its bits per byte."""
    folder, output = Path(cfg.search.folder), Path(cfg.output_dir)
    reads = [plain(cfg.chat)["path"], cfg.pivot.path, plain(cfg.targets)]
    begun = lambda place: (place / "trials.jsonl").exists()
    with (
        writing(output, "merge", reads=reads),
        writing(folder, "merge_search", reads=reads, known=begun, holds=("merge",)),
    ):
        return _search(cfg, folder, output)


def _search(cfg: DictConfig, folder: Path, output: Path) -> float:
    from fusechat.merging.search import mean_bits, search, space_of
    from fusechat.models.devices import device_of

    space = space_of(plain(cfg.search.space), cfg.search.methods)
    score = partial(
        mean_bits,
        chats=held_out_chats(cfg),
        max_length=cfg.chat.max_length,
        dtype=cfg.pivot.dtype,
        trust_remote_code=cfg.pivot.trust_remote_code,
        device=device_of(cfg.search.device, "search.device"),
        device_map=cfg.search.device_map,
        batch_size=cfg.search.batch_size,
    )
    amount = {"trials": cfg.search.trials, "seed": cfg.seed, "overwrite": cfg.overwrite}
    return search(candidate, score, space, folder, output, **amount)


def held_out_chats(cfg: DictConfig) -> list[Any]:
    """The chats that training validated with: one's own, or those that it held out."""
    from fusechat.merging.search import held_out

    if cfg.validation.path is not None:
        return held_out(plain(cfg.validation)["path"], validation_fraction=1.0, split_seed=0)
    split = {"validation_fraction": cfg.data.validation_fraction, "split_seed": cfg.data.split_seed}
    chat = {key: plain(cfg.chat)[key] for key in ("path", "format", "split", "name", "limit", "streaming", "seed")}
    return held_out(chat.pop("path"), **split, **chat)


def candidate(method: str, settings: Mapping[str, Any]) -> tuple[Recipe, Mapping[str, Any]]:
    """The merge that ``merge.py`` would make with these settings; and its provenance."""
    from hydra import compose

    from fusechat.merging.recipe import Recipe

    given = [override for override in task_overrides() if not override.startswith(OWN)]
    own = [f"merge={method}", *(f"merge.{key}={value}" for key, value in settings.items())]
    cfg = compose("merge", [*given, *own])
    inputs = {"pivot": cfg.pivot.path, "targets": plain(cfg.targets), "target": cfg.target}
    train = f"python train.py {experiment_of(cfg)}"
    recipe = Recipe.of(plain(cfg.merge), **inputs, seed=cfg.seed, imports=imported(cfg), made_by=train)
    return recipe, provenance(cfg)


main = entry("merge_search")(run)
if __name__ == "__main__":
    main()
