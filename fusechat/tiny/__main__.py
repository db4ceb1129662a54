"""Generate the tiny world's chats and train its pivot and sources.

python -m fusechat.tiny seed=0
"""

from __future__ import annotations

from omegaconf import DictConfig

from fusechat.app.command import entry, plain


def run(cfg: DictConfig) -> None:
    """Writes ``world/chats/*.jsonl`` and ``world/models/*``; what is there and fits is kept."""
    from fusechat.tiny.stage import make

    trainer, length = plain(cfg.trainer), cfg.chat.max_length
    make(cfg.output_dir, seed=cfg.seed, max_length=length, trainer=trainer, **plain(cfg.tiny))


main = entry("tiny")(run)
if __name__ == "__main__":
    main()
