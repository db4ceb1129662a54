"""Lines of ``pipeline.steps`` as commands: a verb with its overrides, one process or several."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Sequence

from fusechat.app.errors import UserError
from fusechat.app.verbs import VERBS, WITHOUT_CONFIG, near

STEPS = [verb for verb in VERBS if verb not in ("pipeline", *WITHOUT_CONFIG)]
Step = tuple[str, list[str]]  # a verb and its overrides


def parse(line: str) -> Step:
    """``train source=a,b`` -> verb and overrides. Raises `UserError` for an unknown verb."""
    try:
        verb, *overrides = shlex.split(line)
    except ValueError as error:
        raise UserError(f"pipeline.steps: {line!r} cannot be read ({error}); close its quotes") from error
    if verb not in STEPS:
        raise UserError(f"pipeline.steps: {verb!r} is no stage; use one of: {', '.join(STEPS)}{near(verb, STEPS)}")
    return verb, overrides


def shown(step: Step) -> str:
    """A step as its line."""
    return shlex.join([step[0], *step[1]])


def is_sweep(overrides: Sequence[str]) -> bool:
    """Whether an override has several values."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return any(override.is_sweep_override() for override in OverridesParser.create().parse_overrides(list(overrides)))


def expand(step: Step | str) -> list[Step]:
    """``train source=a,b seed=1`` -> one command per combination, in the order and writing of a grid sweep."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    verb, overrides = parse(step) if isinstance(step, str) else step
    choices = []
    for override, text in zip(OverridesParser.create().parse_overrides(overrides), overrides, strict=True):
        if override.is_sweep_override():
            choices.append([f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()])
        else:
            choices.append([text])
    return [(verb, list(combination)) for combination in itertools.product(*choices)]


def quoted(value: str) -> str:
    """A text as a value of an override that Hydra reads back as it is."""
    return '"' + value.replace('"', '\\"') + '"'
