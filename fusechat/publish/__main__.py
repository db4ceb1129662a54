"""Push a target or merged model to the Hub: weights, tokenizer, fusechat.json, and a card with its measured results.

python -m fusechat.publish model=DIR repo=owner/name publish.dry_run=false
"""

from __future__ import annotations

import logging

from omegaconf import DictConfig

from fusechat.app.command import entry, plain

LOG = logging.getLogger(__name__)


def run(cfg: DictConfig) -> None:
    """Sends ``model`` to ``repo`` in one commit; by default only shows what would go."""
    from fusechat.publish.stage import publish

    publication = publish(cfg.model, cfg.repo, experiment=cfg.paths.experiment, **plain(cfg.publish))
    if publication.address is None:
        print(f"would send to {cfg.repo}:\n{publication}")
        LOG.info("nothing was sent; add publish.dry_run=false")
    else:
        LOG.info("sent: %s", publication.address)


main = entry("publish")(run)
if __name__ == "__main__":
    main()
