"""Evaluating a model by any kind of evaluation: what fits is kept, what a kill left is gone on with, results are whole.

An evaluation is cheap beside what it measures: one of other weights or other settings is made again in its place
without asking, unlike stores and models. Only another model's result is never written over (`evaluate.places`).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusechat.app.errors import UserError
from fusechat.app.marks import PARTS, flat
from fusechat.app.outputs import fingerprint, read_json, stage_fingerprint, write_json
from fusechat.app.places import writing
from fusechat.app.settings import check
from fusechat.app.surroundings import check_place
from fusechat.chats.mixture import Given
from fusechat.evaluate import answers as _answers  # noqa: F401  these three register their kinds
from fusechat.evaluate import chats as _chats  # noqa: F401
from fusechat.evaluate import harness as _harness  # noqa: F401
from fusechat.evaluate.kinds import EVALUATIONS, Job, Work
from fusechat.evaluate.notes import note_of, read_note, write_answers

if TYPE_CHECKING:
    from fusechat.stores.served.server import Server

__all__ = ["EVALUATIONS", "evaluate", "evaluate_by"]

LOG = logging.getLogger(__name__)
Settings = Mapping[str, Any]
OURS = ("dtype", "batch_size", "device_map")  # how a model runs here, which no server heeds


def evaluate(
    model: str | Path,
    chats: Given,
    output_file: str | Path,
    *,
    chats_seed: int = 0,
    split: str = "test",
    limit: int | None = None,
    generate: bool = True,
    max_new_tokens: int = 64,
    batch_size: int = 64,
    template: str = "native",
    max_length: int = 2048,
    dtype: str = "float32",
    device: str = "auto",
    device_map: str | None = None,
    trust_remote_code: bool = False,
    seed: int = 0,
    server: Server | None = None,
    overwrite: bool = False,
    record: Mapping[str, Any] | None = None,
    imports: Mapping[str, str] | None = None,
) -> Mapping[str, Any]:
    """Measures a model (directory or Hub id) on held-out chats; writes ``output_file`` (JSON), returns its content.

    ``metrics`` has, for each metric and skill, value, low and high of the 95 % bootstrap interval: bits_per_byte
    (nats of the answers / ln 2 / their UTF-8 bytes), nats_per_token, next_token_accuracy (share of the answers' tokens
    that are likeliest), and with ``generate`` accuracy (exact match of greedy answers). ``samples`` has the same chat
    by chat. A result of the same model, chats and settings is returned as it is there. chats_seed: draws the rows of a
    mixture (`mixture.mixed`). record: kept in the result beside it. imports: the user's own modules with their hashes.
    device: as in `device_of`; it is no part of the fingerprint. server: where the model runs, if not here; of ``model``
    only tokenizer and config are read then. Raises `UserError`.
    """
    settings: dict[str, Any] = {
        "kind": "chats",
        "chats": str(chats) if isinstance(chats, Path) else chats,
        "chats_seed": chats_seed,
        "split": split,
    }
    settings |= {"limit": limit, "template": template}
    settings |= {"generate": generate, "max_new_tokens": max_new_tokens, "batch_size": batch_size, "dtype": dtype}
    settings |= {"max_length": max_length, "device_map": device_map, "trust_remote_code": trust_remote_code}
    settings |= {"device": device}
    more: dict[str, Any] = {"seed": seed, "overwrite": overwrite, "record": record, "imports": imports}
    return evaluate_by(model, settings, output_file, server=server, **more)[0]


def evaluate_by(
    model: str | Path,
    settings: Mapping[str, Any],
    output_file: str | Path,
    *,
    seed: int = 0,
    server: Server | None = None,
    overwrite: bool = False,
    record: Mapping[str, Any] | None = None,
    imports: Mapping[str, str] | None = None,
) -> tuple[Mapping[str, Any], bool]:
    """Any evaluation: ``settings["kind"]`` names it, the rest are its own. Returns its result, and whether made now.

    The result of kinds that write answer files is a summary: fingerprint, model, name and kind.
    """
    path, output = str(model), Path(output_file)
    reads = [model, *(settings.get(key) for key in ("chats", "questions", "include_path"))]
    with writing(output, "evaluate", reads=reads, file=True, known=is_result):
        return _evaluate(path, settings, output, seed, server, overwrite, record or {}, imports)


def is_result(file: Path) -> bool:
    """Whether a file without a record is a result all the same: an answer file with its note, or an old result."""
    if note_of(file).exists():
        return True
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(content, dict) and {"samples", "metrics"} <= set(content)


def _evaluate(
    path: str,
    settings: Mapping[str, Any],
    output: Path,
    seed: int,
    server: Server | None,
    overwrite: bool,
    record: Mapping[str, Any],
    imports: Mapping[str, str] | None,
) -> tuple[Mapping[str, Any], bool]:
    from fusechat.models.load import model_identity

    check_place(path, "model")
    check("evaluation", **settings)
    kind = EVALUATIONS[settings["kind"]]
    work: Work = kind.function(Job(path, output.stem, settings, seed, server))
    there = {} if overwrite else _there(output, work)
    whose = {"model": model_identity(path), "seed": seed}
    counted = _counted(_deciding(settings, server), work.known, there)
    own, *of_old = (stage_fingerprint(imports, evaluation=each, **whose) for each in counted)
    about: dict[str, Any] = {"stage": "evaluate", "kind": kind.name, "name": output.stem, "model": path}
    about |= server.decides if server else {}
    about |= {PARTS: {**own.parts, **flat(work.inputs)}, "asked": fingerprint(mark=own, **work.inputs)}
    mark = about["fingerprint"] = _mark(work, (own, *of_old), there)
    part = output.with_suffix(f".{mark}.part")
    if mark == there.get("fingerprint"):
        part.unlink(missing_ok=True)  # a run that was killed at its very end has left it
        LOG.info("skip: %s is evaluated already (%s, fingerprint %s)", path, output, mark)
        return about if work.answers else there, False
    found = _measured(work, part, settings)
    if work.answers:
        write_answers(output, found["samples"], work, about)
        content: Mapping[str, Any] = about
    else:
        content = _write_result(output, found, about, record)
    part.unlink(missing_ok=True)
    return content, True


def _deciding(settings: Settings, server: Server | None) -> Settings:
    """The settings that decide a result, and the server's part where there is one."""
    beside = {key for key in ("chats_seed", "device") if settings.get(key) is not None}  # the chats drawn count
    beside |= set(OURS) if server else set()
    return {key: value for key, value in settings.items() if key not in beside} | (server.decides if server else {})


