"""What decides a target: the chats of a step, not the devices, micro-batches or memory savers that share its work."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusechat.app.errors import UserError
from fusechat.app.marks import SHARED_OUT, SHOWN, UNDECIDING
from fusechat.app.outputs import read_json, stage_fingerprint


def settings_fingerprint(imports: Mapping[str, str] | None, parts: Mapping[str, Any]) -> str:
    """`stage_fingerprint` of what decides a target. parts: name -> settings."""
    return stage_fingerprint(imports, **{name: _deciding(name, value) for name, value in parts.items()})


def earlier(
    record: Path, imports: Mapping[str, str] | None, parts: Mapping[str, Any], sections: Mapping[str, Any]
) -> str | None:
    """The fingerprint that a finished target of the same settings carries from an earlier version, if it has one.

    sections: ``fusion`` and ``loss`` as a whole, which were part of plain SFT's too: whatever they said there then.
    """
    held = read_json(record) if record.exists() else {}
    said = {name: {**whole, **(held.get("config") or {}).get(name, {})} for name, whole in sections.items()}
    then = {**parts, **{name: {**said[name], **parts[name]} for name in sections}}
    for each in (parts, then):
        if found := before_stopping(record, imports, each) or before_global_batch(record, imports, each):
            return found
    mark = settings_fingerprint(imports, then)
    return str(mark) if held.get("fingerprint") == mark else None


def before_global_batch(record: Path, imports: Mapping[str, str] | None, parts: Mapping[str, Any]) -> str | None:
    """The fingerprint that a finished target of the same settings carries from the time before ``data.global_batch``.

    Then a step had data.batch_size * trainer.accumulate_grad_batches chats on each device, and devices were not
    counted: a target says in its config how many there were. Raises `UserError` where there may have been several.
    None: there is no such target.
    """
    held = read_json(record) if record.exists() else {}
    config: Any = held.get("config") or {}
    data, trainer = config.get("data", {}), config.get("trainer", {})
    if "batch_size" not in data or "global_batch" in data or "accumulate_grad_batches" not in trainer:
        return None
    then = {name: value for name, value in trainer.items() if name not in SHARED_OUT - {"strategy"} | SHOWN}
    changes = {"data": data, "trainer": then, "gradient_checkpointing": config["gradient_checkpointing"]}
    if held["fingerprint"] != stage_fingerprint(imports, **{**parts, **changes}):
        return None
    chats, now = data["batch_size"] * trainer["accumulate_grad_batches"], parts["data"]["global_batch"]
    if trainer["devices"] != 1 or trainer["num_nodes"] != 1:
        raise UserError(
            f"{record.parent} does not say how many chats made a step: {chats} on each of trainer.devices="
            f"{trainer['devices']}; add overwrite=true to replace it, or run_name=NAME to keep both"
        )
    same = chats == now and all(
        _deciding(name, was).get(key, value) == value
        for name, was in (("data", data), ("trainer", trainer))
        for key, value in _deciding(name, parts[name]).items()
    )
    return str(held["fingerprint"]) if same else None


def before_stopping(record: Path, imports: Mapping[str, str] | None, parts: Mapping[str, Any]) -> str | None:
    """The fingerprint that a finished target carries from when early stopping was no part of it."""
    held, others = read_json(record) if record.exists() else {}, {**parts}
    told = (held.get("config") or {}).get("callbacks", {}).get("early_stopping")
    if told is None or others.pop("callbacks", None) != {"early_stopping": told}:
        return None
    return str(held["fingerprint"]) if held["fingerprint"] == settings_fingerprint(imports, others) else None


def _deciding(name: str, value: Any) -> Any:
    return {k: v for k, v in value.items() if k not in UNDECIDING[name]} if name in UNDECIDING else value
