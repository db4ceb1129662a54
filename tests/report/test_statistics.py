"""Intervals, paired differences and pooled seeds."""

import math
from typing import Any

import numpy as np
import pytest

from fusechat.app.errors import UserError
from fusechat.report import frames, results
from fusechat.report.comparisons import comparisons
from fusechat.report.conclusion import conclusion
from fusechat.report.statistics import compare, interval, metric_names


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


def test_metrics_that_samples_make() -> None:
    chat = {"id": "1", "tag": "sort", "nats": 1.0, "bytes": 3.0, "tokens": 2.0, "answer": "a"}
    assert metric_names([chat]) == ["bits_per_byte", "nats_per_token"]
    assert metric_names([chat | {"hits": 1.0}])[2:] == ["next_token_accuracy"]
    assert metric_names([chat | {"correct": True}]) == ["bits_per_byte", "nats_per_token", "accuracy"]
    assert metric_names([{"id": 1, "tag": "", "b": 1.0}, {"id": 2, "tag": "", "a": 1}]) == ["a", "b"]


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


def test_skills_have_wilsons_intervals() -> None:
    """8 of 10: 0.4902 to 0.9433 by the closed form (Wilson 1927)."""
    answers = [{"tag": "sort", "correct": n < 8} for n in range(10)]
    (row,) = frames.skills([{"name": "targets-a", "folder": "e", "samples": answers}]).to_dict("records")
    z = 1.959964
    middle, half = (0.8 + z**2 / 20) / (1 + z**2 / 10), z / (1 + z**2 / 10) * math.sqrt(0.8 * 0.2 / 10 + z**2 / 400)
    assert (row["n"], row["correct"]) == (10, 8)
    assert (row["low"], row["high"]) == pytest.approx((middle - half, middle + half), abs=1e-6)
