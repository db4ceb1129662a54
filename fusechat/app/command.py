"""What every entry shares: the command line, errors for people, seed, logging, wandb, provenance. Nothing heavy at import."""

from __future__ import annotations

import difflib
import functools
import logging
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fusechat.app import registry
from fusechat.app.errors import UserError
from fusechat.app.trainer import quiet_trainer
from fusechat.app.trainer import seed_everything as seed_everything

CONF = str(registry.CONF)
LOG = logging.getLogger("fusechat")
Run = Callable[[DictConfig], Any]
FAILED = "FUSECHAT_FAILED"  # names a file of jobs begun and failed, shared with the processes of a sweep


def label(path: str | None) -> str:
    """A short name for a model: its folder and the one above, or the Hub id, joined by a dash."""
    return "-".join(Path(path).parts[-2:]) if path else "none"


OmegaConf.register_new_resolver("label", label, replace=True)
OmegaConf.register_new_resolver("stem", lambda path: Path(path).stem, replace=True)
OmegaConf.register_new_resolver("basename", lambda path: Path(path or "target").name, replace=True)


def entry(config_name: str) -> Callable[[Run], Callable[[], None]]:
    """Makes ``run(cfg)`` a command: ``main()`` composes the config, runs each job, and prints a mistake as one line."""

    def wrap(run: Run) -> Callable[[], None]:
        @functools.wraps(run)
        def job(cfg: DictConfig) -> Any:
            _note("")
            try:
                return run_stage(run, cfg)
            except Exception as error:
                overrides = " ".join(HydraConfig.get().overrides.task)
                _note(overrides or "(no overrides)")
                if isinstance(error, UserError):
                    LOG.error("%s%s", error, f"  [{overrides}]" if overrides else "")
                raise

        command = hydra.main(config_path=CONF, config_name=config_name, version_base="1.3")(job)
        return lambda: _command(command)

    return wrap


def _command(command: Callable[[], None]) -> None:
    traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # hydra then lets exceptions through, to be told here
    with tempfile.NamedTemporaryFile("r", prefix="fusechat-failed-") as noted:
        os.environ[FAILED] = noted.name
        try:
            command()
        except KeyboardInterrupt:
            print("interrupted; the same command goes on from what is whole", file=sys.stderr)
            sys.exit(130)
        except (UserError, HydraException, OmegaConfBaseException) as error:
            if traceback:
                raise
            failed = [line for line in noted.read().splitlines() if line]
            if not (failed and isinstance(error, UserError)):
                print(f"error: {_with_near_names(error)}", file=sys.stderr)
        else:
            lines = noted.read().splitlines()
            failed = [line for line in lines if line]
            if (
                (lines and not failed)
                or not {"-m", "--multirun"} & set(sys.argv)
                or {"--cfg", "-c", "--help", "--info", "-i"} & set(sys.argv)
            ):
                return
            if not lines:
                print(
                    "error: the sweep has no jobs: one of its choices is empty; see the overrides with commas or range()",
                    file=sys.stderr,
                )
        if failed:
            print(f"{len(failed)} job(s) failed: " + "; ".join(failed), file=sys.stderr)
    sys.exit(1)


def _note(line: str) -> None:
    """A job has begun (an empty line) or failed (its overrides)."""
    with open(os.environ.get(FAILED, os.devnull), "a") as file:
        file.write(line + "\n")


def _with_near_names(error: Exception) -> str:
    """The message of hydra's error, with the names that come near the unknown one."""
    text = str(error).strip()
    if key := re.search(r"Could not override '([\w./@]+)'|Key '[\w.]+' is not in struct\s+full_key: ([\w.]+)", text):
        name = str(key[1] or key[2])
        words = {p.stem for p in Path(CONF).rglob("*.yaml")} | set(re.findall(r"^ *(\w+):", _yaml_text(), re.M))
        near = difflib.get_close_matches(name.split(".")[-1], sorted(words), n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        if name.startswith("merge."):
            return f"the config has no key {name!r}; {_merge_keys()}"
        return f"the config has no key {name!r}{hint} (--cfg job shows the keys there are; +{name}=VALUE adds one)"
    if group := re.search(r"Could not find '([\w/]+)'", text):
        folder = Path(CONF) / Path(group[1]).parent
        near = difflib.get_close_matches(Path(group[1]).name, [p.stem for p in folder.glob("*.yaml")], n=3, cutoff=0.4)
        text = re.sub(r"\s*Config search path:.*", "", text, flags=re.DOTALL)
        return " ".join(text.split()) + (f"; did you mean {' or '.join(near)}?" if near else "")
    return text


def _merge_keys() -> str:
    """The keys that the merge method on the command line knows."""
    method = next((a.removeprefix("merge=") for a in sys.argv if a.startswith("merge=")), "varm")
    files = [Path(CONF) / "merge" / f"{name}.yaml" for name in (method, "common")]
    keys = [key for file in files if file.exists() for key in re.findall(r"^(\w+):", file.read_text(), re.M)]
    known = sorted(set(keys) - {"defaults", "method"})
    return f"merge={method} knows: {', '.join(known)}"


def _yaml_text() -> str:
    return "\n".join(path.read_text() for path in Path(CONF).rglob("*.yaml"))


def run_stage(run: Run, cfg: DictConfig) -> Any:
    """Runs one stage inside its session: seed before, loggers ended after, also when it fails."""
    with session(cfg):
        return run(cfg)


@contextmanager
def session(cfg: DictConfig) -> Iterator[None]:
    """Seeds every generator, keeps other libraries' chatter down, and ends an open wandb run whatever happens."""
    for name in ("httpx", "httpx2", "filelock", "fsspec", "datasets"):
        logging.getLogger(name).setLevel(logging.WARNING)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        yield
    finally:
        if "wandb" in sys.modules:
            import wandb

            if wandb.run is not None:
                wandb.finish()


def make_trainer(cfg: DictConfig, callbacks: list[Any], logger: Any = False, **overrides: Any) -> Any:
    """A Lightning Trainer from the ``trainer`` group; every key there is one of Trainer's own."""
    return quiet_trainer({**plain(cfg.trainer), **overrides}, callbacks, logger)


def provenance(cfg: DictConfig) -> dict[str, Any]:
    """How a result was made: resolved config, git state, versions, hardware. No environment variables: they hold secrets."""
    from importlib.metadata import version

    packages = ("torch", "transformers", "lightning", "datasets", "safetensors", "hydra-core", "wandb", "fusechat")
    return {
        "config": OmegaConf.to_container(cfg, resolve=True),
        "git": _git("rev-parse", "HEAD") + ("-dirty" if _git("status", "--porcelain") else ""),
        "versions": {name: version(name) for name in packages} | {"python": platform.python_version()},
        "hardware": {"machine": platform.machine(), "cores": os.cpu_count(), "system": platform.system()},
    }


def plain(node: Any) -> Any:
    """A config node as plain Python containers, resolved."""
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def experiment_of(cfg: DictConfig) -> str:
    """``experiment=...`` as the commands in error messages must have it: the config's file, and another name where one was given."""
    chosen = HydraConfig.get().runtime.choices.get("experiment") if HydraConfig.initialized() else cfg.experiment_name
    own = "" if chosen == cfg.experiment_name else f" experiment_name={cfg.experiment_name}"
    return f"experiment={chosen}{own}"


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()
