"""Results: metrics resample honestly, tables and comparisons say what differs, pictures and the page hold everything."""

import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from fusechat.app.errors import UserError
from fusechat.app.labels import labels, report_place
from fusechat.report import compare as compare_files
from fusechat.report import frames, report, results
from fusechat.report.comparisons import comparisons
from fusechat.report.conclusion import conclusion
from fusechat.report.statistics import compare, interval, metric_names
from fusechat.report.table import table_of
from tests.conftest import ROOT, Mini


def samples(seed: int, shift: float = 0.0, n: int = 200) -> list[dict[str, Any]]:
    rng, noise = np.random.default_rng(0), np.random.default_rng(seed)
    base = rng.gamma(2, 2, n)
    return [
        {"id": i, "nats": b + shift + 0.1 * e, "bytes": 5, "tokens": 4, "correct": b < 4}
        for i, (b, e) in enumerate(zip(base, noise.normal(size=n), strict=True))
    ]


def test_intervals_cover_the_value_and_pairing_sees_small_differences() -> None:
    first, second, same = samples(1), samples(2, 0.1), samples(3)
    entry = interval(first, "bits_per_byte")
    assert entry["low"] < entry["value"] < entry["high"]
    assert entry["value"] == pytest.approx(sum(s["nats"] for s in first) / np.log(2) / 1000)
    found = compare(first, second, "bits_per_byte")
    assert found["low"] > 0
    assert found["p"] < 0.01
    assert found["high"] - found["low"] < 0.2 * (entry["high"] - entry["low"]), (
        "pairing takes the samples' own spread out"
    )
    assert compare(first, same, "bits_per_byte")["p"] > 0.01
    with pytest.raises(UserError, match="different test sets"):
        compare(first, second[1:], "bits_per_byte")


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


def test_metrics_that_samples_make() -> None:
    chat = {"id": "1", "tag": "sort", "nats": 1.0, "bytes": 3.0, "tokens": 2.0, "answer": "a"}
    assert metric_names([chat]) == ["bits_per_byte", "nats_per_token"]
    assert metric_names([chat | {"hits": 1.0}])[2:] == ["next_token_accuracy"]
    assert metric_names([chat | {"correct": True}]) == ["bits_per_byte", "nats_per_token", "accuracy"]
    assert metric_names([{"id": 1, "tag": "", "b": 1.0}, {"id": 2, "tag": "", "a": 1}]) == ["a", "b"]


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


def evaluated(name: str, tests: int, nats: float) -> dict[str, Any]:
    """An evaluation of a test set of its own, each chat of so many nats more than the chat's own."""
    chats = [sample | {"nats": sample["nats"] + nats, "id": f"{tests}-{n}"} for n, sample in enumerate(samples(tests))]
    return {"name": name, "kind": name.split("-")[0], "tests": str(tests), "folder": f"seed{tests}", "samples": chats}


def test_several_runs_of_the_baseline_are_their_mean() -> None:
    rows = [evaluated(f"targets-{name}", 0, nats) for name, nats in (("a", 0.0), ("sft_1", 0.3), ("sft_2", 0.7))]
    found = comparisons(rows, None, "bits_per_byte").set_index("model")
    assert set(found["against"]) == {"target sft_* (mean of 2)"}
    middle = comparisons([rows[0], evaluated("targets-sft", 0, 0.5)], None, "bits_per_byte").set_index("model")
    numbers = ["difference", "low", "high", "p"]
    assert found.loc["target a", numbers].tolist() == pytest.approx(middle.loc["target a", numbers].tolist(), abs=1e-4)
    own = found.loc[["target sft_1", "target sft_2"]]
    assert set(own["kind"]) == {"baseline, run by run"}
    assert own["difference"].sum() == pytest.approx(0, abs=1e-3)
    assert "against target sft_* (mean of 2): 1 better, 0 worse, 0 within noise" in conclusion(found.reset_index())


def test_seeds_are_pooled_by_their_differences() -> None:
    """Student's interval by its formula: mean ± t s / √n, t = 4.30265 for two degrees of freedom."""
    rows = [evaluated("targets-sft", seed, 0.5) for seed in range(3)]
    rows += [evaluated("targets-a", seed, 0.1 * seed) for seed in range(3)]
    rows += [evaluated("targets-lonely", 1, 0.0)]
    found = comparisons(rows, None, "bits_per_byte")
    each = found[(found["model"] == "target a") & (found["experiment"] != "pooled")]
    assert each["experiment"].tolist() == ["seed0", "seed1", "seed2"]
    (pooled,) = found[found["experiment"] == "pooled"].to_dict("records")
    differences = each["difference"].to_numpy()
    half = 4.30265 * differences.std(ddof=1) / math.sqrt(3)
    assert pooled["model"] == "target a", "the others are not on every test set"
    assert pooled["difference"] == pytest.approx(differences.mean(), abs=1e-4)
    assert (pooled["low"], pooled["high"]) == pytest.approx(
        (differences.mean() - half, differences.mean() + half), abs=3e-4
    )
    assert conclusion(found).count("target a") == 1


