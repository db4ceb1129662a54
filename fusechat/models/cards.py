"""Model cards in the Hub's form: how a model was made, from what, and how it was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fusechat.app.verbs import command_line as command_line


def write_card(
    directory: Path,
    title: str,
    made: str,
    inputs: Mapping[str, str],
    command: str,
    metrics: Mapping[str, float] | None = None,
) -> None:
    """Writes README.md. inputs: role -> model; metrics go into the Hub's model-index."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="held-out",
            dataset_name="held-out chats",
            metric_type=name,
            metric_value=value,
        )
        for name, value in (metrics or {}).items()
    ]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["fusechat", "model-fusion"],
        base_model=_hub_ids(list(inputs.values())),
        model_name=title,
        eval_results=results or None,
    )
    rows = "\n".join(f"| {role} | `{model}` |" for role, model in inputs.items())
    scores = "".join(f"| {name} | {value:.4f} |\n" for name, value in (metrics or {}).items())
    table = f"\n## Measured\n\n| metric | value |\n|---|---|\n{scores}" if scores else ""
    text = f"# {title}\n\n{made}\n\n| role | model |\n|---|---|\n{rows}\n\nMade with:\n\n```\n{command}\n```\n{table}"
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}").save(directory / "README.md")


def measured_card(directory: Path, results: Sequence[Mapping[str, Any]]) -> str:
    """The directory's card with what was measured in the Hub's model-index: one entry per result and metric."""
    from huggingface_hub import EvalResult, ModelCard

    card = ModelCard.load(directory / "README.md")
    card.data.model_name = directory.name
    found = [
        EvalResult(
            task_type="text-generation",
            dataset_type=result["kind"],
            dataset_name=f"{result['kind']} ({result['tests']})",
            metric_type=name,
            metric_value=round(entry["all"]["value"], 5),
            metric_name=f"{name}, 95 % {entry['all']['low']:.4f} to {entry['all']['high']:.4f}",
        )
        for result in results
        for name, entry in result["metrics"].items()
    ]
    card.data.eval_results = found or card.data.eval_results
    return str(card)


def _hub_ids(names: Sequence[str]) -> Any:
    ids = [
        name for name in names if name.count("/") == 1 and not Path(name).exists() and not name.startswith((".", "/"))
    ]
    return ids or None
