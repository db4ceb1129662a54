"""Teach each other: a server's LLM and clients' models, by what they say of public chats or by adapters.

python -m fusechat.mutual experiment=fedmkt_tiny
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from fusechat.app.children import QUIET, ended, passed_on, run_child
from fusechat.app.command import CONF, entry, imported, plain
from fusechat.app.errors import UserError

if TYPE_CHECKING:
    from fusechat.mutual.federation import Federation
    from fusechat.mutual.rounds import Start

UNHEEDED = ("pivot.attn_implementation", "pivot.load_in", "pivot.revision", "pivot.trust_remote_code", "lora.adapter")
WHY = "all sides load their models alike, in fp32, and go on from their own adapters"


def run(cfg: DictConfig) -> None:
    """All rounds, each part in a process of its own; or, where a side is named, its part of one round."""
    from fusechat.mutual import mutual

    federation = federation_of(cfg)
    if cfg.mutual.side is not None and cfg.mutual.round is not None:
        return federation.part(str(cfg.mutual.side), cfg.mutual.round)
    own, options = passed_on("mutual.side", "mutual.round")
    mutual(federation, part_of([*options, *own], cfg.mutual.timeout), overwrite=cfg.overwrite)
    return None


def part_of(given: Sequence[str], timeout: float | None) -> Start:
    """Runs parts, each as this command in a process of its own. given: its arguments; timeout: minutes of a client's.

    What it returns raises `TimeoutError` for a client that is late, `UserError` for a part that has failed.
    """

    def start(side: str, round: int) -> None:
        own = [f"mutual.side={side}", f"mutual.round={round}", *QUIET]
        limit = 60 * timeout if timeout and side != "server" else None
        try:
            code = run_child([sys.executable, "-m", "fusechat.mutual", *given, *own], limit)
        except TimeoutError:
            raise TimeoutError(f"its part took more than mutual.timeout={timeout} minutes") from None
        if code:
            raise UserError(f"the part of {side} in round {round} {ended(code)}")

    return start


def composed(overrides: Sequence[str]) -> DictConfig:
    """The config of this command with these overrides, for who is started otherwise."""
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg: DictConfig = compose("mutual", list(overrides))
    return cfg


def federation_of(cfg: DictConfig) -> Federation:
    """config -> objects."""
    from fusechat.fusion import Callbacks, Data, FusionLoss, FusionRule, Optimizer
    from fusechat.merging.recipe import COMMON, NO_SETTINGS
    from fusechat.mutual.federation import Client, Federation
    from fusechat.mutual.sides import Terms

    for key in UNHEEDED:
        if value := OmegaConf.select(cfg, key):
            raise UserError(f"{key}={value} is not heeded by mutual: {WHY}; leave it out")
    merge = {key: value for key, value in plain(cfg.merge).items() if key not in (*COMMON, *NO_SETTINGS)}
    chat, alignment, store = plain(cfg.chat), plain(cfg.alignment), plain(cfg.store)
    extraction: dict[str, Any] = {**plain(cfg.extract), **store, "dtype": cfg.pivot.dtype}
    terms = Terms(
        chat.pop("path"),
        cfg.pivot.path,
        {key: chat.pop(key) for key in ("template", "max_length", "end_of_turn", "train_on")},
        FusionRule(**plain(cfg.fusion)),
        FusionLoss(**plain(cfg.loss)),
        reading=chat,
        extraction=extraction,
        alignment={**alignment, **store, "token_map": cfg.token_map.name},
        optimizer=Optimizer.of(plain(cfg.optimizer)),
        data=Data(**plain(cfg.data)),
        callbacks=Callbacks(**plain(cfg.callbacks)),
        lora=plain(cfg.lora),
        average=cfg.merge.method,
        average_settings=merge,
        trainer=plain(cfg.trainer),
        epochs=cfg.mutual.epochs,
        validation=plain(cfg.validation)["path"],
        seed=cfg.seed,
        imports=imported(cfg),
    )
    clients = {str(name): Client(**client) for name, client in plain(cfg.mutual.clients).items()}
    where = Path(cfg.output_dir)
    return Federation(cfg.mutual.method, cfg.pivot.path, clients, where, terms, cfg.mutual.rounds)


main = entry("mutual")(run)
if __name__ == "__main__":
    main()
