"""`fusechat new`: from three models and a file of chats to a report, with nothing written by hand in between."""

import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from fusechat.app.command import CONF, run_stage
from fusechat.app.errors import UserError
from fusechat.app.session import plain
from fusechat.app.verbs import VERBS
from fusechat.chats.overlap import shared_questions
from fusechat.models.licences import licence_of
from fusechat.new.__main__ import asked_for as asked
from fusechat.new.estimates import Work
from fusechat.new.facts import Lengths, Model, facts_of, split
from fusechat.new.telling import tell
from fusechat.new.work import looked
from fusechat.new.writing import millions, rate_of, step_of
from fusechat.pipeline.__main__ import steps_of
from fusechat.pipeline.configs import check, composer
from fusechat.pipeline.plan import planned
from fusechat.pipeline.steps import expand, shown
from fusechat.pipeline.table import rows_of, summary
from tests.conftest import ROOT, Mini


def given(mini: Mini, place: Path, *more: str) -> list[str]:
    world = mini.experiment / "world"
    models = ", ".join(f"{name}: {world}/models/{name}" for name in ("a", "b"))
    chats = [f"chats={world}/chats/fusion.jsonl", f"folder={place}/my_conf", f"root={place}/runs"]
    return [f"pivot={world}/models/pivot", f"sources={{{models}}}", *chats, *more]


