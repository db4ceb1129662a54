"""A quiet Lightning Trainer from plain options, and seeds. Knows no config; lightning is imported when called.

Precision and strategy are told here: no plugin of Lightning's touches weights, buffers or batches, which are loaded in
the dtype they have and reach the step as they are; ``strategy=fsdp`` is FSDP2 over all ranks.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from fusechat.app.errors import UserError

TIMEOUT = 30.0  # minutes that a rank waits for the others
NOISE = [".*does not have many workers.*", ".*`IterableDataset` has `__len__`.*", ".*LeafSpec.*"]
NOISE += [
    ".*sync_dist=True.*",
    ".*Checkpoint directory .* exists.*",
    ".*Experiment logs directory .* exists and is not empty.*",  # of the part that a resume does again
    ".*smaller than the logging interval.*",
    ".*find_unused_parameters=True was specified.*",
    ".*is_gradient_checkpointing. is deprecated.*",  # peft asks for it
]


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and torch, DataLoader workers included."""
    import lightning

    lightning.seed_everything(seed, workers=True, verbose=False)


def quiet_trainer(options: Mapping[str, Any], callbacks: Sequence[Any], logger: Any = False) -> Any:
    """`lightning.Trainer` with these options of its own (see `trainer_options`), without its chatter."""
    import lightning

    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)  # set here: lightning sets its own level when imported
    for message in NOISE:
        warnings.filterwarnings("ignore", message)
    trainer = lightning.Trainer(**trainer_options(options), callbacks=list(callbacks), logger=logger)
    if hasattr(trainer.strategy, "_data_parallel_size"):  # known only now: Lightning's own choice is the nodes
        trainer.strategy._data_parallel_size = trainer.world_size
    return trainer


def trainer_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `lightning.Trainer` from ours.

    timeout: minutes that a rank waits for the others. Raises `UserError` for strategies that split weights otherwise.
    """
    kept = {key: value for key, value in options.items() if key != "timeout"}
    timeout = timedelta(minutes=float(options.get("timeout") or TIMEOUT))
    name = str(kept.get("strategy", "auto"))
    if name == "fsdp":
        from lightning.pytorch.strategies import ModelParallelStrategy

        kept["strategy"] = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1, timeout=timeout)
    elif name == "ddp":
        from lightning.pytorch.strategies import DDPStrategy

        # looking for unused parameters keeps buckets as they are made: else a resume would sum in another order
        kept["strategy"] = DDPStrategy(timeout=timeout, find_unused_parameters=True)
    elif "fsdp" in name or "deepspeed" in name:
        raise UserError(f"trainer.strategy={name!r} is not supported; use one of: auto, ddp, fsdp (FSDP2)")
    autocast = kept.get("precision") == "bf16-mixed" and name != "fsdp"  # shards are gathered in bf16
    return {**kept, "precision": "bf16-mixed" if autocast else "32-true"}
