"""Push a target or merged model to the Hub: weights, tokenizer, fusechat.json, and a card with its measured results.

python -m fusechat.publish model=DIR repo=owner/name publish.dry_run=false
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from fusechat.app.command import entry
from fusechat.app.errors import UserError

LOG = logging.getLogger(__name__)


def run(cfg: DictConfig) -> None:
    """Sends ``model`` to ``repo`` in one commit; by default only shows what would go."""
    from fusechat.models.cards import measured_card

    directory = Path(cfg.model or "")
    if not cfg.model or not (directory / "fusechat.json").exists() or not (directory / "config.json").exists():
        raise UserError(
            f"model={cfg.model} is no whole target or merged model (config.json and fusechat.json expected); make it first"
        )
    if not cfg.repo or cfg.repo.count("/") != 1:
        raise UserError(f"repo={cfg.repo} is no Hub id; write owner/name")
    files = sorted(
        f for f in directory.rglob("*") if f.is_file() and not f.name.startswith(".") and f.name != "README.md"
    )
    card = measured_card(directory, results_of(Path(cfg.paths.experiment), directory))
    if cfg.publish.dry_run:
        listed = "\n".join(f"  {f.relative_to(directory)}  {f.stat().st_size / 1e6:.1f} MB" for f in files)
        print(f"would send to {cfg.repo}:\n{listed}\n  README.md:\n\n{card}")
        LOG.info("nothing was sent; add publish.dry_run=false")
        return
    LOG.info("sent: %s", send(cfg, directory, files, card))


def results_of(experiment: Path, directory: Path) -> list[dict[str, Any]]:
    """Every result file of this model under the experiment."""
    from fusechat.report.results import read_result

    found = []
    for file in sorted(
        [*(experiment / "evaluation").glob("*.json"), *(experiment / "evaluation").glob("lm_eval/*.json")]
    ):
        content = read_result(file)
        if Path(content["model"]).resolve() == directory.resolve():
            found.append(content)
    return found


def send(cfg: DictConfig, directory: Path, files: list[Path], card: str) -> str:
    """One commit; returns its address. Raises `UserError` with the Hub's own reason."""
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    operations = [CommitOperationAdd(str(file.relative_to(directory)), str(file)) for file in files]
    operations.append(CommitOperationAdd("README.md", card.encode()))
    try:
        api.create_repo(cfg.repo, private=cfg.publish.private, exist_ok=True)
        return str(api.create_commit(cfg.repo, operations, commit_message=cfg.publish.message).commit_url)
    except HfHubHTTPError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"the Hub refuses {cfg.repo}: {reason}; log in with `hf auth login`, or check the name"
        ) from error


main = entry("publish")(run)
if __name__ == "__main__":
    main()
