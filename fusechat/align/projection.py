"""Projection: a source's sparse distributions, brought onto the pivot's tokens. What no map can place stays tail mass."""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np
import numpy.typing as npt

from fusechat.align.sequence import Ints

Floats = npt.NDArray[np.float32]
FLOOR = 1e-6  # probabilities below are left to the tail


@dataclass(frozen=True)
class Ragged:
    """Distributions of one chat, end to end: counts [N] entries each; ids, logprobs [sum(counts)]; gold_logprob [N]."""

    counts: npt.NDArray[np.int64]
    ids: Ints
    logprobs: Floats
    gold_logprob: Floats


def project(
    source: Ragged, match: Ints, table: Ints, gold: Ints, chain: Ints, pivot_size: int, unmatched_gold: bool
) -> Ragged:
    """The source's distributions at the matched positions, on the pivot's ids.

    match [N]: source position for each pivot position, -1 none. table: source id -> pivot id or -1. gold [N]: the
    pivot's next tokens. chain [N, 3]: see `gold_path`; all -1 turns the chain rule off. Mass of several source tokens
    that land on one pivot token is added. gold_logprob is the gold token's; where it is not among the entries, its
    share of a tail spread evenly. Unmatched positions: one entry with the gold token, or none.
    """
    starts = np.concatenate([[0], np.cumsum(source.counts)])
    counts, ids, probs, gold_p = _project(
        starts,
        source.ids.astype(np.int64),
        np.exp(source.logprobs),
        np.exp(source.gold_logprob),
        match,
        table,
        gold.astype(np.int64),
        chain,
        pivot_size,
        unmatched_gold,
    )
    return Ragged(counts, ids, np.log(probs), np.log(gold_p))


def gold_path(pivot: Ints, source: Ints, match: Ints, source_gold: Ints) -> Ints:
    """Where each pivot token's text lies on the source's gold path, [N, 3]: first and last source position, its first id.

    last = -1 where the source's token reaches beyond the pivot's; all -1 where there is no partner.
    """
    return _gold_path(pivot.astype(np.int64), source.astype(np.int64), match, source_gold.astype(np.int64))  # type: ignore[no-any-return]


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _gold_path(pivot, source, match, source_gold):  # type: ignore[no-untyped-def]
    n, m = len(pivot), len(source)
    path = np.full((n, 3), -1, np.int64)
    for i in range(n):
        if match[i] < 0:
            continue
        end = pivot[i + 1] if i + 1 < n else pivot[i] + 1  # turns are one character apart: the turn's end takes it
        j = match[i]
        path[i, 0], path[i, 2] = j, source_gold[j]
        while end >= 0 and j < m:
            following = source[j + 1] if j + 1 < m else source[j] + 1
            if following == end:
                path[i, 1] = j
            if following < 0 or following < end:
                j += 1
                continue
            break
    return path


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _project(starts, ids, probs, gold_probs, match, table, gold, chain, pivot_size, unmatched_gold):  # type: ignore[no-untyped-def]
    n = len(match)
    room = 0
    for i in range(n):
        room += starts[match[i] + 1] - starts[match[i]] + 1 if match[i] >= 0 else 1
    counts = np.zeros(n, np.int64)
    out_ids, out = np.empty(room, np.int64), np.empty(room, np.float32)
    gold_out = np.empty(n, np.float32)
    at = 0
    for i in range(n):
        begin, j = at, match[i]
        if j < 0:
            if unmatched_gold:
                out_ids[at], out[at] = gold[i], 1.0
                at += 1
            counts[i], gold_out[i] = at - begin, 1.0
            continue
        special = chain[i, 2]
        rest = np.float32(0.0)
        if special >= 0:  # the gold token by the chain rule along the source's own tokens
            p = gold_probs[j]
            if chain[i, 1] >= 0:
                for k in range(j + 1, chain[i, 1] + 1):
                    p *= gold_probs[k]
            out_ids[at], out[at] = gold[i], p
            at += 1
            rest = gold_probs[j] - p
        for e in range(starts[j], starts[j + 1]):
            mass, target = probs[e], table[ids[e]]
            if ids[e] == special:
                mass = rest
                if target == gold[i]:
                    mass = np.float32(0.0)
            if target < 0 or mass <= 1e-6:
                continue
            k = begin
            while k < at and out_ids[k] != target:
                k += 1
            if k == at:
                out_ids[k], out[k] = target, 0.0
                at += 1
            out[k] += mass
        kept, gold_p = np.float32(0.0), np.float32(0.0)
        for a in range(begin + 1, at):  # insertion sort, most likely first: rows are short
            p, t, b = out[a], out_ids[a], a
            while b > begin and out[b - 1] < p:
                out[b], out_ids[b] = out[b - 1], out_ids[b - 1]
                b -= 1
            out[b], out_ids[b] = p, t
        for a in range(begin, at):
            kept += out[a]
            if out_ids[a] == gold[i]:
                gold_p = out[a]
        counts[i] = at - begin
        tail = max(np.float32(1e-6), np.float32(1.0) - kept)
        gold_out[i] = gold_p if gold_p > 0 else tail / max(1, pivot_size - counts[i])
    return counts, out_ids[:at], out[:at], gold_out
