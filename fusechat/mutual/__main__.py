"""Teach each other: a server's LLM and clients' models, by what they say of public chats or by adapters.

python -m fusechat.mutual experiment=fedmkt_tiny
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from fusechat.app.children import QUIET, ended, passed_on, run_child
from fusechat.app.command import entry, imported, plain
from fusechat.app.errors import UserError

if TYPE_CHECKING:
    from fusechat.mutual.rounds import Federation


def run(cfg: DictConfig) -> None:
    """All rounds, each part in a process of its own; or, where a side is named, its part of one round."""
    from fusechat.mutual import mutual
    from fusechat.mutual.methods import SERVER

    federation = federation_of(cfg)
    if cfg.mutual.side is not None:
        return federation.part(str(cfg.mutual.side), cfg.mutual.round)
    own, options = passed_on("mutual.side", "mutual.round")
    timeout = cfg.mutual.timeout and 60 * cfg.mutual.timeout

    def start(side: str, round: int) -> None:
        given = [*own, f"mutual.side={side}", f"mutual.round={round}"]
        command = [sys.executable, "-m", "fusechat.mutual", *given, *QUIET, *options]
        try:
            code = run_child(command, timeout if side != SERVER else None)
        except TimeoutError:
            raise TimeoutError(f"its part took more than mutual.timeout={cfg.mutual.timeout} minutes") from None
        if code:
            raise UserError(f"the part of {side} in round {round} {ended(code)}")

    mutual(federation, start, overwrite=cfg.overwrite)
    return None


def federation_of(cfg: DictConfig) -> Federation:
    """config -> objects."""
    from fusechat.fusion import Callbacks, Data, FusionLoss, FusionRule, Optimizer
    from fusechat.merging.recipe import COMMON, NO_SETTINGS
    from fusechat.mutual.rounds import Client, Federation
    from fusechat.mutual.sides import Terms

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
        validation=cfg.validation.path,
        seed=cfg.seed,
        imports=imported(cfg),
    )
    clients = {str(name): Client(**client) for name, client in plain(cfg.mutual.clients).items()}
    where = Path(cfg.output_dir)
    return Federation(cfg.mutual.method, cfg.pivot.path, clients, where, terms, cfg.mutual.rounds)


main = entry("mutual")(run)
if __name__ == "__main__":
    main()
