"""Making the tiny world: chats that are the same for the same seed, and models that are trained once."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fusechat.app.checksums import check_first_use
from fusechat.app.locks import held
from fusechat.app.outputs import RECORD, fingerprint, read_json, tidy, whole_directory, write_durably, write_json
from fusechat.app.places import check_owner, stage_of, writing
from fusechat.app.settings import check
from fusechat.app.trainer import quiet_trainer, seed_everything
from fusechat.models.whole import write_record
from fusechat.tiny.chats import World, generate

LOG = logging.getLogger(__name__)
Row = dict[str, Any]
Spec = Mapping[str, Any]  # a model's kind, vocab_size, steps, and mixture (skill -> relative frequency, or null)


def make(
    output_dir: str | Path,
    *,
    models: Mapping[str, Spec],
    seed: int = 0,
    fusion_chats: int = 2400,
    validation_chats: int = 400,
    test_chats: int = 600,
    train_chats: int = 20000,
    wrong_fraction: float = 0.2,
    width: int = 128,
    layers: int = 3,
    heads: int = 4,
    batch_size: int = 32,
    lr: float = 3.0e-3,
    max_length: int = 2048,
    private: Mapping[str, Spec] | None = None,
    trainer: Mapping[str, Any] | None = None,
) -> Path:
    """Writes ``chats/*.jsonl`` and ``models/NAME`` below ``output_dir``, which it returns.

    models: name -> its `Spec` (kind: llama, gpt_neox, qwen2 or mixtral; width: of its own). private: name -> how many
    chats, of which mixture, ``chats/private_NAME.jsonl`` has: questions that no other of them asks. wrong_fraction:
    share of the fusion and private chats that have a wrong answer; validation chats have none, and ask what no fusion
    chat asks. width, layers, heads, batch_size, lr: of every model and its training. trainer: options of Lightning's
    Trainer. A model that these made is kept; one of other settings is trained again in its place without asking. Raises
    `UserError` for more chats than there are questions.
    """
    check("tiny", wrong_fraction=wrong_fraction, width=width, layers=layers, heads=heads, batch_size=batch_size, lr=lr)
    check(
        "tiny",
        models=models,
        private=private,
        fusion_chats=fusion_chats,
        test_chats=test_chats,
        train_chats=train_chats,
    )
    counts = {"fusion_chats": fusion_chats, "test_chats": test_chats, "train_chats": train_chats}
    tiny: dict[str, Any] = {**counts, "models": models}
    tiny |= {"wrong_fraction": wrong_fraction, "width": width, "layers": layers, "heads": heads}
    tiny |= {"batch_size": batch_size, "lr": lr}
    root = Path(output_dir)
    with writing(root, "world", known=is_world, holds=("tiny",)):
        for name in models:
            check_owner(root / "models" / name, "tiny")
        if not (root / RECORD).exists():
            write_json(root / RECORD, {"stage": "world"})
        _make(root, models, tiny, validation_chats, private or {}, seed, max_length, trainer or {})
    return root


def is_world(folder: Path) -> bool:
    """Whether a folder without a record is a world all the same: chats and models of ours, and nothing else."""
    parts = sorted(path.name for path in folder.iterdir())
    chats = [file.name for file in (folder / "chats").glob("*")]
    ours = all(re.fullmatch(r"(fusion|validation|test|(train|private)_\w+)\.jsonl|\..*\.tmp", name) for name in chats)
    models = [path for path in (folder / "models").glob("*") if not path.name.startswith(".")]
    return parts in (["chats"], ["chats", "models"]) and ours and all(stage_of(model) == "tiny" for model in models)


def _make(
    root: Path,
    models: Mapping[str, Spec],
    tiny: Mapping[str, Any],  # what decides the models
    validation_chats: int,
    private: Mapping[str, Spec],
    seed: int,
    max_length: int,
    trainer: Mapping[str, Any],
) -> None:
    world = World(seed)
    chats = {
        "fusion": generate(world, tiny["fusion_chats"], f"fusion {seed}", wrong=tiny["wrong_fraction"]),
        "test": generate(world, tiny["test_chats"], f"test {seed}", held_out=True),
    }
    chats["validation"] = generate(world, validation_chats, f"validation {seed}", known=_questions(chats["fusion"]))
    known = _questions(chats["validation"])
    for name, spec in private.items():
        options: dict[str, Any] = {"weights": spec["mixture"], "wrong": tiny["wrong_fraction"], "known": known}
        chats[f"private_{name}"] = generate(world, spec["chats"], f"private {name} {seed}", **options)
        known |= _questions(chats[f"private_{name}"])
    for name, spec in models.items():
        chats[f"train_{name}"] = generate(world, tiny["train_chats"], f"{name} {seed}", weights=spec["mixture"])
    write_chats(chats, root / "chats")
    for name, spec in models.items():
        mark, target = fingerprint(seed=seed, tiny=tiny, model=spec), root / "models" / name
        with held(target.resolve()):  # also where it is there: a killed process may have left its lock
            if (target / RECORD).exists() and read_json(target / RECORD).get("fingerprint") == mark:
                LOG.info("skip: %s is trained already (fingerprint %s)", target, mark)
                continue
            about = {"fingerprint": mark, "stage": "tiny", "model": name, "seed": seed}
            train(spec, chats[f"train_{name}"], target, about, tiny, max_length, trainer)


def _questions(rows: Sequence[Row]) -> set[str]:
    return {row["messages"][0]["content"] for row in rows}


def write_chats(chats: Mapping[str, Sequence[Row]], folder: Path) -> None:
    """A file of JSON lines each; one that holds these already is not touched. No training set has a test question."""
    folder.mkdir(parents=True, exist_ok=True)
    tidy(folder)
    test = _questions(chats["test"])
    for name, rows in chats.items():
        known = test & _questions(rows)
        assert name == "test" or not known, f"{name} contains test questions"
        path, data = folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode()
        if not path.exists() or path.read_bytes() != data:
            write_durably(path, data)
        check_first_use(path)


def train(
    spec: Spec,
    rows: Sequence[Row],
    target: Path,
    about: Mapping[str, Any],
    tiny: Mapping[str, Any],
    max_length: int,
    trainer: Mapping[str, Any],
) -> None:
    """Trains one model with its tokenizer on the answers of ``rows``; ``target`` is whole or absent."""
    from fusechat.app.steps import StepsTold
    from fusechat.chats.render import ChatRenderer
    from fusechat.tiny.models import make_model, make_tokenizer
    from fusechat.tiny.training import Batches, Pretraining, loader

    name, seed = about["model"], about["seed"]
    seed_everything(seed)
    texts = [message["content"] for row in rows for message in row["messages"]]
    tokenizer = make_tokenizer(spec["kind"], spec["vocab_size"], texts)
    model = make_model(spec["kind"], tokenizer, spec.get("width", tiny["width"]), tiny["layers"], tiny["heads"])
    renderer = ChatRenderer(tokenizer, max_length=max_length)
    data = Batches(rows, renderer, tiny["batch_size"], f"{name} {seed}", tokenizer.pad_token_id)
    fixed = {"max_epochs": -1, "max_steps": spec["steps"], "enable_checkpointing": False, "enable_progress_bar": False}
    fixed |= {"devices": 1, "num_nodes": 1, "strategy": "auto", "precision": "32-true"}  # the same world for all
    fitting = quiet_trainer({**trainer, **fixed}, [StepsTold(f"train {name}")])
    fitting.fit(Pretraining(model, tiny["lr"], spec["steps"]), loader(data))
    size = model.num_parameters()
    with whole_directory(target, overwrite=True) as directory:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        write_record(directory, {**about, "parameters": size})
    loss = float(fitting.callback_metrics["train/loss"])
    told = "%s: %s, %.2fM parameters, %d tokens, last loss %.3f"
    LOG.info(told, name, spec["kind"], size / 1e6, len(tokenizer), loss)
