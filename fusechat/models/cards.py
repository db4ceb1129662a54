"""Model cards in the Hub's form: how a model was made, from what, and how it was measured."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusechat.app.schema.values import is_hub_id
from fusechat.app.verbs import command_line as command_line
from fusechat.models.hub import hub_id
from fusechat.models.licences import card_data, licence_of, most_restrictive

CARD = "README.md"
MEASURED = "## Measured"  # the last section, made anew when a model is evaluated
USE = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{0}")  # this folder, or its name on the Hub
tokenizer = AutoTokenizer.from_pretrained("{0}")"""


@dataclass(frozen=True)
class Made:
    """What a card says of how a model was made.

    sentence: what it is. parents: role -> model, a path or Hub id. bases: those whose weights it has. chats: the data
    it was trained on. tags: beside those of every model of ours.
    """

    sentence: str
    parents: Mapping[str, str]
    bases: Sequence[str]
    chats: Sequence[str] = ()
    tags: Sequence[str] = ()


def write_card(directory: Path, title: str, made: Made, metrics: Mapping[str, float] | None = None) -> None:
    """Writes README.md. metrics: of the held-out chats, they go into the Hub's model-index."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    held_out: dict[str, Any] = {"task_type": "text-generation", "dataset_type": "held-out"}
    results = [
        EvalResult(**held_out, dataset_name="held-out chats", metric_type=name, metric_value=round(value, 5))
        for name, value in (metrics or {}).items()
    ]
    bases = list(dict.fromkeys(base for model in made.bases for base in _hub_bases(model)))
    chats = [*made.chats, *(str(name) for model in made.bases for name in _list_of(card_data(model), "datasets"))]
    licence, why = most_restrictive({_shown(model): licence_of(model) for model in made.parents.values()})
    head: dict[str, Any] = {**licence}
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["fusechat", "model-fusion", *made.tags],
        base_model=bases or None,
        base_model_relation=("merge" if len(bases) > 1 else "finetune") if bases else None,
        datasets=list(dict.fromkeys(name for name in chats if is_hub_id(name) and not Path(name).exists())) or None,
        model_name=title if results else None,
        eval_results=results or None,
        **head,
    )
    rows = "\n".join(f"| {role} | `{_shown(model)}` |" for role, model in made.parents.items())
    scores = "".join(f"| {name} | {value:.4f} |\n" for name, value in (metrics or {}).items())
    parts = [
        f"# {title}",
        made.sentence,
        f"| role | model |\n|---|---|\n{rows}",
        why,
        f"Made in `{_shown(str(Path.cwd()))}` with:\n\n```sh\n{from_here(command_line())}\n```",
        f"Read by transformers alone:\n\n```python\n{USE.format(title)}\n```",
        *([f"{MEASURED}\n\n| metric, held-out chats | value |\n|---|---|\n{scores.rstrip()}"] if scores else []),
    ]
    text = "\n\n".join(parts)
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n").save(directory / CARD)


def measured_card(directory: Path, results: Sequence[Mapping[str, Any]]) -> str:
    """The directory's card with what was measured: in the Hub's model-index, and as its last section.

    results: contents of evaluations, as the report reads them; without any the card is as it was.
    """
    from huggingface_hub import EvalResult, ModelCard

    card = ModelCard.load(directory / CARD)
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
    if found:
        card.data.model_name, card.data.eval_results = directory.name, found
        rows = "\n".join(_score_rows(results))
        heading = f"{MEASURED}\n\n| evaluation | metric | value | 95 % interval | n |\n|---|---|---|---|---|"
        card.text = f"{card.text.partition(MEASURED)[0].rstrip()}\n\n{heading}\n{rows}\n"
    return str(card)


def _score_rows(results: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for result in results:
        for name, entry in result["metrics"].items():
            whole = entry["all"]
            interval = f"{whole['low']:.4f} to {whole['high']:.4f}"
            count = whole.get("count", len(result["samples"]))
            yield f"| {result['kind']} | {name} | {whole['value']:.4f} | {interval} | {count} |"


def _hub_bases(model: str) -> list[str]:
    """A model's Hub id; of a folder the ids that its own card names."""
    own = hub_id(model)
    return [own] if own else [str(base) for base in _list_of(card_data(model), "base_model")]


def _list_of(data: Mapping[str, object], key: str) -> list[Any]:
    value = data.get(key) or []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def from_here(command: str) -> str:
    """A command whose paths below this folder, and below home, are as they are typed from here: nobody's name shows."""
    here, home = Path.cwd(), Path.home()
    for folder, typed in ((here, ""), (home, f"{os.path.relpath(home)}/")):
        if folder != folder.parent:  # not the root of all
            command = re.sub(rf"(?<![\w.~/-]){re.escape(str(folder))}/", typed, command)
    return command


def _shown(model: str) -> str:
    """A model as its card names it: its Hub id, or its path from the working folder or home where it lies there."""
    path, here, home = Path(model), Path.cwd(), Path.home()
    if own := hub_id(model):
        return own
    if path.is_absolute() and path != here and path.is_relative_to(here):
        return str(path.relative_to(here))
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) and path != home else str(path)
