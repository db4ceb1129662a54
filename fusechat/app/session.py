"""What a stage runs inside: an end to wandb runs, the user's own modules, and the record of how a result was made.

Nothing here needs Hydra, and nothing heavy is imported before it is used.
"""

from __future__ import annotations

import logging
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fusechat.app.registry import import_modules

WHOLE = "the same command goes on from what is whole"
CHATTY = ("httpx", "httpx2", "filelock", "fsspec", "datasets")
PACKAGES = ("torch", "transformers", "lightning", "datasets", "safetensors", "hydra-core", "wandb", "fusechat")


class Ended(SystemExit):
    """SIGTERM has come. kept: what is kept and how to go on, where a stage has more to say than `WHOLE`."""

    def __init__(self, kept: str = "") -> None:
        super().__init__(128 + signal.SIGTERM)
        self.kept = kept


def end_on_signals() -> None:
    """SIGTERM ends this process as an exception, so that locks and temporary files go."""

    def end(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once: what follows is to end undisturbed
        raise Ended

    signal.signal(signal.SIGTERM, end)


@contextmanager
def session() -> Iterator[None]:
    """Keeps other libraries' chatter down, and ends an open wandb run whatever happens."""
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        yield
    finally:
        if "wandb" in sys.modules:
            import wandb

            if wandb.run is not None:
                wandb.finish()


def plain(node: Any) -> Any:
    """A config node as plain Python containers, resolved; anything else as it is."""
    if "omegaconf" not in sys.modules:
        return node
    from omegaconf import OmegaConf

    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


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
