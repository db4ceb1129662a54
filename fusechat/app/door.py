"""The door of every command: its whole config, and what it finds around it, are checked before any work."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fusechat.app import needs, registry, settings
from fusechat.app.errors import UserError
from fusechat.app.session import MISSING, plain
from fusechat.app.surroundings import check_card, check_devices, check_place, check_writable
from fusechat.app.tracking import check_account

MODELS = {
    "extract": ("source.path",),
    "train": ("pivot.path",),
    "mutual": ("pivot.path",),
    "evaluate": ("model",),
}  # verb -> keys of models
TRAINS = ("tiny", "extract", "train", "mutual")  # verbs that run Lightning's Trainer


def check_config(cfg: Any, folders: Sequence[Path] = ()) -> dict[str, Any]:
    """Raises `UserError` for a config that its command (``cfg.stage``) cannot follow, whatever lies on the disk.

    folders: config folders beside ours. Where ``imports`` bring members of families, names and keys of these are left
    to them. Returns the values by dotted key, those that are missing left out.
    """
    tree = _given(plain(cfg))
    values, own_members = dict(_flat(tree)), bool(tree.get("imports"))
    settings.check_config(tree, own_members)
    registry.check_choices({key: values.get(key) for key in registry.GROUPS}, folders, own_members)
    if values["stage"] == "merge_search":
        _check_space(tree["search"])
    needs.check(values["stage"], values)
    return values


def check_surroundings(values: Mapping[str, Any]) -> None:
    """Raises `UserError` where models, devices or an account are not there, or the output cannot be written."""
    verb = values["stage"]
    models = [*MODELS.get(verb, ())]
    models += ["pivot.path"] if verb == "extract" and values.get("chat.template") == "pivot" else []
    for key in models:
        check_place(str(values.get(key) or values["source.model"]), key if key in values else "source.model")
    section = "extract.trainer" if "extract.trainer" in values and verb == "extract" else "trainer"
    if verb in TRAINS:
        check_devices(section, values.get(f"{section}.accelerator"), values.get(f"{section}.devices"))
    for key in needs.on_a_card(verb, values):
        check_card(key, values[key])
    if needs.is_online(values):
        check_account()
    for key in ("output_dir", "output_file"):
        if values.get(key):
            check_writable(key, Path(values[key]))


def _check_space(search: Mapping[str, Any]) -> None:
    """Raises `UserError` where a search would try settings that no merge takes."""
    chosen = {method: search["space"].get(method, {}) for method in search["methods"]}
    for method, key, value in ((m, key, v) for m, keys in chosen.items() for key, vs in keys.items() for v in vs):
        for fault in settings.faults({"merge": {key: value}}):
            raise UserError(f"search.space.{method}.{key}: {fault}")


def _given(tree: Any) -> Any:
    """A tree without the keys whose value is missing."""
    if isinstance(tree, Mapping):
        return {key: _given(value) for key, value in tree.items() if value != MISSING}
    return tree


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key, sections' own too, dotted."""
    for key, value in tree.items():
        yield prefix + str(key), value
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
