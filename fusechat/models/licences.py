"""The licence of a model made of others: the most restrictive of theirs, or a refusal to guess."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from fusechat.models.gguf import is_gguf
from fusechat.models.hub import hub_id

# Hub names of licences that allow everything but to drop a notice, each containing what those before it ask for
PERMISSIVE = ("cc0-1.0", "unlicense", "wtfpl", "isc", "mit", "bsd-2-clause", "bsd-3-clause", "zlib", "apache-2.0")


def licence_of(model: str) -> str | None:
    """The licence that a model's card, or the header of its GGUF file, names, or ``other (NAME)``; None without one."""
    if is_gguf(model):
        from gguf import GGUFReader

        field = GGUFReader(model).fields.get("general.license")
        return str(field.contents()) if field else None
    data = card_data(model)
    if data.get("license") == "other":
        return f"other ({data.get('license_name') or 'see its card'})"
    return str(data["license"]).lower() if data.get("license") else None


def most_restrictive(licences: Mapping[str, str | None]) -> tuple[dict[str, str], str]:
    """What a card's head says of the licence, and the sentence that says why. licences: model -> licence.

    Nothing where one is unknown; "other" where two of them go beyond `PERMISSIVE`: which of them prevails is no
    question of form.
    """
    unknown = [model for model, licence in licences.items() if licence is None]
    if unknown or not licences:
        told = ", ".join(f"`{model}`" for model in unknown) or "its parents"
        return {}, f"Licence: not stated, since that of {told} is not known here; look it up before passing this on."
    named = {model: str(licence) for model, licence in licences.items()}
    further = sorted({licence for licence in named.values() if licence not in PERMISSIVE})
    told = "; ".join(f"`{model}`: {licence}" for model, licence in named.items())
    if len(further) > 1:
        return {"license": "other", "license_name": "several"}, f"Licence: that of every parent holds ({told})."
    chosen = further[0] if further else max(named.values(), key=PERMISSIVE.index)
    own = re.fullmatch(r"other \((.*)\)", chosen)
    head = {"license": "other", "license_name": own[1]} if own else {"license": chosen}
    return head, f"Licence: {chosen}, the most restrictive of the parents' ({told})."


def card_data(model: str) -> Mapping[str, object]:
    """The head of a model's card, of a folder or on the Hub; empty where there is none that can be read."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.repocard import metadata_load

    file, repo = Path(model) / "README.md", hub_id(model)
    try:
        if repo and not Path(model).exists():
            file = Path(hf_hub_download(repo, "README.md", revision=model.partition("@")[2] or None))
        return metadata_load(file) or {}
    except Exception:  # no connection, no card, or a head that is no YAML: a card can do without
        return {}
