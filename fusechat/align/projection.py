"""Projection: a source's sparse distributions, brought onto the pivot's tokens. What no map can place stays tail mass.

p(u): the source's probability of its token u at a position; P(v): what becomes of it on the pivot's token v;
map: source id -> pivot id; g: the gold token, the pivot's next one.

    P(v) = sum of p(u) over the kept u with map(u) = v

With the chain rule, where g's text consists of the source's gold tokens u_1 … u_n, the gold token's mass is

    C = p(u_1) p(u_2 | u_1) … p(u_n | u_1 … u_n-1)

in place of p(u_1), and p(u_1) - C, the mass of texts that begin with u_1 and go on otherwise, stays with map(u_1);
it is left to the tail where map(u_1) is g itself. Where entries are samples, p(u) is u's share of the draws, whose
expectation is its probability, and so is the share of u_1 that is split: g gets its part C / p(u_1), the rest stays.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numba
import numpy as np
import numpy.typing as npt

from fusechat.align.nearest import Ints

Floats = npt.NDArray[np.float32]
FLOOR = 1e-6  # probabilities up to here are left to the tail


@dataclass(frozen=True)
class Ragged:
    """Distributions of one chat, end to end: counts [N] entries each; ids, logprobs [sum(counts)]; gold_logprob [N]."""

    counts: npt.NDArray[np.int64]
    ids: Ints
    logprobs: Floats
    gold_logprob: Floats

    @property
    def starts(self) -> Ints:
        """Where each position's entries begin, [N + 1]: position n has the entries starts[n] to starts[n + 1]."""
        return np.concatenate([[0], np.cumsum(self.counts)])


def project(
    source: Ragged,
    match: Ints,
    table: Ints,
    gold: Ints,
    chain: Ints,
    pivot_size: int,
    unmatched_gold: bool,
    drawn: bool = False,
) -> Ragged:
    """The source's distributions at the matched positions, on the pivot's ids, most likely first.

    match [N]: source position for each pivot position, -1 none. table: source id -> pivot id or -1. gold [N]: the
    pivot's next tokens. chain [N, 3]: see `gold_path`; all -1 turns the chain rule off. drawn: entries are samples.
    gold_logprob is the gold token's: C and what else is mapped to it, without the chain rule its entry; where there is
    neither, its share of a tail spread evenly over the rest of the pivot's ``pivot_size`` tokens. Unmatched positions:
    one entry with the gold token, or none.
    """
    ids, gold = source.ids.astype(np.int64), gold.astype(np.int64)
    probs, gold_probs = np.exp(source.logprobs), np.exp(source.gold_logprob)
    counts, ids, probs, gold_p = _project(
        source.starts, ids, probs, gold_probs, match, table, gold, chain, pivot_size, unmatched_gold, drawn
    )
    return Ragged(counts, ids, np.log(probs), np.log(gold_p))


def ranked(source: Ragged, match: Ints) -> Ragged:
    """The source's distributions at the matched positions with ranks for ids: all that ULD needs. match [N]."""
    starts, matched = source.starts, match >= 0
    spans = [np.arange(starts[j], starts[j + 1]) if j >= 0 else np.empty(0, np.int64) for j in match]
    entries = np.concatenate([np.empty(0, np.int64), *spans]).astype(np.int64)
    ranks = np.concatenate([np.empty(0, np.int64), *(np.arange(len(span)) for span in spans)]).astype(np.int64)
    gold = np.zeros(len(match), np.float32)
    gold[matched] = source.gold_logprob[match[matched]]
    return Ragged(np.array([len(span) for span in spans], np.int64), ranks, source.logprobs[entries], gold)


def with_ranks(result: Ragged, pivot_size: int) -> Ragged:
    """Ids beyond the pivot's become ``pivot_size`` + r: the r-th most likely token that its vocabulary lacks."""
    beyond = result.ids >= pivot_size
    before = np.concatenate([[0], np.cumsum(beyond)])
    rank = before[:-1] - np.repeat(before[result.starts[:-1]], result.counts)
    return replace(result, ids=np.where(beyond, pivot_size + rank, result.ids))