def test_skills_are_pooled_by_the_differences_of_their_seeds() -> None:
    """Counted by loops; Student's factor 12.7062 for one degree of freedom."""
    rng, rows = np.random.default_rng(4), []
    for seed in range(2):
        for name, chance in (
            ("targets-sft_1", 0.3),
            ("targets-sft_2", 0.4),
            ("targets-a", 0.6),
            ("merged-c", 0.1),
            ("models-b", 0.1),
        ):
            row = evaluated(name, seed, 0.0)
            for n, sample in enumerate(row["samples"]):
                sample |= {"tag": "sort" if n % 3 else "", "correct": bool(rng.random() < chance)}
            rows.append(row)
    rows.append(evaluated("targets-unanswered", 0, 0.0))
    for sample in rows[-1]["samples"]:
        del sample["correct"]
    found = frames.skills_pooled(rows, None)
    assert found["skill"].tolist() == ["all", "all", "sort", "sort"] and "b" not in set(found["model"])
    assert set(found["seeds"]) == {2} and found["n"].tolist() == [400, 400, 266, 266]
    for line in found.to_dict("records"):
        gaps = []
        for seed in range(2):
            share = {}
            for row in rows[5 * seed : 5 * seed + 5]:
                hits = [s["correct"] for s in row["samples"] if line["skill"] in ("all", s["tag"])]
                share[results.short(row["name"])] = sum(hits) / len(hits)
            gaps.append(share[line["model"]] - (share["target sft_1"] + share["target sft_2"]) / 2)
        mean, half = sum(gaps) / 2, 12.7062 * abs(gaps[0] - gaps[1]) / 2
        wanted = (mean, mean - half, mean + half)
        assert (line["difference"], line["low"], line["high"]) == pytest.approx(wanted, abs=3e-4), line
        assert line["verdict"] == ("within noise" if abs(mean) <= half else "better" if mean > 0 else "worse")
    assert len(frames.skills_pooled(rows[:5], None)) == 0, "one seed is not pooled"
    assert len(frames.skills_pooled(rows, "targets-unanswered")) == 0, "the baseline has no answers"
    assert set(frames.skills_pooled(rows, "targets-sft_1")["against"]) == {"target sft_1"}


def of(experiment: str, name: str, tests: int, nats: float) -> dict[str, Any]:
    return evaluated(name, tests, nats) | {"folder": experiment}


def test_experiments_on_one_test_set_share_an_axis_each_against_its_own_baseline() -> None:
    rows = [of("one", "targets-sft", 0, 0.5), of("one", "targets-a", 0, 0.2)]
    rows += [of("two", "targets-sft", 0, 0.1), of("two", "targets-a", 0, 0.2), of("bare", "targets-a", 0, 0.2)]
    found = comparisons(rows, None, "bits_per_byte")
    assert found["model"].tolist() == ["one: target a", "two: target a", "bare: target a"]
    assert found["verdict"].tolist()[:2] == ["better", "worse"]
    assert found["tests"].nunique() == 1
    assert "pooled" not in found["experiment"].tolist(), "these differ in more than a seed"
    assert conclusion(found).startswith("Targets against target sft: ")


def test_seeds_of_two_experiments_are_pooled_apart() -> None:
    rows = []
    for family, gain in (("old", 0.3), ("new", 0.6)):
        for seed in range(2):
            rows += [
                of(f"{family}/seed{seed}", f"targets-{n}", seed, d)
                for n, d in (("sft", 1.0), ("a", 1.0 - gain - 0.02 * seed))
            ]
    pooled = comparisons(rows, None, "bits_per_byte").query("experiment == 'pooled'").set_index("model")
    assert pooled.index.tolist() == ["old: target a", "new: target a"]
    gains = [-0.31 / 5 / math.log(2), -0.61 / 5 / math.log(2)]
    assert pooled["difference"].tolist() == pytest.approx(gains, abs=1e-4)
    assert not pooled[["low", "high", "p"]].isna().any().any()


def test_what_is_held_out_foretells_the_test() -> None:
    """Ranks 1 2 3 4 against 1 2 4 3: ρ = 1 − 6 · 2 / (4 · 15) = 0.8."""
    values = {"a": (0.1, 0.5), "b": (0.2, 0.6), "c": (0.3, 0.8), "d": (0.4, 0.7)}
    rows = [
        {"folder": "e", "name": f"targets-{name}", "kind": "targets", "metrics": {"m": {"all": {"value": test}}}}
        for name, (_, test) in values.items()
    ]
    records = {("e", n): {"metrics": {"validation/bits_per_byte": held}} for n, (held, _) in values.items()}
    assert frames.objective(rows, records, "m")["correlation"].tolist() == [0.8] * 4
    assert not len(frames.objective(rows[:2], records, "m"))


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


def test_skills_have_wilsons_intervals() -> None:
    """8 of 10: 0.4902 to 0.9433 by the closed form (Wilson 1927)."""
    answers = [{"tag": "sort", "correct": n < 8} for n in range(10)]
    (row,) = frames.skills([{"name": "targets-a", "folder": "e", "samples": answers}]).to_dict("records")
    z = 1.959964
    middle, half = (0.8 + z**2 / 20) / (1 + z**2 / 10), z / (1 + z**2 / 10) * math.sqrt(0.8 * 0.2 / 10 + z**2 / 400)
    assert (row["n"], row["correct"]) == (10, 8)
    assert (row["low"], row["high"]) == pytest.approx((middle - half, middle + half), abs=1e-6)


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
