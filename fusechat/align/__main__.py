"""Bring a source's distributions onto the pivot's tokens.

python -m fusechat.align experiment=tiny source=a
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from fusechat.app.command import entry, experiment_of, imported
from fusechat.app.tracking import log_made, wandb_run


def run(cfg: DictConfig) -> None:
    """Aligns ``distributions/<source>`` with ``distributions/pivot`` into ``output_dir``."""
    from fusechat.align import align
    from fusechat.align.summary import numbers

    output, made = Path(cfg.output_dir), Path(cfg.paths.experiment) / "distributions"
    pivot, source = made / "pivot", made / cfg.source.name
    extract = f"python -m fusechat.extract {experiment_of(cfg)} source="

    def follow(manifest: dict[str, Any]) -> None:
        if followed := wandb_run(cfg, f"align-{output.name}"):
            followed.log({f"align/{name}": value for name, value in numbers(manifest).items()})
            log_made(cfg, followed, ("aligned", output), [("distributions", pivot), ("distributions", source)])

    align(
        pivot,
        source,
        output,
        pivot_tokenizer=_tokenizer_of(cfg.pivot),
        source_tokenizer=_tokenizer_of(cfg.source),
        token_map=cfg.token_map.name,
        logprobs=cfg.store.logprobs,
        **cfg.alignment,
        overwrite=cfg.overwrite,
        imports=imported(cfg),
        remedies=(extract + "pivot", extract + cfg.source.name),
        when_made=follow,
    )


def _tokenizer_of(model: DictConfig) -> Callable[[], Any] | None:
    """Loads the tokenizer that a section names; None where it names none: that of the store's own path is taken."""
    from fusechat.models.load import load_tokenizer

    if OmegaConf.is_missing(model, "path"):
        return None
    return lambda: load_tokenizer(model.path, revision=model.revision, trust_remote_code=model.trust_remote_code)


main = entry("align")(run)
if __name__ == "__main__":
    main()
