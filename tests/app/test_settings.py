"""Every key of every command's config, with every kind of mistake that its type allows, generated from the types."""

import math
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
import transformers
from annotated_types import Ge, Gt, Le, Len, Lt, Predicate
from typing_extensions import is_typeddict

from fusechat.app import door, settings
from fusechat.app.errors import UserError
from fusechat.app.schema import Config, values
from fusechat.app.session import plain
from fusechat.app.verbs import VERBS, WITHOUT_CONFIG
from tests.conftest import composed

NAN, INF = math.nan, math.inf
NONE = type(None)
FORMS = {  # what is wrong in form, whatever the range
    int: ["nonsense", 1.5, True, NAN, [], {}, None],
    float: ["nonsense", True, NAN, INF, [], {}, None],
    bool: ["nonsense", 2, 1.5, [], {}, None],
    str: [True, 1.5, NAN, [], {}, None],
    NONE: ["nonsense", True, 1.5, NAN, 2, [], {}],
}
UNFIT = {  # predicate -> values of the right form that it refuses
    values.is_template: ["nativ", ""],
    values.is_regex: ["(", "*a"],
    values.is_size: [0, "0GB", "-5GB", "five"],
    values.is_address: ["localhost:8000", "ftp://host"],
    values.is_hub_id: ["name", "/owner/name", "a/b/c"],
    values.is_name: ["", " ", "a/b", ".."],
    values.is_spread: ["atuo", "cuda:x"],
    values.is_device: ["cud", "cuda:x", "tpu"],
    values.are_distinct: [["a", "a"], ["a", "b", "a"]],
}
VERB_OF_KEYS = {verb for verb in VERBS if verb not in WITHOUT_CONFIG}
GIVEN = {  # what the commands cannot do without
    "evaluate": ["model=runs"],
    "mutual": ["mutual.clients={a: {path: runs, chats: a.jsonl}}"],
    "compare": ["first=a.json", "second=b.json"],
    "judge": ["answers=a.jsonl", "judge.base_url=http://localhost/v1", "judge.model=m"],
    "publish": ["model=runs", "repo=a/b"],
}


def mistakes(kind: Any) -> list[Any]:
    """Values that a type must refuse: of a wrong form, out of range, none of the choices, or unfit."""
    if get_origin(kind) in (Union, types.UnionType):
        several = [mistakes(part) for part in get_args(kind)]
        return [value for value in several[0] if all(repr(value) in map(repr, other) for other in several[1:])]
    if get_origin(kind) is Annotated:
        base, *notes = get_args(kind)
        return mistakes(base) + [value for note in notes for value in out_of(note, base)]
    if get_origin(kind) is Literal:
        return ["nonsense", 1.5, NAN, 2, [], {}, *([] if None in get_args(kind) else [None])]
    if get_origin(kind) is Sequence:
        return ["nonsense", True, 1.5, NAN, 2, {}, None, *([value] for value in mistakes(get_args(kind)[0]))]
    if get_origin(kind) is Mapping:
        return ["nonsense", True, 1.5, NAN, 2, [], None, *({"x": value} for value in mistakes(get_args(kind)[1]))]
    if is_typeddict(kind):
        inside = [{key: value} for key, part in settings.fields(kind).items() for value in mistakes(part)]
        return ["nonsense", True, 1.5, NAN, 2, [], None, {"no_such_key": 1}, *inside]
    return list(FORMS.get(kind, []))  # Any takes all


def out_of(note: Any, base: Any) -> list[Any]:
    """Values just outside a bound."""
    step = 1 if base is int else 1e-6
    match note:
        case Ge():
            return [note.ge - step, -1e30 if base is float else -(10**30)]
        case Gt():
            return [note.gt, note.gt - step]
        case Le():
            return [note.le + step, 1e30]
        case Lt():
            return [note.lt, note.lt + step]
        case Len(min_length=least, max_length=most):
            empty = "" if base is str else []
            return ([empty] if least else []) + ([[0.5] * (most + 1)] if most else [])
        case Predicate():
            return UNFIT[note.func]
    return []