def gold_path(pivot: Ints, source: Ints, match: Ints, source_gold: Ints) -> Ints:
    """Where each pivot token's text lies on the source's gold path, [N, 3]: u_1's position, u_n's position, u_1's id.

    pivot [N + 1], source [M + 1]: places, see `fusechat.stores.common`. source_gold [M]: the source's next tokens.
    u_n's position is -1 where no source token ends with the pivot's (the last reaches beyond it: C = p(u_1)); all are
    -1 where there is no partner.
    """
    path: Ints = _gold_path(pivot.astype(np.int64), source.astype(np.int64), match, source_gold.astype(np.int64))
    return path


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _gold_path(pivot, source, match, source_gold):  # type: ignore[no-untyped-def]
    n, m = len(match), len(source_gold)
    path = np.full((n, 3), -1, np.int64)
    for i in range(n):
        if match[i] < 0:
            continue
        end, j = pivot[i + 1], match[i]
        path[i, 0], path[i, 2] = j, source_gold[j]
        while end >= 0 and j < m:
            if source[j + 1] == end:
                path[i, 1] = j
            if source[j + 1] >= end:
                break
            j += 1
    return path


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _project(  # type: ignore[no-untyped-def]
    starts, ids, probs, gold_probs, match, table, gold, chain, pivot_size, unmatched_gold, drawn
):
    n, room = len(match), _room(starts, match)
    counts, gold_out = np.zeros(n, np.int64), np.empty(n, np.float32)
    out_ids, out = np.empty(room, np.int64), np.empty(room, np.float32)
    end = 0
    for i in range(n):
        begin, j = end, match[i]
        if j < 0:
            if unmatched_gold:
                out_ids[end], out[end] = gold[i], 1.0
                end += 1
            counts[i], gold_out[i] = end - begin, 1.0
            continue
        first_id, chained, part = chain[i, 2], np.float32(0.0), np.float32(0.0)  # u_1, C, C / p(u_1)
        if first_id >= 0:
            chained = _chained(gold_probs, j, chain[i, 1])
            part = chained / gold_probs[j] if gold_probs[j] > 0 else part
        if first_id >= 0 and not drawn:
            out_ids[end], out[end] = gold[i], chained
            end += 1
        beside = np.float32(0.0)  # what other tokens than u_1 have on the gold token
        for e in range(starts[j], starts[j + 1]):
            mass, target = probs[e], table[ids[e]]
            if ids[e] == first_id:
                share = probs[e] if drawn else gold_probs[j]
                if drawn and part * share > FLOOR:
                    end = _add(out_ids, out, begin, end, gold[i], part * share)
                mass = np.float32(0.0) if target == gold[i] else share - part * share
            elif target == gold[i] and mass > FLOOR:
                beside += mass
            if target < 0 or mass <= FLOOR:
                continue
            end = _add(out_ids, out, begin, end, target, mass)
        _sort(out_ids, out, begin, end)
        counts[i] = end - begin
        known = chained + beside
        gold_out[i] = known if known > 0 else _tail_share(out, begin, end, pivot_size)
    return counts, out_ids[:end], out[:end], gold_out


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _room(starts, match):  # type: ignore[no-untyped-def]
    """The most entries that the positions can have: those of their partners, and a gold token each."""
    room = len(match)
    for j in match:
        if j >= 0:
            room += starts[j + 1] - starts[j]
    return room


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _chained(gold_probs, first, last):  # type: ignore[no-untyped-def]
    """The product of the gold probabilities from ``first`` to ``last``; the first alone where last is -1."""
    p = gold_probs[first]
    for k in range(first + 1, last + 1):
        p *= gold_probs[k]
    return p


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _add(ids, probs, begin, end, target, mass):  # type: ignore[no-untyped-def]
    """Adds mass to the entry of ``target`` among begin .. end, a new one where there is none; returns the new end."""
    k = begin
    while k < end and ids[k] != target:
        k += 1
    if k == end:
        ids[k], probs[k] = target, 0.0
        end += 1
    probs[k] += mass
    return end


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _sort(ids, probs, begin, end):  # type: ignore[no-untyped-def]
    """Insertion sort of the entries begin .. end, most likely first: rows are short."""
    for a in range(begin + 1, end):
        p, token, b = probs[a], ids[a], a
        while b > begin and probs[b - 1] < p:
            probs[b], ids[b] = probs[b - 1], ids[b - 1]
            b -= 1
        probs[b], ids[b] = p, token


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def _tail_share(probs, begin, end, pivot_size):  # type: ignore[no-untyped-def]
    """The share of a token that is not among the entries in the mass that they lack, spread evenly over all such."""
    tail = max(np.float32(FLOOR), np.float32(1.0) - probs[begin:end].sum())
    return tail / max(1, pivot_size - (end - begin))
