"""Metrics with bootstrap intervals, and paired comparison of two models on the same samples."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fusechat.app.errors import UserError
from fusechat.stores.units import bits

DRAWS = 2000
Sample = Mapping[str, Any]
Floats = npt.NDArray[np.float64]


def metric(samples: Sequence[Sample], name: str) -> tuple[Floats, Floats]:
    """Numerator and denominator per sample; a metric is the ratio of their sums, so that it resamples honestly."""
    if name == "bits_per_byte":
        return np.array([bits(s["nats"]) for s in samples]), np.array([s["bytes"] for s in samples])
    if name == "nats_per_token":
        return np.array([s["nats"] for s in samples]), np.array([s["tokens"] for s in samples])
    if name == "next_token_accuracy":
        return np.array([s["hits"] for s in samples]), np.array([s["tokens"] for s in samples])
    key = "correct" if name == "accuracy" else name
    return np.array([float(s[key]) for s in samples]), np.ones(len(samples))


def metric_names(samples: Sequence[Sample]) -> list[str]:
    """The metrics that the samples' numbers make."""
    keys = {key for sample in samples for key, value in sample.items() if isinstance(value, (int, float))}
    names = ["bits_per_byte", "nats_per_token"] if "nats" in keys else []
    names += ["accuracy"] if "correct" in keys else []
    names += ["next_token_accuracy"] if "hits" in keys else []
    return names + sorted(keys - {"id", "nats", "bytes", "tokens", "hits", "correct"})


def interval(samples: Sequence[Sample], name: str, seed: int = 0) -> dict[str, float]:
    """value with its 95 % percentile bootstrap interval: low, high."""
    top, bottom = metric(samples, name)
    picks = _picks(len(top), seed)
    values = top[picks].sum(1) / bottom[picks].sum(1)
    low, high = np.percentile(values, [2.5, 97.5])
    return {"value": float(top.sum() / bottom.sum()), "low": float(low), "high": float(high), "count": len(top)}


def compare(first: Sequence[Sample], second: Sequence[Sample], name: str, seed: int = 0) -> dict[str, float]:
    """Paired bootstrap of second - first: difference, 95 % interval, two-sided p.

    Raises `UserError` for different test sets.
    """
    if [s["id"] for s in first] != [s["id"] for s in second]:
        raise UserError(
            "the two results are of different test sets; evaluate both models with the same evaluation.chats"
        )
    (a, na), (b, nb) = metric(first, name), metric(second, name)
    picks = _picks(len(a), seed)
    values = b[picks].sum(1) / nb[picks].sum(1) - a[picks].sum(1) / na[picks].sum(1)
    low, high = np.percentile(values, [2.5, 97.5])
    p = 2 * min(float((values <= 0).mean()), float((values >= 0).mean()))
    return {
        "difference": float(b.sum() / nb.sum() - a.sum() / na.sum()),
        "low": float(low),
        "high": float(high),
        "p": min(1.0, max(p, 1 / DRAWS)),
    }


def over_seeds(differences: Sequence[float]) -> dict[str, float]:
    """The mean of a difference over seeds, with Student's 95 % interval and two-sided p: a seed is one observation."""
    from scipy.stats import ttest_1samp

    values = np.array(differences)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Precision loss")  # all but alike: next to no width
        test, mean = ttest_1samp(values, 0.0), float(values.mean())
    bounds = (float(bound) for bound in test.confidence_interval(0.95))
    low, high = (bound if np.isfinite(bound) else mean for bound in bounds)  # all alike: no width
    return {"difference": mean, "low": low, "high": high, "p": float(np.nan_to_num(test.pvalue, nan=1.0))}


def mean_of(runs: Sequence[Sequence[Sample]]) -> list[Sample]:
    """Several models' samples as one model's: every number is their mean, chat by chat.

    Raises `UserError` for different test sets.
    """
    if any([s["id"] for s in run] != [s["id"] for s in runs[0]] for run in runs):
        raise UserError("the baseline's runs are of different test sets; evaluate them with the same evaluation.chats")
    return [_mean(together) for together in zip(*runs, strict=True)]


def _mean(samples: Sequence[Sample]) -> Sample:
    first = samples[0]
    numbers = [key for key, value in first.items() if isinstance(value, (int, float)) and key != "id"]
    return {**first, **{key: float(np.mean([s[key] for s in samples])) for key in numbers}}


def _picks(count: int, seed: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, count, (DRAWS, count))