def test_from_new_to_the_report(mini: Mini, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What new writes plans a pipeline whose every job runs, here in one process; then all of it is done."""
    own = asked("mine", given(mini, tmp_path))
    tell(own, *looked(own, start=1.0))
    printed = capsys.readouterr().out
    assert f"{own.file} is written" in printed
    assert re.search(r"pivot +LlamaForCausalLM +0\.058 M +512 +512 +its own +\?", printed)
    command = f"  python -m fusechat.pipeline --config-dir {own.folder} experiment=mine paths.root={own.root}"
    assert printed.splitlines()[-2:] == [f"{command} pipeline.dry_run=true   # the plan", command]
    GlobalHydra.instance().clear()
    with initialize_config_dir(CONF, version_base="1.3"):
        base = ["experiment=mine", f"hydra.searchpath=[file://{own.folder}]", f"paths.root={own.root}"]
        compose = composer([*base, "trainer.max_epochs=1"])
        short = ["pipeline.sft=1", "pipeline.merges=[linear]"]
        steps = steps_of(compose(("pipeline", short)), compose)
        assert summary(rows_of(steps, compose, own.runs), own.runs).startswith("17 to do; left: about ")
        for job in (job for step in steps for job in expand(step)):
            run_stage(importlib.import_module(VERBS[job[0]]).run, compose(job))
        assert summary(rows_of(steps, compose, own.runs), own.runs) == "17 done; nothing is left to do"
    names = {json.loads(file.read_text())["name"] for file in (own.runs / "evaluation").glob("*.json")}
    assert names == {"models-pivot", "models-a", "models-b", "targets-a", "targets-b", "targets-sft_1", "merged-linear"}
    assert (own.runs / "report/index.html").exists()
    estimates = json.loads((own.runs / "estimates.json").read_text())["outputs"]
    for name in ("distributions/pivot", "distributions/a", "aligned/a", "targets/a", "targets/sft_1"):
        files = [file for file in (own.runs / name).glob("*") if file.suffix in (".arrow", ".safetensors")]
        expected = estimates.get(name) or estimates[name.partition("/")[0]]
        assert 0.5 < expected["bytes"] / sum(file.stat().st_size for file in files) < 2, name


def test_a_pipeline_passes_its_config_folder_on(made: tuple[Work, str, Path]) -> None:
    """Behind ``--config-dir`` argparse takes no more overrides: those of the pipeline's own come before."""
    folder, root = made[2] / "my_conf", made[2] / "runs"
    command = [
        sys.executable,
        "-m",
        "fusechat.pipeline",
        f"--config-dir={folder}",
        "experiment=mine",
        f"paths.root={root}",
    ]
    step = "pipeline.steps=['compare first=/nope second=/nope']"
    done = subprocess.run([*command, step], cwd=ROOT, text=True, capture_output=True)
    assert "first=/nope is no result file" in done.stderr
    assert f"python -m fusechat.compare experiment=mine paths.root={root} first=/nope" in done.stderr


@pytest.fixture
def made(mini: Mini, tmp_path: Path) -> tuple[Work, str, Path]:
    work, text = looked(asked("mine", given(mini, tmp_path)), start=10.0)
    return work, text, tmp_path


def test_the_file_says_what_was_found_and_plans_the_pipeline(made: tuple[Work, str, Path], mini: Mini) -> None:
    work, text, place = made
    assert len(text.splitlines()) <= 20 and all("#" in line for line in text.splitlines()[4:])
    assert (place / "my_conf/experiment/mine.yaml").read_text() == text
    assert f'a: "{mini.experiment}/world/models/a"  # GPTNeoXForCausalLM, 0.066 M parameters, 700 tokens' in text
    GlobalHydra.instance().clear()
    with initialize_config_dir(CONF, version_base="1.3"):
        own = ["experiment=mine", f"hydra.searchpath=[file://{place}/my_conf]", f"paths.root={place}/runs"]
        compose = composer(own)
        cfg = plain(compose(("pipeline", [])))
        steps = planned(cfg, lambda step: ["org/model"])
        check(steps, compose)
        assert [shown(step) for step in steps][:3] == [
            "extract source=pivot",
            "extract source.name=a,b",
            "align source.name=a,b",
        ]
        assert compose(("extract", ["source.name=b"])).source.path == f"{mini.experiment}/world/models/b"
        assert cfg["targets"] == [f"{place}/runs/mine/targets/{name}" for name in ("a", "b")]
    assert (work.chats, work.tests) == (76, 20)


def test_no_question_is_on_both_sides(made: tuple[Work, str, Path]) -> None:
    place = made[2] / "runs/mine/chats"
    fusion, tests = (
        [json.loads(line)["messages"] for line in (place / f"{name}.jsonl").read_text().splitlines()]
        for name in ("fusion", "test")
    )
    assert shared_questions(fusion, tests) == 0
    ask = lambda question, answer: {
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    }
    rows = [ask(f"question {n // 2}", f"answer {n}") for n in range(100)]
    kept, aside = split(rows, "x")
    assert len(aside) == 20 and len(kept) == 80
    assert split(rows[::-1], "x")[1] != aside and {str(row) for row in split(rows[::-1], "x")[1]} == {
        str(row) for row in aside
    }
    with pytest.raises(
        UserError, match="x has 30 chats that differ in their question, too few to set some aside; .* tests=FILE"
    ):
        split(rows[:60], "x")


def test_given_tests_are_taken_and_nothing_is_set_aside(mini: Mini, tmp_path: Path) -> None:
    tests = mini.experiment / "world/chats/test.jsonl"
    work, text = looked(asked("mine", given(mini, tmp_path, f"tests={tests}", "max_length=20")), start=1.0)
    assert (work.chats, work.tests) == (96, 24)
    assert "template: native, max_length: 20" in text
    assert f'evaluation: {{chats: "{tests}"' in text and "max_length: 20" in text
    assert work.lengths["pivot"].longest == 20 and work.lengths["pivot"].cut > 0
    assert not (tmp_path / "runs/mine/chats").exists()


def test_a_source_without_a_template_reads_the_pivots(mini: Mini, tmp_path: Path) -> None:
    bare = shutil.copytree(mini.experiment / "world/models/a", tmp_path / "bare")
    for file in (bare / "chat_template.jinja", bare / "fusechat.json"):
        file.unlink()
    asks = given(mini, tmp_path)
    _, text = looked(asked("mine", [asks[0], f"sources={{a: {bare}}}", *asks[2:]]), start=1.0)
    assert "template: pivot, max_length: 512" in text and "pivot: all read its format" in text


def test_nothing_is_replaced_unasked(made: tuple[Work, str, Path], mini: Mini) -> None:
    place = made[2]
    with pytest.raises(UserError, match=r"mine\.yaml is there already; choose another name, or add overwrite=true to"):
        asked("mine", given(mini, place))
    (place / "my_conf/experiment/mine.yaml").unlink()
    test = place / "runs/mine/chats/test.jsonl"
    test.write_text("{}\n")
    with pytest.raises(UserError, match=r"test\.jsonl holds other chats; choose another name, or add overwrite=true"):
        looked(asked("mine", given(mini, place)), start=1.0)
    assert not (place / "my_conf/experiment/mine.yaml").exists()
    looked(asked("mine", given(mini, place, "overwrite=true")), start=1.0)
    assert test.read_text() != "{}\n"


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (
            "mine",
            [],
            "pivot, sources, chats are missing; run: python -m fusechat.new mine pivot=DIR sources='{a: DIR, b: DIR}' chats=FILE",
        ),
        ("mine", ["pivto=x"], "'pivto' is no key of fusechat new; did you mean pivot?; --help lists them"),
        ("mine", ["pivot=x", "sources=x", "chats=x"], "sources=x: expected '{a: DIR, b: DIR}', a path for each name"),
        ("mine", ["sources={a: x"], "'sources={a: x' cannot be read"),
        ("tiny", ["pivot=x", "sources={a: x}", "chats=x"], "'tiny' cannot name an experiment"),
        ("mine", ["pivot=x", "sources={pivot: x}", "chats=x"], "'pivot' cannot name a source"),
        ("a/b", ["pivot=x", "sources={a: x}", "chats=x"], "'a/b' cannot name an experiment"),
    ],
)
def test_mistakes_are_told(name: str, settings: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        asked(name, settings)
    assert message in str(error.value)


def test_a_gguf_pivot_and_a_missing_model_are_refused(mini: Mini, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="nowhere does not exist; expected a model's directory, a GGUF file or a Hub id"
    ):
        looked(asked("mine", [*given(mini, tmp_path), f"pivot={tmp_path}/nowhere"]), start=1.0)


def test_experts_that_a_token_does_not_meet_take_no_time(mini: Mini, tokenizers: Any) -> None:
    path = f"{mini.experiment}/world/models/c"
    found = facts_of("c", path, tokenizers("c"))
    assert found.active < found.total
    assert (
        facts_of("a", f"{mini.experiment}/world/models/a", tokenizers("a")).active
        == facts_of("a", f"{mini.experiment}/world/models/a", tokenizers("a")).total
    )


def test_a_licence_is_what_a_card_names(tmp_path: Path) -> None:
    assert licence_of(str(tmp_path)) is None
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# x\n")
    assert licence_of(str(tmp_path)) == "apache-2.0"


def test_estimates_by_hand() -> None:
    model = Model("pivot", "p", "X", 1000, 1000, 8, 2, 500, 64, True, "mit")
    own = Lengths(tokens=20.0, positions=5.0, longest=30, cut=0.0)
    work = Work(model, [model], {"pivot": own}, chats=100, tests=10, start=7.0, speed=1e6, baselines=1, merges=1)
    found = work.outputs()
    assert found["distributions/pivot"] == {"seconds": 7 + 2 * 1000 * 2000 / 1e6, "bytes": 100 * (5 * 43 + 20 * 2)}
    assert found["targets"] == {"seconds": 7 + 6 * 1000 * 2000 * 3 / 1e6, "bytes": 4000}
    assert work.micro_batch(8, 1e12) == 8 and work.micro_batch(8, 0.0) == 1
    assert work.per_chat == 68 * 2 * 8 * 30
    unknown = Work(model, [model], {"pivot": own}, chats=100, tests=10, start=7.0, speed=None)
    assert unknown.stages()["targets"]["seconds"] is None and unknown.stages()["targets"]["bytes"] == 16000
    assert [millions(n) for n in (58e3, 8.2e5, 135e6, 7.2e9)] == ["0.058 M", "0.82 M", "135 M", "7.2 B"]
    assert [step_of(n) for n in (76, 500, 1500, 95_000)] == [8, 8, 16, 128]
    assert [rate_of(n) for n in (7e9, 135e6, 7e5)] == ["5.0e-6", "3.0e-5", "1.0e-3"]
