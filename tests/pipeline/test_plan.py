"""``pipeline.steps=auto``: which steps follow from sources, rules and merges; and that they are steps that compose."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from fusechat.app.command import CONF
from fusechat.app.errors import UserError
from fusechat.app.session import plain
from fusechat.pipeline.__main__ import steps_of
from fusechat.pipeline.configs import check, composer, jobs
from fusechat.pipeline.plan import planned
from fusechat.pipeline.steps import parse, shown
from tests.conftest import composed

OWN = ["source=own", "experiment_name=mine", "models={a: dir/a, b: org/b}", "pivot.path=dir/p", "chat.path=chats.jsonl"]
TARGETS = "${paths.experiment}/targets"
SOUP = f"merge merge=linear merge.name=sft_soup 'targets=[{TARGETS}/sft_1,{TARGETS}/sft_2,{TARGETS}/sft_3]'"


def auto(*overrides: str) -> dict[str, Any]:
    own = [given for given in OWN if given.partition("=")[0] not in {o.partition("=")[0] for o in overrides}]
    return dict(plain(composed("pipeline", ["pipeline.steps=auto", *own, *overrides])))


def lines(*overrides: str, made: Any = lambda step: []) -> list[str]:
    return [shown(step) for step in planned(auto(*overrides), made)]


def test_the_default_plan() -> None:
    made = {"extract": ["dir/p"], "train": ["t"], "merge": ["m"]}
    assert lines("evaluation.chats=tests.jsonl", made=lambda step: made.get(step[0], [])) == [
        "extract source=pivot",
        "extract source.name=a,b",
        "align source.name=a,b",
        "train source.name=a run_name=a data.shuffle_seed=1",
        "train source.name=b run_name=b data.shuffle_seed=2",
        "train fusion=sft data.shuffle_seed=1,2,3 'run_name=sft_${data.shuffle_seed}'",
        f"merge merge=varm 'targets=[{TARGETS}/a,{TARGETS}/b]'",
        f"merge merge=linear 'targets=[{TARGETS}/a,{TARGETS}/b]'",
        SOUP,
        """evaluate 'model="dir/p","t","m"'""",
        "report",
    ]


def test_several_rules_name_their_targets_and_merges() -> None:
    found = lines(
        "pipeline.rules=[min_ce,avg_ce]", "pipeline.many_to_one=true", "pipeline.sft=0", "pipeline.merges=[sce]"
    )
    assert "train source.name=b fusion=avg_ce run_name=b_avg_ce data.shuffle_seed=2" in found
    many = "train 'sources=[a,b]' fusion=min_ce run_name=many_to_one_min_ce data.shuffle_seed=1"
    assert many in found
    place = "'output_dir=${paths.experiment}/merged/${merge.name}_avg_ce'"
    assert found[-1] == f"merge merge=sce 'targets=[{TARGETS}/a_avg_ce,{TARGETS}/b_avg_ce]' {place}"


def test_a_single_source_has_nothing_to_merge() -> None:
    found = lines("models={only: dir}", "pipeline.sft=1")
    assert not [line for line in found if line.startswith("merge")]
    assert lines("models={only: dir}")[-1] == SOUP, "but SFT runs have"


def test_sources_of_the_config_group_and_added_lines() -> None:
    given = ["pipeline.sources=[nh2_solar,a]", "pipeline.add=['train source=pivot run_name=self']"]
    found = lines(*given)
    assert found[:4] == [
        "extract source=pivot,nh2_solar",
        "extract source.name=a",
        "align source=nh2_solar",
        "align source.name=a",
    ]
    assert found[-1] == "train source=pivot run_name=self"


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (
            "null",
            "pipeline.steps=auto needs sources; name them with 'models={NAME: DIR}', or pipeline.sources='[NAME]'",
        ),
        ("{pivot: dir}", "'pivot' is the pivot's own name; call the source otherwise in models and pipeline.sources"),
    ],
)
def test_without_sources_there_is_no_plan(models: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        lines(f"models={models}")
    assert str(error.value) == message


@pytest.fixture
def hydra() -> Iterator[None]:
    """Hydra as it is inside a command."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(CONF, version_base="1.3"):
        yield