def _mark(work: Work, marks: Sequence[str], there: Settings) -> str:
    """The result's fingerprint; the one that is there, where that fits.

    marks: of model, settings and seed, and those of earlier versions.
    """
    counted = [(mark, inputs) for inputs in _inputs(work.inputs, there) for mark in marks]
    if there.get("asked") in [fingerprint(mark=mark, **inputs) for mark, inputs in counted]:
        return str(there["fingerprint"])  # what the model's files say need not be read again
    read = work.read()
    found = [fingerprint(mark=mark, **inputs, **read) for mark, inputs in counted]
    return str(there["fingerprint"]) if there.get("fingerprint") in found else found[0]


def _counted(deciding: Settings, known: Sequence[str], there: Mapping[str, Any]) -> list[Settings]:
    """The settings that decide a result; and those that decided one of earlier versions, which counted where files lie:
    where they lie now, and where they lay when the result that is there was made.
    """
    moved = {key: there.get("config", {}).get("evaluation", {}).get(key, deciding[key]) for key in known}
    return [{key: value for key, value in deciding.items() if key not in known}, deciding, {**deciding, **moved}]


def _inputs(now: Settings, there: Mapping[str, Any]) -> list[Settings]:
    """The inputs that decide a result; and, where the one that is there is of the same tags, those of earlier versions,
    which did not count them.
    """
    tags = fingerprint(tags=[sample["tag"] for sample in there.get("samples", [])])
    return [now, *([{key: value for key, value in now.items() if key != "tags"}] if now.get("tags") == tags else [])]


def _measured(work: Work, part: Path, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    import torch

    try:
        return work.measure(part)
    except torch.OutOfMemoryError:
        raise UserError(
            f"out of memory with evaluation.batch_size={settings.get('batch_size')}: lower it, or spread the model "
            "with evaluation.device_map=auto; what is measured is kept, the same command goes on"
        ) from None


def _there(output: Path, work: Work) -> Mapping[str, Any]:
    """What the result that is there says of itself; nothing where there is none."""
    note = note_of(output) if work.answers else output
    if not output.exists() or not note.exists():
        return {}
    return read_note(note) if work.answers else read_json(output)


def _write_result(
    output: Path, found: Mapping[str, Any], about: Mapping[str, Any], record: Mapping[str, Any]
) -> dict[str, Any]:
    """The result with its metrics and a hash of its test set: results of one test set can be paired."""
    from fusechat.report.results import metrics
    from fusechat.report.statistics import metric_names

    samples = found["samples"]
    if not samples:
        raise UserError(f"{about['model']}: the evaluation has no samples; see evaluation.limit and evaluation.split")
    values = metrics(samples, metric_names(samples))
    tests = fingerprint(ids=[sample["id"] for sample in samples])
    content = {**about, "tests": tests, "metrics": values, **found, **record}
    write_json(output, content)
    shown = ", ".join(f"{name} {entry['all']['value']:.4f}" for name, entry in values.items())
    LOG.info("%s: %s on %d samples; %s", about["model"], shown, len(samples), output)
    return content
