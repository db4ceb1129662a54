"""Models by folder or Hub id: what lies here is taken as it is, what does not is downloaded once."""

from __future__ import annotations

import re
from pathlib import Path

from fusechat.app.errors import UserError
from fusechat.app.schema.values import is_hub_id

COMPANIONS = ("*.json", "*.model", "*.jinja", "*.txt", "*.tiktoken", "README.md")  # config, tokenizer, licence
SAFE, TORCH = ("model*.safetensors", "adapter_model.safetensors"), ("pytorch_model*.bin",)
CACHED = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/(\w+)")  # where the Hub's cache keeps a model


def local_model(name: str) -> str:
    """The folder of a model given by path, or as ``owner/name`` or ``owner/name@revision`` of the Hub.

    What exists is a path, and so is what an existing folder would hold. Raises `UserError` where the Hub has no such
    model, does not let one see it, or cannot be reached and its cache has not all of it.
    """
    repo, _, revision = name.partition("@")
    if Path(name).exists() or not is_hub_id(repo) or Path(repo).parent.exists():
        return name
    folder = _downloaded(repo, revision or None, (*COMPANIONS, *SAFE))
    if not any(file for pattern in SAFE for file in folder.glob(pattern)):
        folder = _downloaded(repo, revision or None, (*COMPANIONS, *TORCH))
    return str(folder)


def hub_id(path: str | Path) -> str | None:
    """``owner/name`` of a folder in the Hub's cache, or of an id; None of other folders."""
    if found := CACHED.search(Path(path).as_posix()):
        return f"{found[1]}/{found[2]}"
    repo = str(path).partition("@")[0]
    return repo if is_hub_id(repo) and not Path(path).exists() and not Path(repo).parent.exists() else None


def called(path: str | Path) -> str:
    """A model's name in tables and figures: the last part of its Hub id or path."""
    return Path(hub_id(path) or path).name


def _downloaded(repo: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    told = f"{repo}@{revision}" if revision else repo
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns), ignore_patterns="*/*"))
    except RevisionNotFoundError as error:
        raise UserError(f"the Hub's {repo} has no revision {revision!r}; see its branches, tags and commits") from error
    except GatedRepoError as error:
        raise UserError(
            f"{told} is gated: accept its terms on its page of the Hub, and log in: hf auth login"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{told} is no folder here, and the Hub knows no such model or does not show it to you; check the name, or "
            "log in: hf auth login"
        ) from error
    except Exception as error:  # offline, no connection, or an answer that is none
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(
            f"{told} is no folder here, not whole in the Hub's cache, and cannot be downloaded ({reason}); where there "
            f"is a connection: hf download {repo}{f' --revision {revision}' if revision else ''}"
        ) from error
