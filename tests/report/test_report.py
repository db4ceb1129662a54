"""The report: tables and comparisons say what differs, several runs in one, from Python."""

import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from fusechat.app.errors import UserError
from fusechat.app.labels import labels, report_place
from fusechat.app.outputs import write_json
from fusechat.report import compare as compare_files
from fusechat.report import frames, report, results
from fusechat.report.comparisons import comparisons
from fusechat.report.conclusion import conclusion
from fusechat.report.table import table_of
from tests.conftest import ROOT, Mini
from tests.report.test_statistics import samples


def test_unknown_metric_and_broken_files(fresh: Mini) -> None:
    with pytest.raises(UserError, match=r"holds no evaluations; make one with: python -m fusechat\.evaluate"):
        fresh.run("report")
    fresh.run("evaluate", f"model={fresh.experiment}/world/models/a")
    with pytest.raises(
        UserError, match=r"report\.metric='speed' is in no evaluation; use one of: accuracy, bits_per_byte"
    ):
        fresh.run("report", "report.metric=speed")
    (fresh.experiment / "evaluation/broken.json").write_text('{"metrics"')
    with pytest.raises(UserError, match=r"broken\.json is half-written or not JSON; remove it and evaluate again"):
        fresh.run("report")


def test_table_shows_the_overrides_that_differ(fresh: Mini) -> None:
    for weight in ("0.5", "0.9"):
        fresh.run("train", "source=a", f"run_name=w{weight}", f"loss.lm_weight={weight}")
        fresh.run("evaluate", f"model={fresh.experiment}/targets/w{weight}")
    frame = table_of(results.ordered(results.collect({"mine": fresh.experiment}), "bits_per_byte"))
    assert set(frame["loss.lm_weight"]) == {0.5, 0.9}
    assert "optimizer.lr" not in frame
    assert results.markdown(frame).count("\n") == 4


def test_curves_put_the_rows_of_a_step_together(tmp_path: Path) -> None:
    from fusechat.report.pictures import training_curves

    for part, text in {
        "from_step_0": "step,train/sft,validation/bits_per_byte,wins/all/a\n5,1.0,,\n9,0.8,,\n9,,0.5,\n9,,,0.7\n14,0.1,,\n",
        "from_step_9": "step,train/sft,validation/bits_per_byte,wins/all/a\n14,0.6,,\n19,,0.4,\n",
    }.items():
        (tmp_path / "logs/train-a" / part).mkdir(parents=True)
        (tmp_path / "logs/train-a" / part / "metrics.csv").write_text(text)
    curve = training_curves(tmp_path)["a"].set_index("step")
    assert curve["validation/bits_per_byte"].dropna().to_dict() == {9: 0.5, 19: 0.4}
    assert curve["train/sft"].dropna().to_dict() == {5: 1.0, 9: 0.8, 14: 0.6}, (
        "what the resumed run logged again counts"
    )


def test_results_of_different_tests_are_refused(fresh: Mini, capsys: pytest.CaptureFixture[str]) -> None:
    model = f"model={fresh.experiment}/world/models/pivot"
    fresh.run("evaluate", model)
    fresh.run("evaluate", model, "evaluation.limit=20", f"output_file={fresh.root}/less.json")
    whole, less = f"{fresh.experiment}/evaluation/models-pivot.json", f"{fresh.root}/less.json"
    with pytest.raises(UserError, match="the two results are of different test sets"):
        fresh.run("compare", f"first={whole}", f"second={less}")
    fresh.run("compare", f"first={whole}", f"second={whole}", f"output_file={fresh.root}/c.csv")
    assert "| accuracy | all |" in capsys.readouterr().out
    assert (fresh.root / "c.csv").read_text().count("True") == (fresh.root / "c.csv").read_text().count("\n") - 1, (
        "all within noise"
    )
    (fresh.root / "cut.json").write_text('{"metrics": ')
    with pytest.raises(UserError, match=r"cut\.json is half-written or not JSON; remove it and evaluate again"):
        fresh.run("compare", f"first={whole}", f"second={fresh.root}/cut.json")
    with pytest.raises(UserError, match=r"second is missing; run: python -m fusechat\.compare second=B\.json"):
        fresh.run("compare", f"first={whole}")


