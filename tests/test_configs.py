"""Every shipped config composes for every entry, and every file says how to use it."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from fusechat.app.command import CONF
from fusechat.pipeline.steps import STEPS, expand
from tests.conftest import composed

FILES = sorted(Path(CONF).rglob("*.yaml"))
NEEDED = {"judge": ["answers=a.jsonl", "judge.base_url=http://localhost/v1", "judge.model=m"]}
EXPERIMENTS = sorted(file.stem for file in (Path(CONF) / "experiment").glob("*.yaml"))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
@pytest.mark.parametrize("entry", STEPS)
def test_every_experiment_composes(experiment: str, entry: str) -> None:
    cfg = composed(entry, [f"experiment={experiment}", "evaluation.chats=x", "model=a/b", *NEEDED.get(entry, [])])
    OmegaConf.resolve(cfg)
    assert cfg.experiment_name in experiment
    assert 0 <= cfg.loss.lm_weight <= 1


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_pipeline_step_composes(experiment: str) -> None:
    steps = composed("pipeline", [f"experiment={experiment}"]).pipeline.steps
    for step in OmegaConf.to_container(steps, resolve=True):
        for name, overrides in expand(step):
            OmegaConf.resolve(
                composed(name, [f"experiment={experiment}", "evaluation.chats=x", *overrides])
            ) if name != "evaluate" else None


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(CONF)))
def test_every_file_opens_with_a_comment(file: Path) -> None:
    lines = [line for line in file.read_text().splitlines() if not line.startswith("# @package")]
    assert lines[0].startswith("# "), f"{file} does not say what it is for"


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_leaves_the_choice_of_a_member_to_its_group(experiment: str) -> None:
    """loss=alm is the loss that is trained with, whatever the experiment sets beside it."""
    for group, key in (("loss", "kind"), ("alignment", "sequence"), ("token_map", "name")):
        for name in sorted(file.stem for file in (Path(CONF) / group).glob("*.yaml") if file.stem != "common"):
            assert composed("train", [f"experiment={experiment}", f"{group}={name}"])[group][key] == name


@pytest.mark.parametrize("verb", ["train", "merge", "extract", "align", "evaluate", "report"])
def test_a_command_alone_has_nothing_of_the_demo(verb: str) -> None:
    """No run of wandb, no folder and no settings of an experiment that nobody named: the published ones."""
    alone, demo = composed(verb, []), composed(verb, ["experiment=tiny", "source=a"])
    assert (alone.experiment_name, alone.logger.kind, Path(alone.paths.experiment).name) == (
        "default",
        "csv",
        "default",
    )
    assert (alone.optimizer.lr, alone.chat.max_length, alone.loss.lm_weight) == (5e-6, 2048, 0.9)
    assert demo.optimizer.lr != alone.optimizer.lr and demo.chat.max_length != alone.chat.max_length


def test_presets_are_keys_that_go_together() -> None:
    """Alone and together, over an experiment and its trainer; what an experiment's own file chooses is left alone."""
    found = {file.stem for file in (Path(CONF) / "preset").glob("*.yaml")}
    assert found == {"lora", "qlora", "flash_attention_2"}
    plain, *made = (
        composed("train", ["experiment=fusechat_7b_varm", "source=nh2_solar", *given])
        for given in ([], ["preset=lora"], ["preset=qlora"], ["preset=[qlora,flash_attention_2]"])
    )
    assert [cfg.lora.enabled for cfg in (plain, *made)] == [False, True, True, True]
    assert [cfg.pivot.load_in for cfg in (plain, *made)] == [None, None, "4bit", "4bit"]
    assert [cfg.pivot.attn_implementation for cfg in made] == [plain.pivot.attn_implementation] * 2 + [
        "flash_attention_2"
    ]
    flash = composed("extract", ["experiment=tiny", "source=a", "preset=flash_attention_2"])
    assert (flash.source.attn_implementation, flash.source.dtype) == ("flash_attention_2", "bfloat16")
    for cfg in made:
        OmegaConf.resolve(cfg)
        assert cfg.optimizer == plain.optimizer


def test_published_hyperparameters() -> None:
    cfg = composed("train", ["experiment=fusechat_7b_varm"])
    assert (cfg.optimizer.lr, cfg.loss.lm_weight, cfg.trainer.max_epochs, cfg.chat.max_length) == (5e-6, 0.9, 3, 2048)
    assert cfg.data.global_batch == 128 and cfg.data.global_batch % (8 * cfg.data.batch_size) == 0
    cfg = composed("train", ["experiment=fusellm_7b"])
    assert (cfg.optimizer.lr, list(cfg.optimizer.betas), cfg.optimizer.weight_decay, cfg.optimizer.warmup_ratio) == (
        1e-5,
        [0.9, 0.95],
        0.1,
        0.008,
    )
    assert composed("merge", ["experiment=fusechat_7b_v2"]).merge.density == 0.1


def test_expand_is_a_grid() -> None:
    assert expand("train source=a,b seed=1,2") == [
        ("train", ["source=a", "seed=1"]),
        ("train", ["source=a", "seed=2"]),
        ("train", ["source=b", "seed=1"]),
        ("train", ["source=b", "seed=2"]),
    ]
    assert expand("train 'sources=[a,b]'") == [("train", ["sources=[a,b]"])]


def test_interpolations_in_a_sweep_are_read_as_they_were_written() -> None:
    line = r"train run_name='${oc.env:NOT_SET,y}','${experiment_name}_${seed}','a b',\'c,d\'"
    names = [composed(verb, ["experiment=tiny", *overrides]).run_name for verb, overrides in expand(line)]
    assert names == ["y", "tiny_0", "a b", "c,d"]
