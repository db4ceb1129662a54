"""``pipeline.steps=auto``: the steps that an experiment's sources, fusion rules and merges ask for.

Every source is extracted and aligned, and makes a target, each in an order of the chats of its own (targets that saw
one order move alike, and a merge of them gains little); SFT alone in several orders is what they are compared with,
and its soup what their merges are; all models are evaluated and reported where test chats are named.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from fusechat.app.errors import UserError
from fusechat.app.needs import QUESTIONS
from fusechat.app.session import MISSING
from fusechat.pipeline.steps import Step, parse, quoted

Values = Mapping[str, Any]
TARGETS = "${paths.experiment}/targets/"
NO_SOURCES = "pipeline.steps=auto needs sources; name them with 'models={NAME: DIR}', or pipeline.sources='[NAME]'"
PIVOT = "'pivot' is the pivot's own name; call the source otherwise in models and pipeline.sources"


def planned(values: Values, models_of: Callable[[Step], Sequence[str]]) -> list[Step]:
    """The steps, in order. values: the experiment's config as plain data; models_of: the models that a step reads or
    makes, of which each is evaluated once. Raises `UserError` where no source is named.
    """
    auto, models = values["pipeline"], values.get("models") or {}
    sources = [str(name) for name in auto["sources"] or models]
    if not sources or "pivot" in sources:
        raise UserError(NO_SOURCES if not sources else PIVOT)
    chosen = [f"source{'.name' if name in models else ''}={name}" for name in sources]
    steps: list[Step] = [("extract", [choice]) for choice in _together(["source=pivot", *chosen])]
    steps += [("align", [choice]) for choice in _together(chosen)]
    steps += [*_targets(auto, sources, chosen), *_merges(auto, sources), *map(parse, auto["add"])]
    if tests_of(values):
        found = dict.fromkeys(model for step in steps for model in models_of(step))
        steps += [("evaluate", [f"model={','.join(map(quoted, found))}"]), ("report", [])]
    return steps


def tests_of(values: Values) -> bool:
    """Whether the evaluation has what it asks."""
    evaluation = values["evaluation"]
    key = QUESTIONS.get(str(evaluation["kind"]))
    return key is None or evaluation.get(key.partition(".")[2], MISSING) != MISSING


def _together(choices: Sequence[str]) -> Iterator[str]:
    """Choices as sweeps: one for each key."""
    for key in dict.fromkeys(choice.partition("=")[0] for choice in choices):
        values = [choice.partition("=")[2] for choice in choices if choice.startswith(f"{key}=")]
        yield f"{key}={','.join(values)}"


def _targets(auto: Values, sources: Sequence[str], chosen: Sequence[str]) -> Iterator[Step]:
    for rule in auto["rules"] or [None]:
        own = [f"fusion={rule}"] if rule else []
        for number, (name, choice) in enumerate(zip(sources, chosen, strict=True), 1):
            yield "train", [choice, *own, f"run_name={named(name, rule, auto)}", f"data.shuffle_seed={number}"]
        if auto["many_to_one"]:
            run_name = named("many_to_one", rule, auto)
            yield "train", [f"sources=[{','.join(sources)}]", *own, f"run_name={run_name}", "data.shuffle_seed=1"]
    if auto["sft"]:
        seeds = ",".join(str(seed) for seed in range(1, auto["sft"] + 1))
        yield "train", ["fusion=sft", f"data.shuffle_seed={seeds}", "run_name=sft_${data.shuffle_seed}"]


def _merges(auto: Values, sources: Sequence[str]) -> Iterator[Step]:
    """Merges of every rule's targets; none where there is a single target."""
    for rule in auto["rules"] or [None]:
        targets = ",".join(f"{TARGETS}{named(name, rule, auto)}" for name in sources)
        place = [f"output_dir=${{paths.experiment}}/merged/{named('${merge.name}', rule, auto)}"]
        for line in auto["merges"] if len(sources) > 1 else []:
            method, *settings = shlex.split(line)
            other = place if len(auto["rules"]) > 1 else []
            yield "merge", [f"merge={method}", *settings, f"targets=[{targets}]", *other]
    if auto["merges"] and auto["sft"] > 1:
        targets = ",".join(f"{TARGETS}sft_{seed}" for seed in range(1, auto["sft"] + 1))
        yield "merge", ["merge=linear", "merge.name=sft_soup", f"targets=[{targets}]"]


def named(name: str, rule: str | None, auto: Values) -> str:
    """A target's name; the rule is part of it where there are several."""
    return f"{name}_{rule}" if rule and len(auto["rules"]) > 1 else name