def test_the_plan_composes_and_evaluates_every_model_once(hydra: None, tmp_path: Path) -> None:
    own = [*OWN, "evaluation.chats=tests.jsonl", f"paths.root={tmp_path}"]
    compose = composer(own)
    added = """pipeline.add=["merge merge=sce merge.name='it''s' targets=[x,y]"]""".replace("'it''s'", "mine")
    cfg = compose(("pipeline", ["pipeline.steps=auto", "pipeline.merges=['varm merge.granularity=layer']", added]))
    steps = steps_of(cfg, compose)
    check(steps, compose)
    place = f"{tmp_path}/mine"
    names = ["targets/a", "targets/b", "targets/sft_1", "targets/sft_2", "targets/sft_3"]
    names += ["merged/varm_layer", "merged/sft_soup", "merged/mine"]
    (evaluate,) = (step for step in steps if step[0] == "evaluate")
    models = ["dir/p", "dir/a", "org/b", *(f"{place}/{name}" for name in names)]
    assert evaluate[1] == ["model=" + ",".join(f'"{model}"' for model in models)]
    assert str(compose(("evaluate", [f'model="{models[3]}"'])).output_file) == f"{place}/evaluation/targets-a.json"


@pytest.mark.parametrize("steps", [["pipeline.steps=[report,{}]"], ["pipeline.steps=auto", "pipeline.add=[{}]"]])
@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "train preset=null",
            r"\(train preset=null\): preset=null: expected one of flash_attention_2, lora, qlora; ~preset",
        ),
        ("train lss=ce", r"\(train lss=ce\): the config has no key 'lss'; did you mean loss"),
        ("train loss=cee", r"\(train loss=cee\): .*did you mean ce\?"),
    ],
)
def test_a_steps_mistake_is_named(hydra: None, steps: list[str], line: str, message: str) -> None:
    compose = composer(OWN)
    cfg = compose(("pipeline", [text.format(f"'{line}'") for text in steps]))
    with pytest.raises(UserError, match=f"^step (\\d+ )?{message}"):
        check(steps_of(cfg, compose), compose)


def test_lists_stay_as_they_are_and_may_be_added_to(hydra: None) -> None:
    compose = composer([])
    cfg = compose(("pipeline", ["experiment=fusellm_7b", "pipeline.add=[report]"]))
    assert steps_of(cfg, compose) == [*map(parse, cfg.pipeline.steps), ("report", [])]


def test_no_tests_no_evaluation_and_that_is_told(hydra: None, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    compose = composer(OWN)
    steps = steps_of(compose(("pipeline", ["pipeline.steps=auto"])), compose)
    assert shown(steps[-1]) == SOUP
    assert "no evaluation and no report: evaluation.chats=FILE names the chats to test with" in caplog.text


def test_jobs_of_a_sweep_are_named_as_they_will_be(hydra: None, tmp_path: Path) -> None:
    """What a dry run says of a step with several values is said of its jobs' own outputs, as in a multirun."""
    place = f"{tmp_path}/tiny/seed0"
    compose = composer(["experiment=tiny", f"paths.root={tmp_path}"])
    named = {
        "merge merge=varm merge.granularity=layer,model": (
            "output_dir",
            [f"merged/varm_{m}" for m in ("layer", "model")],
        ),
        "merge merge=linear,ties merge.dtype=null,bfloat16": (
            "output_dir",
            [f"merged/{m}_dtype_{d}" for m in ("linear", "ties") for d in ("null", "bfloat16")],
        ),
        "train source=a,b loss.lm_weight=0.5,0.9": (
            "output_dir",
            [f"targets/{s}_lm_weight_{w}" for s in "ab" for w in ("0.5", "0.9")],
        ),
        "evaluate model=x/a,x/b evaluation.limit=5,7": (
            "output_file",
            [f"evaluation/x-{m}_limit_{n}.json" for m in "ab" for n in (5, 7)],
        ),
        "extract source=a,b": ("output_dir", ["distributions/a", "distributions/b"]),
    }
    for line, (key, wanted) in named.items():
        found = [str(config[key]) for _, config in jobs(parse(line), compose)]
        assert found == [f"{place}/{name}" for name in wanted], line
