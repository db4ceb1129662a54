"""Names of what a sweep's jobs make: each holds the overrides in which the jobs differ, so that no two share one.

A command without a sweep names its output as the config does (targets/a): later commands look for it there.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fusechat.app.marks import UNDECIDING

SWEPT = "FUSECHAT_SWEPT"  # environment variable: keys that a sweep varies, shared with the processes of its jobs
LONGEST = 80  # characters of a name that overrides may take
_told: ContextVar[Sequence[str]] = ContextVar("told", default=())  # what a sweep that is to come will vary
WHOLLY = {"paths", "logger", "hydra", "sweep", "output_dir", "output_file", "run_name", "ckpt_path", "overwrite"}
WHOLLY |= {"wait", "verify", "accept_changes", "gradient_checkpointing"}


def label(path: str | None) -> str:
    """A short name for a model: its folder and the one above, or the Hub id, joined by a dash."""
    return "-".join(Path(path).parts[-2:]) if path else "none"


def swept(arguments: Sequence[str]) -> list[str]:
    """The keys that a multirun's arguments give several values."""
    if not {"-m", "--multirun"} & set(arguments):
        return []
    found, parser = [], OverridesParser.create()
    for text in (text for text in arguments if "=" in text and not text.startswith("-")):
        try:
            (override,) = parser.parse_overrides([text])
        except HydraException:  # Hydra tells
            continue
        found += [override.key_or_group] if override.is_sweep_override() else []
    return found


def named(base: Any, *, _root_: Any) -> str:
    """The resolver ``${named:BASE}``: BASE, and in a sweep what this job's overrides add to it.

    Left out is what decides no output, what BASE says already (``source=a`` of a), and what the experiment's folder
    says (a seed). Overrides that are long, or have characters that no file name should, are followed by a hash.
    """
    given = [(key, value) for key, value in _varied() if _tells(key, value, str(base), _root_)]
    keys = [key for key, _ in given]
    leaves = [key.split(".")[-1] for key in keys]
    shown = [leaf if leaves.count(leaf) == 1 else key for key, leaf in zip(keys, leaves, strict=True)]
    texts = [f"{name}_{value}" for name, (_, value) in zip(shown, given, strict=True)]
    plain = "_".join(re.sub(r"[^\w.-]+", "-", text).strip("-") for text in texts)
    if plain != "_".join(texts) or len(plain) > LONGEST:
        plain = f"{plain[:LONGEST]}_{hashlib.sha256(json.dumps(given).encode()).hexdigest()[:8]}"
    return f"{base}_{plain}" if plain else str(base)


def decides(key: str) -> bool:
    """Whether a key of the config may decide what a stage makes."""
    section, _, rest = key.partition(".")
    return section not in WHOLLY and rest.partition(".")[0] not in UNDECIDING.get(section, ())


def named_as_in_a_sweep(config: Any, overrides: Sequence[str]) -> None:
    """Names in a config what a job's sweep will call it, before there is a sweep. overrides: those it varies."""
    token = _told.set(overrides)
    try:
        _resolve_names(config)
    finally:
        _told.reset(token)


def _resolve_names(config: Any) -> None:
    for key in config:
        node = config._get_node(key)
        if isinstance(node, DictConfig):
            _resolve_names(node)
        elif isinstance(node._value(), str) and "${named:" in node._value():
            with suppress(OmegaConfBaseException):  # a value is missing: the stage tells
                config[key] = config[key]


def _varied() -> Iterator[tuple[str, str]]:
    """Key and value of this job's overrides that its sweep varies."""
    for override in _told.get():
        key, _, value = override.lstrip("+").partition("=")
        yield key, value.strip("'\"")
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return
    hydra: Any = HydraConfig.get()
    keys = {*json.loads(os.environ.get(SWEPT, "[]")), *(hydra.sweeper.get("params") or {})}
    for override in hydra.overrides.task:
        key, _, value = str(override).lstrip("+").partition("=")
        if key in keys:
            yield key, value.strip("'\"")


def _tells(key: str, value: str, base: str, root: Any) -> bool:
    folder = OmegaConf.to_container(root.paths, resolve=False)["experiment"]  # type: ignore[index,call-overload]
    if not decides(key) or f"${{{key}}}" in folder:
        return False
    if key == "experiment":
        return value not in Path(root.paths.experiment).parts
    value = str(OmegaConf.select(root, key)) if "$" in value else value  # what an interpolation stands for
    said = (f"_{form}_" in f"_{base}_" for form in (value, Path(value).name, label(value)))
    return not (re.search("[a-z]", value, re.I) and any(said))
