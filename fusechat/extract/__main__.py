"""Run one source over the chats and store its next-token distributions.

python -m fusechat.extract experiment=tiny source=a
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from fusechat.app.command import entry, make_trainer, plain, seed_everything
from fusechat.app.errors import one_of
from fusechat.app.tracking import log_made, wandb_run

LOG = logging.getLogger(__name__)


def run(cfg: DictConfig) -> None:
    """Extracts ``cfg.source`` over ``cfg.chat`` into ``output_dir``; goes on where an earlier run stopped."""
    from fusechat.app import outputs
    from fusechat.chats.formats import load_chats
    from fusechat.chats.render import renderer_for
    from fusechat.extract.module import ExtractionModule, ShardBatches
    from fusechat.extract.writer import ShardWriter, numbers, summary
    from fusechat.models import load as models
    from fusechat.stores import store

    one_of(cfg.extract.kind, ("top_k", "top_p", "sampled"), "extract.kind")
    one_of(cfg.store.logprobs, ("float16", "uint8"), "store.logprobs")
    source, output = cfg.source, Path(cfg.output_dir)
    trust = {"revision": source.revision, "trust_remote_code": source.trust_remote_code}
    tokenizer = models.load_tokenizer(source.path, **trust)
    pivot_tokenizer = models.load_tokenizer(cfg.pivot.path, revision=cfg.pivot.revision)
    chats, found = load_chats(
        cfg.chat.path, split=cfg.chat.split, name=cfg.chat.name, limit=cfg.chat.limit, streaming=cfg.chat.streaming
    )
    renderer = renderer_for(tokenizer, pivot_tokenizer, cfg.chat.template, cfg.chat.max_length, cfg.chat.end_of_turn)
    chats_mark = outputs.fingerprint(ids=list(chats["id"]))
    mark = outputs.fingerprint(
        model=models.model_identity(source.path, source.revision),
        tokenizer=models.tokenizer_identity(tokenizer),
        chats=chats_mark,
        template=renderer.template,
        max_length=cfg.chat.max_length,
        end_of_turn=cfg.chat.end_of_turn,
        extract={k: v for k, v in plain(cfg.extract).items() if k != "max_bad_fraction"},
        store=plain(cfg.store),
        dtype=source.dtype,
    )
    held = store.read_manifest(output)
    if held and held["fingerprint"] == mark:
        LOG.info("skip: %s holds these distributions already (fingerprint %s)", output, mark)
        return
    if cfg.overwrite:
        store.remove(output)
    LOG.info("%s: %d chats (%s) from %s", source.name, len(chats), found, cfg.chat.path)
    seed_everything(cfg.seed)
    writer = store.StoreWriter(output, mark, -(-len(chats) // cfg.extract.rows_per_shard))
    module = ExtractionModule(
        path=source.path,
        dtype=source.dtype,
        attn_implementation=source.attn_implementation,
        device_map=source.device_map,
        load_in=source.load_in,
        kind=cfg.extract.kind,
        top_k=cfg.extract.top_k,
        top_p=cfg.extract.top_p,
        draws=cfg.extract.draws,
        seed=cfg.seed,
        **trust,
    )
    module.check(tokenizer, cfg.chat.max_length)
    batches = ShardBatches(chats, renderer, writer, cfg.extract.rows_per_shard, cfg.extract.tokens_per_batch)
    rows = ShardWriter(
        writer, len(tokenizer), cfg.store.logprobs, cfg.chat.max_length, cfg.extract.max_bad_fraction, len(chats)
    )
    trainer = make_trainer(
        cfg, [rows], max_epochs=1, max_steps=-1, enable_progress_bar=False, enable_checkpointing=False
    )
    module.batches = batches
    trainer.predict(module, return_predictions=False)
    if trainer.is_global_zero:
        writer.await_shards(wait=trainer.world_size > 1)
        manifest = finish(cfg, writer, tokenizer, chats_mark, renderer)
        LOG.info(summary(manifest, output))
        if followed := wandb_run(cfg, f"extract-{source.name}"):
            followed.log({f"extract/{name}": value for name, value in numbers(manifest).items()})
            log_made(cfg, followed, ("distributions", output), [])


def finish(cfg: DictConfig, writer: Any, tokenizer: Any, chats_mark: str, renderer: Any) -> dict[str, Any]:
    """Writes the manifest once every shard is there, and returns it."""
    from fusechat.models.load import tokenizer_identity

    about = {
        "kind": "distributions",
        "model": cfg.source.name,
        "path": str(cfg.source.path),
        "chats": chats_mark,
        "tokenizer": tokenizer_identity(tokenizer),
        "vocab_size": len(tokenizer),
        "offsets": tokenizer.is_fast,
        "template": renderer.template,
        "special_ids": sorted(i for i, t in tokenizer.added_tokens_decoder.items() if t.special),
        "max_length": cfg.chat.max_length,
        "extract": plain(cfg.extract),
        "logprobs": cfg.store.logprobs,
    }
    return writer.finish(**about)  # type: ignore[no-any-return]


main = entry("extract")(run)
if __name__ == "__main__":
    main()
