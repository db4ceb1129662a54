"""What came of a mutual training: a line for all that a side has learned or practised, and one sentence."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fusechat.app.outputs import RECORD, read_json
from fusechat.mutual.federation import Federation
from fusechat.mutual.messages import bytes_of
from fusechat.mutual.sides import LEARNED, PRACTISED

HELD_OUT = "validation/bits_per_byte"


def lines(federation: Federation) -> Iterator[dict[str, Any]]:
    """A line for everything that a side has learned or practised: held-out numbers, whom it heard, what it sent."""
    names = list(federation.exchange.models)
    for round in range(1, federation.rounds + 2):
        for name in names:
            side = federation.side(name)
            for stage in (LEARNED, PRACTISED):
                if (state := side.at(round, stage)) is None or (round > federation.rounds and stage == PRACTISED):
                    continue
                held = read_json(Path(state.model) / RECORD)
                wins = held["wins"].get("all", {})
                line = {"round": round, "side": name, "stage": stage, "steps": held["steps"]}
                line |= {"bits_per_byte": held["metrics"].get(HELD_OUT)}
                line |= {"learned": 1 - wins.get("pivot", 0.0) if stage == LEARNED else None}
                line |= {f"from_{other}": wins.get(other) for other in names}
                yield line | {"sent_bytes": bytes_of(federation.exchange.place(round, name))}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The lines as CSV."""
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()


def told(
    federation: Federation, rows: Sequence[Mapping[str, Any]], records: Sequence[Mapping[str, Any]], seconds: float
) -> str:
    """What was made, in one sentence for people: each side's first and last held-out number, bytes, time, place."""
    sent = sum(sum(record["bytes"].values()) for record in records)
    numbers = list[str]()
    for name in federation.exchange.models:
        held = [row["bits_per_byte"] for row in rows if row["side"] == name and row["bits_per_byte"] is not None]
        numbers += [f"{name} {held[0]:.3f} -> {held[-1]:.3f}"] if held else []
    held_out = f"held-out bits per byte, first -> last: {', '.join(numbers)}; " if numbers else ""
    what = f"{federation.method}: {federation.rounds} rounds of a server and {len(federation.clients)} clients"
    missed = sum(len(record["missing"]) for record in records)
    gone = f"{missed} times a round went on without a client; " if missed else ""
    return f"{what}; {held_out}{sent:,} bytes sent, in {seconds:.1f} s; {gone}models in {federation.folder}"
