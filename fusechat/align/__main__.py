"""Bring a source's distributions onto the pivot's tokens.

python -m fusechat.align experiment=tiny source=a
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from fusechat.app.command import entry, experiment_of
from fusechat.app.errors import one_of
from fusechat.app.tracking import log_made, wandb_run

LOG = logging.getLogger(__name__)
MAPS = ("em", "mined", "ms", "prefix", "uld")


def run(cfg: DictConfig) -> None:
    """Aligns ``distributions/<source>`` with ``distributions/pivot`` into ``output_dir``."""
    from fusechat.align import stage as stores
    from fusechat.app import outputs
    from fusechat.models import load as models
    from fusechat.stores import store

    one_of(cfg.token_map.name, MAPS, "token_map")
    one_of(cfg.alignment.sequence, ("dtw", "offsets"), "alignment.sequence")
    one_of(cfg.alignment.unmatched, ("gold", "skip"), "alignment.unmatched")
    command = f"python -m fusechat.extract {experiment_of(cfg)} source="
    pivot = store.DistributionStore(Path(cfg.paths.experiment) / "distributions/pivot", command + "pivot")
    source = store.DistributionStore(
        Path(cfg.paths.experiment) / "distributions" / cfg.source.name, command + cfg.source.name
    )
    stores.check_chats(pivot, source)
    output = Path(cfg.output_dir)
    mark = outputs.fingerprint(
        pivot=pivot.fingerprint,
        source=source.fingerprint,
        token_map=cfg.token_map.name,
        logprobs=cfg.store.logprobs,
        sequence=cfg.alignment.sequence,
        unmatched=cfg.alignment.unmatched,
    )
    held = store.read_manifest(output)
    if held and held["fingerprint"] == mark:
        LOG.info("skip: %s is aligned already (fingerprint %s)", output, mark)
        return
    if cfg.overwrite:
        store.remove(output)
    writer = store.StoreWriter(output, mark, len(source.manifest["shards"]))
    about: dict[str, Any] = {
        "kind": "aligned",
        "model": cfg.source.name,
        "pivot": pivot.fingerprint,
        "source": source.fingerprint,
    }
    about |= {
        "vocab_size": pivot.manifest["vocab_size"],
        "chats": pivot.manifest["chats"],
        "logprobs": cfg.store.logprobs,
    }
    if stores.same_tokens(pivot, source):
        LOG.info("%s shares the pivot's tokens: passed through", cfg.source.name)
        stores.link_shards(source, writer)
        manifest = writer.finish(**about, token_map="same", sequence="same")
    else:
        tokenizers = (
            models.load_tokenizer(cfg.pivot.path, revision=cfg.pivot.revision),
            models.load_tokenizer(
                cfg.source.path, revision=cfg.source.revision, trust_remote_code=cfg.source.trust_remote_code
            ),
        )
        stores.check_texts(pivot, source, tokenizers)
        alignment = make_alignment(cfg, pivot, source, tokenizers)
        stores.write_aligned(alignment, writer, cfg.alignment.num_proc)
        manifest = writer.finish(**about, token_map=cfg.token_map.name, sequence=alignment.sequence)
    LOG.info(summary(manifest, output))
    if followed := wandb_run(cfg, f"align-{output.name}"):
        followed.log({f"align/{name}": value for name, value in numbers(manifest).items()})
        log_made(cfg, followed, ("aligned", output), [("distributions", pivot.path), ("distributions", source.path)])


def make_alignment(cfg: DictConfig, pivot: Any, source: Any, tokenizers: tuple[Any, Any]) -> Any:
    """The alignment that the config describes, its vocabulary map made."""
    import numpy as np

    from fusechat.align import maps as vocabulary
    from fusechat.align import stage as stores

    name, num_proc, sequence = cfg.token_map.name, cfg.alignment.num_proc, cfg.alignment.sequence
    known = all(s.manifest.get("offsets", True) for s in (pivot, source))
    if sequence == "offsets" and not known:
        LOG.warning("a slow tokenizer reports no offsets: aligned by alignment.sequence=dtw instead")
        sequence = "dtw"
    texts = None
    if sequence == "dtw":  # bytes as characters: no replacement character can derail the distances
        texts = tuple([(b or b"").decode("latin-1") for b in vocabulary.token_bytes(t)] for t in tokenizers)
    alignment = stores.Alignment(
        pivot,
        source,
        sequence,
        cfg.alignment.unmatched,
        name == "prefix" and known,
        cfg.store.logprobs,
        texts=texts,  # type: ignore[arg-type]
    )
    if name == "uld":
        return alignment
    roles = stores.role_pairs(pivot, source, tokenizers)
    make = {"em": vocabulary.em, "mined": vocabulary.mined, "ms": vocabulary.mined, "prefix": vocabulary.prefix}[name]
    table = make(tokenizers[1], tokenizers[0], roles)
    if name == "ms":
        parts = [
            *stores.each_shard(
                alignment, stores.Alignment.pair_counts, list(range(len(alignment.rows_by_shard))), num_proc
            )
        ]
        pairs, inverse = np.unique(np.concatenate([p for p, _ in parts]), return_inverse=True)
        counts = np.bincount(inverse, weights=np.concatenate([c for _, c in parts])).astype(np.int64)
        table = vocabulary.most_supported(pairs, counts, table, len(tokenizers[0]))
    alignment.table = table
    return alignment


def numbers(manifest: dict[str, Any]) -> dict[str, float]:
    """Positions, the share of each kind of partner, and the cross entropy of the gold token where there is one."""
    parts = [entry["statistics"] for entry in manifest["shards"]]
    sums = {key: sum(part.get(key, 0) for part in parts) for key in (*KINDS_SHOWN, "matched_nats")}
    total = max(1, sum(sums[k] for k in KINDS_SHOWN))
    shares = {kind: sums[kind] / total for kind in KINDS_SHOWN}
    return {"positions": total, **shares, "matched_nats": sums["matched_nats"] / max(1, total - sums["none"])}


def summary(manifest: dict[str, Any], path: Path) -> str:
    """The closing line."""
    n = numbers(manifest)
    shares = ", ".join(f"{kind} {n[kind]:.1%}" for kind in KINDS_SHOWN)
    return f"{manifest['model']} aligned: {n['positions']:,} positions ({shares}); gold {n['matched_nats']:.3f} nats where matched; {path}"


KINDS_SHOWN = ("same", "n:1", "1:n", "none")
main = entry("align")(run)
if __name__ == "__main__":
    main()
