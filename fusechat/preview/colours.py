"""Readings as coloured text, for a terminal and, recorded there, for a page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from fusechat.app.outputs import write_durably
from fusechat.chats.render import Rendered
from fusechat.preview.reading import Reading
from fusechat.stores.kinds import KINDS

CONTEXT, CUT = ("dim", "dim underline"), "strike red"  # neighbouring tokens differ, so that their borders show
TRAINED = ("black on bright_green", "black on green")
KIND_STYLES = dict(
    zip(
        KINDS,
        ("black on green", "black on bright_cyan", "black on bright_yellow", "white on red", "black on bright_magenta"),
        strict=True,
    )
)
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Chats as they will be trained on</title>
<style>{stylesheet} body {{ color: {foreground}; background: {background}; margin: 1em; }}
@media (max-width: 500px) {{ body {{ font-size: 11px; }} }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; font-family: monospace; }}</style></head>
<body><pre><code>{code}</code></pre></body></html>
"""


def numbers_table(readings: Sequence[Reading]) -> Table:
    """A column per tokenizer: how many tokens, how much is trained on, what is cut or has no answer."""
    table, numbers = Table("chats as read by"), [reading.numbers() for reading in readings]
    for reading in readings:
        table.add_column(reading.name, justify="right")
    table.add_row("vocabulary", *(f"{len(reading.tokenizer):,}" for reading in readings))
    for key, label in {"chats": "chats", "tokens": "tokens", "longest": "longest chat"}.items():
        table.add_row(label, *(f"{n[key]:,}" for n in numbers))
    for key, label in {"trained": "trained on", "cut": "chats cut", "without_answer": "no answer"}.items():
        table.add_row(label, *(f"{n[key]:.1%}" for n in numbers))
    return table


def kinds_table(shares: Mapping[str, Mapping[str, float]], sequence: str) -> Table:
    """A row per source: the share of the pivot's positions by the kind of partner they find."""
    table = Table(f"partners by {sequence}")
    for kind in KINDS:
        table.add_column(Text(f" {kind} ", KIND_STYLES[kind]), justify="right")
    for source, of in shares.items():
        table.add_row(source, *(f"{of[kind]:.1%}" for kind in KINDS))
    return table


def lost_table(shares: Mapping[str, Mapping[str, float]]) -> Table:
    """A column per source: what the positions without a partner predict, as shares of all positions."""
    table = Table("no partner")
    for source in shares:
        table.add_column(source, justify="right")
    for name in next(iter(shares.values())):
        table.add_row(name, *(f"{of[name]:.1%}" for of in shares.values()))
    return table


def one_chat(
    readings: Sequence[Reading], kinds: Mapping[str, Sequence[npt.NDArray[Any]]], number: int
) -> Iterator[Group]:
    """A chat as each model reads it, the pivot first, and where each source speaks for the pivot's tokens."""
    for reading in readings:
        yield shown(number, f"as {reading.name} reads it", trained(reading.rendered[number]))
    for name, found in kinds.items():
        text = met(readings[0].rendered[number], found[number])
        yield shown(number, f"where {name} speaks for the pivot's tokens", text)


def trained(chat: Rendered) -> Text:
    """A chat with the tokens that are trained on in colour; what lies beyond the last token is struck out."""
    styles = [(TRAINED if mask else CONTEXT)[i % 2] for i, mask in enumerate(chat.assistant_mask)]
    return _coloured(chat, styles)


def met(chat: Rendered, kinds: npt.NDArray[Any]) -> Text:
    """A chat with each predicted token in the colour of the partner that its distribution comes from."""
    styles = [CONTEXT[0]] * len(chat.input_ids)
    for position, kind in zip(chat.positions, kinds, strict=True):
        styles[position + 1] = KIND_STYLES[KINDS[kind]]
    return _coloured(chat, styles)


def shown(number: int, title: str, text: Text) -> Group:
    """A chat under its heading."""
    return Group(Text(f"\nchat {number}, {title}", "bold"), text)


def write_page(console: Console, path: Path) -> None:
    """What a recording console has printed, as a page of its own."""
    write_durably(path, console.export_html(code_format=PAGE, clear=False).encode())


def is_page(file: Path) -> bool:
    """Whether a file is such a page."""
    head = PAGE.partition("<style>")[0].encode()
    with file.open("rb") as opened:
        return opened.read(len(head)) == head


def _coloured(chat: Rendered, styles: Sequence[str]) -> Text:
    text, at = Text(), 0
    for (first, end), style in _spans(chat, styles):
        text.append(chat.text[at:first], "dim")
        text.append(chat.text[first:end], style)
        at = end
    if chat.truncated:
        text.append(chat.text[at:], CUT)
    else:
        text.append(chat.text[at:], "dim")
    return text


def _spans(chat: Rendered, styles: Sequence[str]) -> Iterator[tuple[tuple[int, int], str]]:
    """Characters and style of each token that adds characters: bytes of one character are one piece."""
    at = 0
    for (first, end), style in zip(chat.char_spans.tolist(), styles, strict=True):
        if end > at:
            yield (max(first, at), end), style
            at = end
