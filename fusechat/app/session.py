"""What a stage runs inside: an end to wandb runs, the user's own modules, and the record of how a result was made.

Nothing here needs Hydra, and nothing heavy is imported before it is used.
"""

from __future__ import annotations

import logging
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fusechat.app.errors import UserError
from fusechat.app.progress import in_terminal
from fusechat.app.registry import import_modules

MISSING = "???"  # in a config: no value
STEPS = "pipeline.steps"
CHATTY = ("httpx", "httpx2", "filelock", "fsspec", "datasets", "alembic", "matplotlib")
PACKAGES = ("torch", "transformers", "lightning", "datasets", "safetensors", "hydra-core", "wandb", "fusechat")


@contextmanager
def session() -> Iterator[None]:
    """Keeps other libraries' chatter down, and ends an open wandb run whatever happens."""
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if not in_terminal():  # transformers heeds the first too, and unpacks GGUF files with tqdm's own
        for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
            os.environ.setdefault(name, "1")
    try:
        yield
    finally:
        if "wandb" in sys.modules:
            import wandb

            if wandb.run is not None:
                wandb.finish()


def log_to_stderr() -> None:
    """What is told goes to stderr, so that stdout holds results alone; Hydra's own handlers write to stdout."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stdout:
            handler.setStream(sys.stderr)


def plain(node: Any) -> Any:
    """A config node as plain Python containers, resolved; anything else as it is.

    What is missing, and what refers to something that is missing, is ``???``: a stage may never need it. A pipeline's
    steps stay as they are written: each refers to the config of its own command. Raises `UserError` for a reference
    to a key that is not there.
    """
    if "omegaconf" not in sys.modules:
        return node
    from omegaconf import DictConfig, ListConfig

    if not isinstance(node, (DictConfig, ListConfig)) or node._is_none():
        return None if isinstance(node, (DictConfig, ListConfig)) else node
    if isinstance(node, ListConfig):
        return [_value(node, i) for i in range(len(node))]
    return {key: _value(node, key) for key in node}


def _value(node: Any, key: Any) -> Any:
    from omegaconf import ListConfig, OmegaConf
    from omegaconf.errors import InterpolationToMissingValueError, MissingMandatoryValue, OmegaConfBaseException

    if isinstance(held := node._get_node(key), ListConfig) and node._get_full_key(key) == STEPS:
        return OmegaConf.to_container(held, resolve=False)
    try:
        return plain(node[key])
    except (InterpolationToMissingValueError, MissingMandatoryValue):
        return MISSING
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        hint = _members(node, reason) or "see the ${…} in it"
        raise UserError(f"{node._get_full_key(key)} cannot be resolved: {reason}; {hint}", code=2) from error


def _members(node: Any, reason: str) -> str:
    """What else there is where a reference names what is not: ``models has gemma, opt``."""
    from omegaconf import DictConfig, OmegaConf

    found = re.search(r"key '([\w.]+)\.[^.']+' not found", reason)
    there = OmegaConf.select(node._get_root(), found[1]) if found else None
    return f"{found[1]} has {', '.join(map(str, there))}" if found and isinstance(there, DictConfig) and there else ""


def provenance(cfg: Any) -> dict[str, Any]:
    """How a result was made: resolved config, git state, versions, hardware. No environment variables: secrets."""
    from importlib.metadata import version

    return {
        "config": plain(cfg),
        "git": _git("rev-parse", "HEAD") + ("-dirty" if _git("status", "--porcelain") else ""),
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "hardware": {"machine": platform.machine(), "cores": os.cpu_count(), "system": platform.system()},
    }


def imported(cfg: Any) -> dict[str, str]:
    """The user's own modules of ``imports=[…]``: name -> sha256 of its source, for `outputs.stage_fingerprint`."""
    return import_modules(list(cfg.get("imports") or []))


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()
