"""What error messages say to help: names that come near an unknown one, and the text of the command that mends it."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fusechat.app.registry import CONF
from fusechat.app.verbs import near

NO_NAME = "Config group override must be"  # how a ValueError of hydra's begins
SHARED = r"(pivot|chat|paths|format|experiment_name|seed)\b"  # overrides that all commands of an experiment share


def is_typed(error: BaseException) -> bool:
    """Whether an error is about what was typed: hydra's, whose composition has a plain one too."""
    return isinstance(error, (HydraException, OmegaConfBaseException)) or str(error).startswith(NO_NAME)


def with_near_names(error: BaseException, given: Sequence[str] | None = None) -> str:
    """The message of hydra's error, with the names that come near the unknown one. given: overrides; None: as typed."""
    text = str(error).strip()
    if key := re.search(r"Could not override '([\w./@]+)'|Key '[\w.]+' is not in struct\s+full_key: ([\w.]+)", text):
        name = str(key[1] or key[2])
        if name.startswith("merge."):
            return f"the config has no key {name!r}; {_merge_keys(name.partition('.')[2])}"
        if given := [text for text in sys.argv[1:] if text.startswith(f"{name}={{")]:
            return f"{name} has other keys than these; replace all of them with: '~{name}' '+{given[0]}'"
        files = list(CONF.rglob("*.yaml"))
        keys = re.findall(r"^ *(\w+):", "\n".join(file.read_text() for file in files), re.M)
        hint = near(name.split(".")[-1], sorted({file.stem for file in files} | set(keys)))
        return f"the config has no key {name!r}{hint} (--cfg job shows the keys there are; +{name}=VALUE adds one)"
    if re.search(r"Value 'auto' .*\bfull_key: hydra\.launcher\.", text, re.S):
        return (
            "a cluster's job asks for a number of devices, and auto is none: give e.g. trainer.devices=8 for a "
            "training, extract.trainer.devices=8 for an extraction"
        )
    if group := re.search(r"Could not find '([\w/-]+)'", text):
        return _not_found(text, Path(group[1]))
    if text.startswith(NO_NAME):
        return _no_name(sys.argv[1:] if given is None else given) or text
    if home := re.search(r"LexerNoViableAltException: (.*=)~(\S*)", text):
        return f"{home[1]}~{home[2]}: write the folder out, {home[1]}{Path.home()}{home[2]}; ~ is not taken here"
    return text


def _not_found(text: str, option: Path) -> str:
    """Hydra's message of an unknown option, with what comes near, or the folder here that a config of one's own has."""
    known = re.search(r"Available options in '[^']+':(.*?)(?:Config search path:|$)", text, re.S)
    text = " ".join(re.sub(r"\s*Config search path:.*", "", text, flags=re.DOTALL).split())
    if here := next(iter(sorted(Path().glob(f"*/{option}.yaml"))), None):
        return f"{text}; it is in {here}: add --config-dir {here.parents[len(option.parts) - 1]}"
    return text + near(option.name, known[1].split() if known else [], cutoff=0.4)


def _no_name(given: Sequence[str]) -> str | None:
    """What the first override says that gives a group a number or nothing."""
    for override in given:
        group, _, value = override.partition("=")
        if re.fullmatch(r"null|true|false|[\d.]*", value) and (names := _members(group)):
            return f"{override}: expected one of {', '.join(names)}; ~{group} leaves the group out"
    return None


def _members(group: str) -> list[str]:
    return sorted({file.stem for file in (CONF / group).glob("*.yaml")} - {"common"})


def _merge_keys(wanted: str) -> str:
    """The keys of the merge method on the command line; of several, the first of ours that does not know the wanted."""
    typed = next((a.removeprefix("merge=") for a in sys.argv if a.startswith("merge=")), "varm")
    known: dict[str, list[str]] = {}
    for method in typed.split(","):
        files = [CONF / "merge" / f"{name}.yaml" for name in (method, "common")]
        keys = [key for file in files if file.exists() for key in re.findall(r"^(\w+):", file.read_text(), re.M)]
        known[method] = sorted(set(keys) - {"defaults", "method"})
    ours = [method for method in known if (CONF / "merge" / f"{method}.yaml").exists() and wanted not in known[method]]
    method = next(iter(ours), typed.partition(",")[0])
    return f"merge={method} knows: {', '.join(known[method])}"


def task_overrides() -> list[str]:
    """The overrides of this job as they were typed: what looks like an interpolation in one is left alone."""
    if not HydraConfig.initialized():
        return []
    task: Any = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
    return list(task)


def config_folders() -> list[Path]:
    """The folders given by ``--config-dir``, in every process that runs a job."""
    if not HydraConfig.initialized():
        return []
    sources = HydraConfig.get().runtime.config_sources
    return [Path(source.path) for source in sources if source.provider == "command-line"]


def experiment_of(cfg: Any) -> str:
    """What makes a command in a message about this experiment: ``experiment=…`` or what stands for it, and folders.

    Without an experiment's file that is what was typed of the pivot, the chats, the paths and the name.
    """
    folders = "".join(f" --config-dir {folder}" for folder in config_folders())
    if not HydraConfig.initialized():
        return f"experiment={cfg.experiment_name}{folders}"
    chosen = HydraConfig.get().runtime.choices.get("experiment")
    if chosen is None:
        return " ".join(typed for typed in task_overrides() if re.match(SHARED, typed)) + folders
    own = "" if chosen == cfg.experiment_name else f" experiment_name={cfg.experiment_name}"
    return f"experiment={chosen}{own}{folders}"
