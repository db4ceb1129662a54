"""Alignment with real tokenizers: speed against the released DTW's procedure, maps over whole vocabularies, kinds and
mass.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from rapidfuzz.distance import Levenshtein

from fusechat.align import maps as token_maps
from fusechat.align.nearest import nearest
from fusechat.align.projection import Ragged, gold_path, project
from fusechat.align.sequence import align_offsets, dtw
from fusechat.chats.render import PLAIN_TEMPLATE, ChatRenderer
from fusechat.chats.vocabulary import marker
from fusechat.stores.kinds import KINDS
from tests.benchmarks import tokenizers
from tests.benchmarks.measure import table
from tests.conftest import GOLDEN

PAIRS = [("mistral", "llama3"), ("qwen", "deepseek"), ("mistral", "qwen"), ("llama3", "deepseek")]


def best(work: Callable[[], Any], repeats: int = 5) -> float:
    """Smallest CPU time of one thread."""
    work()
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return min(seconds)


def cell_by_cell(pivot: list[str], source: list[str]) -> np.ndarray:
    """The released procedure: a NumPy matrix filled in a Python loop, one edit distance per cell."""
    total = np.full((len(pivot) + 1, len(source) + 1), np.inf)
    total[0, 0] = 0
    for i, a in enumerate(pivot):
        for j, b in enumerate(source):
            total[i + 1, j + 1] = Levenshtein.distance(a, b) + min(total[i, j + 1], total[i + 1, j], total[i, j])
    return total


def rendered(tokenizer: Any, text: str) -> Any:
    """A text as one assistant turn."""
    tokenizer.bos_token = tokenizer.bos_token or tokenizer.eos_token
    return ChatRenderer(tokenizer, template=PLAIN_TEMPLATE, max_length=10**6)(
        [[{"role": "assistant", "content": text}]]
    )[0]


def speed(known: dict[str, Any]) -> list[list[object]]:
    """DTW and offsets on texts of 512, 900 and 2,048 tokens."""
    rows: list[list[object]] = []
    for size in (512, 900, 2048):
        text = "".join(tokenizers.TEXTS.values()) * 60
        pivot, source = (rendered(known[name], text) for name in PAIRS[0])
        decoded = [
            [known[n].decode([i]) for i in r.input_ids[:size].tolist()]
            for n, r in zip(PAIRS[0], (pivot, source), strict=True)
        ]
        start = time.process_time()
        cell_by_cell(*decoded)
        slow = time.process_time() - start
        ours = best(lambda d=decoded: dtw(*d))  # type: ignore[misc]
        bounds = pivot.boundaries[:size], source.boundaries[:size]
        offsets = best(lambda b=bounds: align_offsets(*b), 20)  # type: ignore[misc]
        rows.append([size, slow, 1e3 * ours, slow / ours, 1e6 * offsets, slow / offsets])
    return rows


def maps(known: dict[str, Any]) -> list[list[object]]:
    """MinED over whole vocabularies, wall seconds on all cores."""
    pivot, source = known["mistral"], known["llama3"]
    nearest(["ab"], ["ac"])
    rows: list[list[object]] = []
    for name, left, right in (("llama3 -> mistral", source, pivot), ("mistral -> llama3", pivot, source)):
        start = time.perf_counter()
        table_ = token_maps.mined(left, right, [])
        rows.append([name, f"{len(left):,} x {len(right):,}", time.perf_counter() - start, float((table_ >= 0).mean())])
    return rows


def golden(known: dict[str, Any]) -> list[list[object]]:
    """Share of source ids for which MinED over the whole vocabularies gives the golden id and distance."""
    rows: list[list[object]] = []
    for file, pivot_name, source_name in (("mistral-v1__llama3", *PAIRS[0]), ("qwen__deepseek", "qwen", "deepseek")):
        wanted, pivot, source = np.load(GOLDEN / f"align/maps_{file}.npz"), known[pivot_name], known[source_name]
        raw = [str(token or "") for token in source.convert_ids_to_tokens(wanted["source_id"].tolist())]
        names = [token.replace(marker(source), marker(pivot)) for token in raw]
        found, distance = nearest(
            names, [str(token or "") for token in pivot.convert_ids_to_tokens(list(range(len(pivot))))]
        )
        equal = (found == wanted["mined_pivot_id"]) & (distance == wanted["mined_distance"])
        rows.append([f"{source_name} -> {pivot_name}", len(raw), f"{equal.mean():.2%}"])
    return rows


def quality(known: dict[str, Any]) -> list[list[object]]:
    """How positions match, the gold token's cross entropy under each map, and beside it the source's own.

    The distributions are made up: the gold token with probability 0.6, nine neighbours by id share 0.3. A piece is the
    text between two places where both tokenizers stand between two characters: where the pivot has one token for it, the
    source's nats for the same text are what `prefix` should keep.
    """
    rows: list[list[object]] = []
    rng = np.random.default_rng(0)
    for pivot_name, source_name in PAIRS:
        pivot, source = known[pivot_name], known[source_name]
        made = {name: getattr(token_maps, name)(source, pivot, []) for name in ("em", "mined", "prefix")}
        for kind, text in tokenizers.TEXTS.items():
            left, right = rendered(pivot, text * 6), rendered(source, text * 6)
            gold, own = left.input_ids[left.positions + 1], right.input_ids[right.positions + 1]
            places = [np.append(r.boundaries, r.end) for r in (left, right)]
            match, kinds = align_offsets(left.boundaries, right.boundaries)
            ids = np.stack([np.concatenate([[g], rng.choice(len(source), 9, replace=False)]) for g in own])
            logprobs = np.log(np.tile(np.array([0.6, *[0.3 / 9] * 9], np.float32), (len(own), 1)))
            ragged = Ragged(
                np.full(len(own), 10),
                ids.reshape(-1),
                logprobs.reshape(-1),
                np.full(len(own), math.log(0.6), np.float32),
            )
            shares = [f"{(kinds == k).mean():.1%}" for k in range(len(KINDS))]
            chains = {name: np.full((len(match), 3), -1) for name in made}
            chains["prefix"] = gold_path(*places, match, own)
            results = {n: project(ragged, match, made[n], gold, chains[n], len(pivot), False) for n in made}
            scores = [score(result, match >= 0) for result in results.values()]
            whole, nats = whole_pieces(*places, right)
            kept = -results["prefix"].gold_logprob[whole].sum() / nats
            rows.append([f"{source_name} -> {pivot_name}", kind, *shares, *scores, f"{kept - 1:+.1%}"])
    return rows


def score(result: Ragged, matched: np.ndarray) -> str:
    """Nats of the gold token where matched, and the share of the source's mass that the map has placed."""
    mass = np.exp(result.logprobs).sum() / max(1, matched.sum()) / 0.9
    return f"{-result.gold_logprob[matched].mean():.3f} / {mass:.0%}"


def whole_pieces(pivot: np.ndarray, source: np.ndarray, read: Any) -> tuple[np.ndarray, float]:
    """Positions of pivot tokens that are a piece of their own, and the source's nats for the same text."""
    _, at, of_source = np.intersect1d(pivot, np.where(source < 0, -2, source), return_indices=True)
    alone = np.flatnonzero(np.diff(at) == 1)
    return at[alone], float(-math.log(0.6) * np.diff(of_source)[alone].sum())


def main() -> None:
    """Prints the tables."""
    known = tokenizers.all_of_them()
    header = ["tokens", "cell by cell CPU s", "dtw ms", "dtw x", "offsets µs", "offsets x"]
    table("sequence alignment, one thread", header, speed(known))
    table("minimum edit distance over whole vocabularies", ["map", "size", "wall s", "mapped"], maps(known))
    table("golden maps over whole vocabularies", ["pair", "source ids", "equal"], golden(known))
    header = [
        "pair",
        "text",
        *KINDS,
        "em nats / mass",
        "mined nats / mass",
        "prefix nats / mass",
        "prefix against the source's own",
    ]
    table("gold token under each map, where matched by offsets", header, quality(known))


if __name__ == "__main__":
    main()