def test_from_python(fresh: Mini) -> None:
    for name in ("pivot", "a"):
        fresh.run("evaluate", f"model={fresh.experiment}/world/models/{name}")
    made = report([fresh.experiment], fresh.root / "report", metric="accuracy", baseline="models-pivot", title="mine")
    assert {*made.table["model"]} == {"pivot", "a"}
    assert made.comparisons["against"].tolist() == ["pivot"]
    assert [picture.name for picture in made.pictures][:2] == ["comparisons", "skills"]
    assert all(picture.path.stat().st_size for picture in made.pictures)
    assert pd.read_csv(made.pictures[0].path.with_suffix(".csv"))["model"].tolist() == ["a"]
    page = made.page.read_text()
    assert "<h1>FuseChat: mine</h1>" in page
    assert page.count("<svg") == len(made.pictures)
    assert "Accuracy is the share of exact answers" in page
    assert made.conclusion == "", "nothing was fused yet"
    files = [fresh.experiment / f"evaluation/models-{name}.json" for name in ("pivot", "a")]
    frame = compare_files(*files)
    assert frame.loc[frame.metric == "accuracy", "skill"].tolist()[0] == "all"


def test_the_conclusion_is_computed() -> None:
    rows: list[dict[str, Any]] = [
        {"model": "a", "kind": "pivot and sources", "difference": -0.5, "low": -0.6, "high": -0.4, "verdict": "better"},
        {"model": "target a", "kind": "targets", "difference": -0.02, "low": -0.03, "high": -0.01, "verdict": "better"},
        {"model": "target b", "kind": "targets", "difference": 0.02, "low": 0.01, "high": 0.03, "verdict": "worse"},
        {
            "model": "merged x",
            "kind": "merged models",
            "difference": 0.0,
            "low": -0.1,
            "high": 0.1,
            "verdict": "within noise",
        },
    ]
    frame = pd.DataFrame(
        [row | {"against": "target sft", "metric": "bits_per_byte", "experiment": "e", "tests": "t"} for row in rows]
    )
    assert conclusion(frame) == (
        "Targets against target sft: 1 better, 1 worse, 0 within noise; the best of them, target a, lies 0.0200 below it "
        "in bits per byte (95 % interval of the difference -0.0300 to -0.0100, picked on these very chats). "
        "Merged models against target sft: 0 better, 0 worse, 1 within noise; the best of them, merged x, lies 0.0000 "
        "above it in bits per byte (95 % interval of the difference -0.1000 to +0.1000)."
    )


@pytest.mark.parametrize(("metric", "shift", "verdict"), [("bits_per_byte", 0.3, "worse"), ("accuracy", 0.3, "better")])
def test_a_verdict_knows_which_way_is_better(metric: str, shift: float, verdict: str) -> None:
    rows = [
        {"name": name, "kind": "targets", "tests": "t", "folder": "f", "samples": samples(0)}
        for name in ("targets-a", "targets-b")
    ]
    for sample in rows[1]["samples"]:
        sample["nats"] += shift
        sample["correct"] = True
    (found,) = comparisons(rows, "targets-a", metric).to_dict("records")
    assert (found["model"], found["against"], found["verdict"]) == ("target b", "target a", verdict)


def test_a_report_of_several_runs_lies_in_none_of_them(fresh: Mini, tmp_path: Path) -> None:
    fresh.run("evaluate", f"model={fresh.experiment}/world/models/pivot", "evaluation.generate=false")
    fresh.run("evaluate", f"model={fresh.experiment}/world/models/a")
    other = fresh.root / "mine" / "seed0"
    shutil.copytree(fresh.experiment / "evaluation", other / "evaluation")
    shutil.copytree(fresh.experiment / "aligned", other / "aligned")
    fresh.run("report", f"runs=[{fresh.experiment},{other}]", "report.labels=[first,second]")
    (place,) = (fresh.root / "reports").iterdir()
    assert place.name.startswith("tiny-seed0+mine-seed0-")
    assert not (fresh.experiment / "report").exists()
    table = pd.read_csv(place / "results.csv")
    assert set(table["experiment"]) == {"first", "second"}
    page = (place / "index.html").read_text()
    assert "<h1>FuseChat: first and second</h1>" in page
    assert not re.search(r">(nan|NaN|-0\.0+)<", page)
    assert "nan" not in (place / "results.md").read_text()
    stores = pd.read_csv(place / "alignment.csv")["source"]
    assert {"first: a", "second: a"} <= set(stores), "nothing is written over by another of the same name"
    with pytest.raises(UserError, match=r"report\.labels has 1 names for 2 runs; give one for each"):
        fresh.run("report", f"runs=[{fresh.experiment},{other}]", "report.labels=[first]")
    with pytest.raises(UserError, match=r"is given twice among runs; remove one"):
        labels([other, other])
    assert labels([other]) == ["seed0"]
    assert report_place([str(other)], "x", "y") == f"{other}/report"
    assert report_place(None, "x", "y") == "x/report"


