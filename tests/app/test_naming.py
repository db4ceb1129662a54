"""Names in a sweep: each job's holds what the jobs differ in; alone, a command names its output as ever."""

import json
import re
from collections.abc import Iterator

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from fusechat.app.command import CONF
from fusechat.app.naming import LONGEST, SWEPT, swept
from fusechat.pipeline.steps import expand
from tests.conftest import composed


@pytest.fixture(autouse=True)
def no_job_of_hydra() -> Iterator[None]:
    yield
    HydraConfig.instance().cfg = None


def names(verb: str, key: str, *overrides: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What each job of ``VERB -m overrides`` calls its output, by the key of its place."""
    monkeypatch.setenv(SWEPT, json.dumps(swept(["-m", *overrides])))
    found = []
    for _, job in expand(f"{verb} " + " ".join(f'"{override}"' for override in overrides)):
        GlobalHydra.instance().clear()
        with initialize_config_dir(CONF, version_base="1.3"):
            cfg = compose(verb, [*job, "hydra.mode=MULTIRUN"], return_hydra_config=True)
        cfg.hydra.overrides.task = [re.sub(r"\$\{(.*?)\}", r"$\\{\1\\}", override) for override in job]  # a sweeper's
        HydraConfig.instance().set_config(cfg)
        found.append(str(cfg[key]).rpartition("/")[2])
        HydraConfig.instance().cfg = None
    return found


TINY = "experiment=tiny"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["source=a,b,c"], ["a", "b", "c"]),
        (["source=a,b", "loss.lm_weight=.5,.9"], [f"{s}_lm_weight_{w}" for s in "ab" for w in (0.5, 0.9)]),
        (["source=a", "loss=ce,jsd"], ["a_loss_ce", "a_loss_jsd"]),
        (["source=a", "fusion=min_ce,avg_ce"], ["a_fusion_min_ce", "a_fusion_avg_ce"]),
        (
            ["source=a", "loss.schedule=hard,soft", "optimizer.schedule=linear,cosine"],
            [
                f"a_loss.schedule_{one}_optimizer.schedule_{other}"
                for one in ("hard", "soft")
                for other in ("linear", "cosine")
            ],
        ),
        (["source=a", "data.shuffle_seed=1,2", "run_name='x_${data.shuffle_seed}'"], ["x_1", "x_2"]),
        (["source=a,b", "seed=0,1", "trainer.devices=1,2", "logger=csv,none"], ["a"] * 8 + ["b"] * 8),
        (["experiment=tiny,tiny_clean", "source=a,b"], ["a", "b", "a", "b"]),
    ],
)
def test_targets(overrides: list[str], expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    own = [] if overrides[0].startswith("experiment") else [TINY]
    assert names("train", "run_name", *own, *overrides, monkeypatch=monkeypatch) == expected


def test_a_seed_is_named_where_the_folder_has_it_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert names("train", "run_name", "source.name=a", "seed=0,1", monkeypatch=monkeypatch) == ["a_seed_0", "a_seed_1"]


def test_what_no_file_name_can_hold_is_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    several = ["sources=[a,b],[a-b],[a,c]", "optimizer.betas=[0.9,0.99],[0.9,0.95]"]
    found = names("train", "run_name", TINY, *several, monkeypatch=monkeypatch)
    assert len(set(found)) == 6
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789_-.") for name in found), "as wandb's artifacts"
    far = "/a" * LONGEST
    (first, second) = names("train", "run_name", TINY, f"chat.path={far}/x,{far}/y", monkeypatch=monkeypatch)
    assert first != second and len(first) < 2 * LONGEST


@pytest.mark.parametrize(
    ("verb", "overrides", "expected"),
    [
        ("merge", ["merge=linear,sce"], ["linear", "sce"]),
        ("merge", ["merge=varm", "merge.granularity=matrix,layer"], ["varm_matrix", "varm_layer"]),
        ("merge", ["merge=sce", "merge.density=0.1,0.2"], ["sce_density_0.1", "sce_density_0.2"]),
        ("merge", ["merge=compress", "target=x/a,x/b"], ["a_compressed", "b_compressed"]),
        ("align", ["source=a", "token_map=em,ms"], ["a_token_map_em", "a_token_map_ms"]),
        ("extract", ["source=a,b", "extract.trainer.devices=1,2"], ["a", "a", "b", "b"]),
    ],
)
def test_other_outputs(verb: str, overrides: list[str], expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert names(verb, "output_dir", TINY, *overrides, monkeypatch=monkeypatch) == expected


def test_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    found = names("evaluate", "output_file", TINY, "model=x/a,x/b", "evaluation.limit=1,2", monkeypatch=monkeypatch)
    assert found == [f"x-{model}_limit_{limit}.json" for model in "ab" for limit in (1, 2)]
    assert names("evaluate", "output_file", TINY, "model=x/a,x/b", monkeypatch=monkeypatch) == ["x-a.json", "x-b.json"]
    named = ["model='${pivot.path}','${source.path}','${paths.experiment}/targets/x_1'"]
    places = ["pivot.path=/x/pivot", "source.path=/x/b.gguf"]
    found = names("evaluate", "output_file", TINY, *places, *named, monkeypatch=monkeypatch)
    assert found == ["x-pivot.json", "x-b.gguf.json", "targets-x_1.json"], "an interpolation is what it stands for"


def test_one_command_alone_keeps_its_name() -> None:
    assert composed("train", [TINY, "source=a", "loss.lm_weight=0.7"]).run_name == "a"
    assert composed("train", ["fusion=sft"]).run_name == "sft"
    assert swept(["source=a,b"]) == [] and swept(["-m", "source=a,b", "seed=range(3)", "x=1"]) == ["source", "seed"]
