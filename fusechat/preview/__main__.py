"""Show rendered chats: what is trained on, in colour, and how a source's tokens meet the pivot's.

python -m fusechat.preview experiment=tiny source=a
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from fusechat.app.command import entry, plain
from fusechat.app.places import writing
from fusechat.app.session import MISSING

LOG = logging.getLogger(__name__)


def run(cfg: DictConfig) -> None:
    """Prints counts and the first chats, for the pivot and, where one is named, a source; and writes the page."""
    from fusechat.preview.colours import is_page

    if cfg.output_file is None:
        return _preview(cfg)
    reads = (plain(cfg.chat)["path"], *(node.path for node in _models(cfg).values()))
    with writing(Path(cfg.output_file), "preview", reads=reads, file=True, known=is_page):
        return _preview(cfg)


def _preview(cfg: DictConfig) -> None:
    from rich.console import Console

    from fusechat.chats.formats import load_chats
    from fusechat.chats.render import renderer_for
    from fusechat.models.load import load_tokenizer
    from fusechat.preview import colours
    from fusechat.preview.reading import lost, meeting, read, shares

    chat, count = plain(cfg.chat), cfg.preview.count
    limits = [limit for limit in (count, chat.pop("limit")) if limit is not None]
    reading = {key: chat[key] for key in ("split", "name", "streaming", "format", "seed")}
    chats, _ = load_chats(chat["path"], limit=min(limits, default=None), **reading)
    messages = [row["messages"] for row in chats]
    tokenizers: dict[str, Any] = {
        name: load_tokenizer(node.path, revision=node.revision, trust_remote_code=node.trust_remote_code)
        for name, node in _models(cfg).items()
    }
    pivot_tokenizer, keys = tokenizers["pivot"], ("max_length", "end_of_turn", "train_on")
    options = {key: chat[key] for key in keys}
    pivot, *sources = [
        read(name, renderer_for(tokenizer, pivot_tokenizer, chat["template"], **options), messages)
        for name, tokenizer in tokenizers.items()
    ]
    console = Console(record=cfg.output_file is not None)
    console.print(colours.numbers_table([pivot, *sources]))
    sequence = cfg.alignment.sequence
    kinds = {source.name: meeting(pivot, source, sequence) for source in sources}
    if kinds:
        console.print(colours.kinds_table({name: shares(found) for name, found in kinds.items()}, sequence))
        losses = {source.name: lost(pivot, source, kinds[source.name]) for source in sources}
        console.print(colours.lost_table(losses))
    for number in range(min(cfg.preview.show, len(messages))):
        for group in colours.one_chat([pivot, *sources], kinds, number):
            console.print(group)
    if cfg.output_file is not None:
        colours.write_page(console, Path(cfg.output_file))
        LOG.info("page: %s", cfg.output_file)


def _models(cfg: DictConfig) -> dict[str, DictConfig]:
    """The pivot, and the source that is named, if it is another."""
    source = plain(cfg.source)
    named = {} if MISSING in (source["name"], source["path"]) else {str(source["name"]): cfg.source}
    return {"pivot": cfg.pivot} | {name: node for name, node in named.items() if name != "pivot"}


main = entry("preview")(run)
if __name__ == "__main__":
    main()