def test_merge_weights_are_placed_by_layer_and_module() -> None:
    groups = {"model.layers.10.mlp.up.weight": [0.4, 0.6], "model.norm.weight": None, "model.layers.2": [1.0, 0.0]}
    found = frames.merge_weights(groups, ["a", "b"])
    assert found["layer"].tolist() == ["layer 2", "layer 10", "outside"] * 2
    assert found["module"].tolist() == ["all", "mlp.up", "model.norm"] * 2
    assert found["weight"].tolist()[:2] == [1.0, 0.4]
    assert math.isnan(found["weight"][2])


def test_the_package_brings_no_library_of_figures_or_tables() -> None:
    code = """
import sys
import fusechat.report.results, fusechat.report.table, fusechat.report.conclusion, fusechat.report.frames, fusechat.report.pictures, fusechat.report.page, fusechat.report.stage
print([m for m in ("matplotlib", "pandas", "scipy", "rich", "torch", "omegaconf") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_pivot_and_sources_are_known_wherever_they_lie(tmp_path: Path) -> None:
    """By the experiment's config; their folder's name is shown whole."""
    own = {"pivot": {"path": "my_models/bard"}, "models": {"clerk": "my_models/clerk"}}
    (tmp_path / "evaluation").mkdir()
    for model in ("my_models/bard", "my_models/clerk", "elsewhere/guest", "runs/x/targets/clerk"):
        name = "-".join(model.split("/")[-2:])
        content = {"name": name, "model": model, "config": own, "samples": [], "metrics": {}}
        write_json(tmp_path / f"evaluation/{name}.json", content)
    found = {results.short(row["name"]): row["kind"] for row in results.collect({"x": tmp_path})}
    assert found == {
        "my_models-bard": "models",
        "my_models-clerk": "models",
        "elsewhere-guest": "elsewhere",
        "target clerk": "targets",
    }


def test_a_caption_tells_of_the_columns_there_are(fresh: Mini) -> None:
    fresh.run("evaluate", f"model={fresh.experiment}/world/models/a", "evaluation.generate=false")
    page = report([fresh.experiment], fresh.root / "report", baseline="models-a").page.read_text()
    assert "Intervals are bootstraps over the test chats. The last columns" in page


def test_metrics_of_ones_own_evaluation_are_columns(tmp_path: Path) -> None:
    entry = {"all": {"value": 0.75, "low": 0.6, "high": 0.9}}
    metrics = {"bits_per_byte": entry, "next_token_accuracy": entry, "parses": entry}
    frame = table_of([{"name": "targets-a", "folder": "x", "model": str(tmp_path), "metrics": metrics}])
    assert frame.to_dict("records") == [
        {"model": "target a", "bits per byte": 0.75, "bits per byte 95 %": "0.6000–0.9000", "parses": 0.75}
    ]


@pytest.mark.parametrize(("tags", "shown"), [(12, 12), (13, 0)])
def test_more_skills_than_one_can_look_at_are_told_together(tags: int, shown: int, tmp_path: Path) -> None:
    told = [{"id": n, "tag": f"t{n:02}", "correct": n % 2 == 0, "nats": 1.0, "bytes": 4} for n in range(tags)]
    value = results.metrics(told, ["accuracy"])
    row = {"name": "targets-a", "folder": "x", "model": str(tmp_path), "samples": told, "metrics": value}
    assert len([column for column in table_of([row]).columns if column.startswith("t")]) == shown
    skills = frames.skills([row])
    assert skills["skill"].tolist() == ([f"t{n:02}" for n in range(tags)] if shown else ["all"])
    assert skills["n"].sum() == tags
