"""Generate the tiny world's chats and train its pivot and sources.

python -m fusechat.tiny seed=0
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from fusechat.app.command import entry, make_trainer, plain, seed_everything

LOG = logging.getLogger(__name__)


def run(cfg: DictConfig) -> None:
    """Writes ``world/chats/*.jsonl`` and ``world/models/*``; what is there and fits is kept."""
    from fusechat.app.outputs import fingerprint
    from fusechat.tiny.chats import World, generate

    tiny, root = cfg.tiny, Path(cfg.output_dir)
    world = World(cfg.seed)
    files = {
        "fusion": generate(world, tiny.fusion_chats, f"fusion {cfg.seed}", wrong=tiny.wrong_fraction),
        "test": generate(world, tiny.test_chats, f"test {cfg.seed}", held_out=True),
    }
    for name, model in tiny.models.items():
        files[f"train_{name}"] = generate(world, tiny.train_chats, f"{name} {cfg.seed}", weights=plain(model.mixture))
    test = {row["messages"][0]["content"] for row in files["test"]}  # type: ignore[index]
    for name, rows in files.items():
        if name != "test":
            assert not test & {row["messages"][0]["content"] for row in rows}, f"{name} contains test questions"  # type: ignore[index]
        _write(root / "chats" / f"{name}.jsonl", rows)
    for name, model in tiny.models.items():
        mark = fingerprint(seed=cfg.seed, tiny=plain(tiny), model=plain(model))
        target = root / "models" / name
        if (target / "fusechat.json").exists() and json.loads((target / "fusechat.json").read_text())[
            "fingerprint"
        ] == mark:
            LOG.info("skip: %s is trained already (fingerprint %s)", target, mark)
            continue
        _train(cfg, name, files[f"train_{name}"], target, mark)


def _train(cfg: DictConfig, name: str, rows: list[Any], target: Path, mark: str) -> None:
    from fusechat.app.outputs import whole_directory
    from fusechat.chats.render import ChatRenderer
    from fusechat.tiny import models

    spec, tiny = cfg.tiny.models[name], cfg.tiny
    seed_everything(cfg.seed)
    texts = [m["content"] for row in rows for m in row["messages"]]
    tokenizer = models.make_tokenizer(spec.kind, spec.vocab_size, texts)
    model = models.make_model(spec.kind, tokenizer, tiny.width, tiny.layers, tiny.heads)
    renderer = ChatRenderer(tokenizer, max_length=cfg.chat.max_length)
    data = models.Batches(rows, renderer, tiny.batch_size, f"{name} {cfg.seed}", tokenizer.pad_token_id)
    module = models.Pretraining(model, tiny.lr, spec.steps)
    trainer = make_trainer(
        cfg, [], max_epochs=-1, max_steps=spec.steps, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(module, models.loader(data))
    with whole_directory(target, overwrite=True) as directory:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        about = {
            "fingerprint": mark,
            "stage": "tiny",
            "model": name,
            "seed": cfg.seed,
            "parameters": model.num_parameters(),
        }
        (directory / "fusechat.json").write_text(json.dumps(about, indent=1) + "\n")
    loss = float(trainer.callback_metrics["train/loss"])
    LOG.info(
        "%s: %s, %.2fM parameters, %d tokens, last loss %.3f",
        name,
        spec.kind,
        model.num_parameters() / 1e6,
        len(tokenizer),
        loss,
    )


def _write(path: Path, rows: list[dict[str, object]]) -> None:
    from fusechat.app.outputs import write_durably

    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if not path.exists() or path.read_bytes() != data:
        write_durably(path, data)


main = entry("tiny")(run)
if __name__ == "__main__":
    main()
