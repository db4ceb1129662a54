"""Publishing a target or merged model: weights, tokenizer, fusechat.json, and a card with its measured results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fusechat.app.errors import UserError
from fusechat.app.outputs import RECORD
from fusechat.app.schema.values import is_hub_id


@dataclass(frozen=True)
class Publication:
    """What goes to the Hub: a model's files, its card, and the commit's address once it was sent."""

    directory: Path
    files: Sequence[Path]
    card: str
    address: str | None = None

    def __str__(self) -> str:
        sizes = [f"  {f.relative_to(self.directory)}  {f.stat().st_size / 1e6:.1f} MB" for f in self.files]
        return "\n".join([*sizes, "  README.md:", "", self.card])


def publish(
    model: str | Path | None,
    repo: str | None,
    *,
    experiment: str | Path = "",
    dry_run: bool = True,
    private: bool = True,
    message: str = "Upload with fusechat",
) -> Publication:
    """Sends a target or merged model to the Hub in one commit; with ``dry_run`` only says what would go.

    repo: owner/name. experiment: the folder whose evaluations of the model go on its card. private: of a repository
    that is created. Raises `UserError` where the model is not whole, or with the Hub's own reason.
    """
    from fusechat.models.cards import CARD, measured_card
    from fusechat.models.whole import check_model
    from fusechat.report.results import results_of

    directory = Path(model or "")
    if not model or not all((directory / name).exists() for name in (RECORD, "config.json")):
        expected = "config.json and fusechat.json expected"
        raise UserError(f"model={model} is no whole target or merged model ({expected}); make it first")
    check_model(directory)
    if not repo or not is_hub_id(repo):
        raise UserError(f"repo={repo} is no Hub id; write owner/name")
    present = (f for f in directory.rglob("*") if f.is_file() and not f.name.startswith(".") and f.name != CARD)
    files, card = sorted(present), measured_card(directory, results_of(Path(experiment) / "evaluation", directory))
    if dry_run:
        return Publication(directory, files, card)
    return Publication(directory, files, card, _send(directory, files, card, repo, private, message))


def _send(directory: Path, files: Sequence[Path], card: str, repo: str, private: bool, message: str) -> str:
    """One commit; returns its address."""
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    from fusechat.models.cards import CARD

    api = HfApi()
    operations = [CommitOperationAdd(str(file.relative_to(directory)), str(file)) for file in files]
    operations.append(CommitOperationAdd(CARD, card.encode()))
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        return str(api.create_commit(repo, operations, commit_message=message).commit_url)
    except HfHubHTTPError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"the Hub refuses {repo}: {reason}; log in with `hf auth login`, or check the name") from error