def keys(section: Any, above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every key with its type, those of sections inside too."""
    for name, kind in settings.fields(section).items():
        yield (*above, name), kind
        if is_typeddict(kind):
            yield from keys(kind, (*above, name))


def nested(place: tuple[str, ...], value: Any) -> dict[str, Any]:
    for key in reversed(place):
        value = {key: value}
    return value


@pytest.mark.parametrize(
    ("place", "kind"), keys(Config), ids=lambda part: ".".join(part) if type(part) is tuple else ""
)
def test_every_mistake_is_told(place: tuple[str, ...], kind: Any) -> None:
    wrong = mistakes(kind)
    assert len(wrong) >= 3
    name = ".".join(place)
    for value in wrong:
        found = list(settings.faults(nested(place, value)))
        assert found, f"{name}={value!r} is accepted"
        for line in found:
            assert line.startswith((name, f"the config has no key '{name}"))
            assert ": expected " in line or "is unknown; use one of: " in line or "has no key" in line
            assert "\n" not in line


@pytest.mark.parametrize("verb", sorted(VERB_OF_KEYS))
def test_every_key_of_a_command_has_a_type_that_its_value_fits(verb: str) -> None:
    cfg = composed(verb, ["experiment=tiny", *GIVEN.get(verb, [])])
    held = door.check_config(cfg)
    assert held["stage"] == verb
    tree = plain(cfg)
    known = {place for place, _ in keys(Config)}
    assert {(key,) for key in tree} <= known
    assert {(key, inner) for key, part in tree.items() if isinstance(part, dict) for inner in part} <= known


@pytest.mark.parametrize("verb", sorted(VERB_OF_KEYS))
def test_a_step_may_refer_to_what_only_its_own_command_has(verb: str) -> None:
    step = "merge merge=varm merge.granularity=layer merge.name='varm_${merge.granularity}'"
    cfg = composed(verb, ["experiment=tiny", *GIVEN.get(verb, [])])
    cfg.pipeline = {"steps": [step]}
    assert door.check_config(cfg)["pipeline.steps"] == [step]
    assert plain(cfg)["pipeline"] == {"steps": [step]}


def test_messages_name_value_expectation_and_remedy() -> None:
    told = [
        ("loss.temperature", 0, "loss.temperature=0: expected a number above 0"),
        ("loss.lm_weight", 1.5, "loss.lm_weight=1.5: expected a number from 0 to 1"),
        ("data.validation_fraction", -3, "data.validation_fraction=-3: expected a number from 0 to below 1"),
        (
            "merge.density",
            2,
            "merge.density=2: expected a number above 0, at most 1 or a list [..,..], each a number above 0, at most 1",
        ),
        (
            "trainer.devices",
            0,
            "trainer.devices=0: expected a whole number from 1 on or auto or a list [..,..], "
            "each a whole number from 0 on",
        ),
        (
            "chat.template",
            "nativ",
            "chat.template='nativ': expected pivot, native, plain, or a Jinja text with {{ }}; did you mean native?",
        ),
        (
            "source.dtype",
            "float99",
            "source.dtype='float99' is unknown; use one of: float32, bfloat16, float16, float64; "
            "did you mean float64 or float32 or float16?",
        ),
        ("targets", "DIR", "targets='DIR': expected a list [..,..], each a path; write 'targets=[DIR]'"),
        ("merge.patterns", [{"match": "("}], "merge.patterns[0].match='(': expected a regular expression"),
        (
            "loss.temprature",
            1,
            "the config has no key 'loss.temprature'; did you mean temperature or student_temperature?",
        ),
        ("sed", 1, "the config has no key 'sed'; did you mean seed or second?"),
        ("callbacks.early_stopping", "x", "callbacks.early_stopping='x': expected a whole number from 1 on or null"),
    ]
    for key, value, line in told:
        assert list(settings.faults(nested(tuple(key.split(".")), value))) == [line]


def test_all_mistakes_are_told_at_once_and_own_members_may_have_keys() -> None:
    with pytest.raises(
        UserError, match=r"^optimizer\.lr=-1: .*; and seed='abc': |^seed='abc': .*; and optimizer\.lr=-1"
    ):
        settings.check_config({"seed": "abc", "optimizer": {"lr": -1}})
    settings.check_config({"loss": {"mine": 1}}, own_members=True)
    with pytest.raises(UserError, match=r"no key 'optimizer\.mine'"):
        settings.check_config({"loss": {"mine": 1}, "optimizer": {"mine": 1}}, own_members=True)


def test_schedules_are_those_that_transformers_makes_from_steps_alone() -> None:
    import torch

    made = set()
    for name in (kind.value for kind in transformers.SchedulerType):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        try:
            transformers.get_scheduler(name, optimizer, num_warmup_steps=1, num_training_steps=4)
            made.add(name)
        except (TypeError, ValueError):
            continue
    assert set(get_args(values.Schedule)) <= made


def test_trainer_keys_are_lightnings() -> None:
    import inspect

    import lightning

    known = set(inspect.signature(lightning.Trainer).parameters)
    assert set(settings.fields(settings.fields(Config)["trainer"])) - {"timeout"} <= known
