"""Run one source over the chats and store its next-token distributions.

python -m fusechat.extract experiment=tiny source=a
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from fusechat.app.command import entry, imported, plain
from fusechat.app.places import writing
from fusechat.app.session import MISSING
from fusechat.app.tracking import log_made, wandb_run

LOG = logging.getLogger(__name__)


def run(cfg: DictConfig) -> None:
    """Extracts ``cfg.source`` over ``cfg.chat`` into ``output_dir``; goes on where an earlier run stopped."""
    from fusechat.stores.writer import is_store

    reads = [plain(cfg[section])["path"] for section in ("source", "chat", "pivot")]
    with writing(Path(cfg.output_dir), "extract", reads=reads, known=is_store):  # before the chats are read
        _extract(cfg)


def _extract(cfg: DictConfig) -> None:
    from fusechat.chats.formats import load_chats
    from fusechat.chats.mixture import paths_of
    from fusechat.extract import extract
    from fusechat.models.load import load_tokenizer
    from fusechat.stores.served.server import server_of

    source, chat, pivot = plain(cfg.source), plain(cfg.chat), None
    source["path"] = source["model"] if source["path"] == MISSING else source["path"]
    reading = {key: chat[key] for key in ("split", "name", "limit", "streaming", "format", "seed")}
    chats, found = load_chats(chat["path"], **reading)
    LOG.info("%s: %d chats (%s) from %s", source["name"], len(chats), found, ", ".join(paths_of(chat["path"])))
    _warn_of_tests(cfg, chats)
    if chat["template"] == "pivot":
        pivot = load_tokenizer(
            cfg.pivot.path, revision=cfg.pivot.revision, trust_remote_code=cfg.pivot.trust_remote_code
        )
    server = server_of(source, source["model"] or source["path"], "source")
    extract(
        source.pop("path"),
        chats,
        cfg.output_dir,
        **source,
        **plain(cfg.extract),
        **plain(cfg.store),
        **{key: chat[key] for key in ("template", "max_length", "end_of_turn", "train_on")},
        pivot=pivot,
        seed=cfg.seed,
        server=server,
        overwrite=cfg.overwrite,
        imports=imported(cfg),
        record={"chat": {key: chat[key] for key in ("path", "template", *reading)}},
        when_made=lambda manifest: _follow(cfg, manifest),
    )


def _warn_of_tests(cfg: DictConfig, chats: Any) -> None:
    """Says how many questions of the experiment's test chats are among the chats; Hub ids are not fetched for it."""
    from fusechat.chats.formats import load_chats
    from fusechat.chats.mixture import paths_of
    from fusechat.chats.overlap import shared_questions

    options = plain(cfg.evaluation)
    path = options.get("chats") or ""
    if options["kind"] != "chats" or not all(Path(each).is_file() for each in paths_of(path)):
        return
    tests, _ = load_chats(path, split=options["split"], limit=options["limit"], seed=options["chats_seed"])
    if count := shared_questions(chats["messages"], tests["messages"]):
        told = "%d of %d questions of evaluation.chats=%s are among the chats: what is measured on them is no test"
        LOG.warning(told, count, len(tests), ", ".join(paths_of(path)))


def _follow(cfg: DictConfig, manifest: dict[str, Any]) -> None:
    from fusechat.extract.summary import numbers

    if followed := wandb_run(cfg, f"extract-{cfg.source.name}"):
        followed.log({f"extract/{name}": value for name, value in numbers(manifest).items()})
        log_made(cfg, followed, ("distributions", Path(cfg.output_dir)), [])


main = entry("extract")(run)
if __name__ == "__main__":
    main()
