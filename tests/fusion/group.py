"""The cases that several ranks train as one process does, and what each rank of a group does with them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.loggers import CSVLogger

from fusechat.app.errors import UserError
from fusechat.chats.padding import flattened
from fusechat.fusion import Callbacks, Data, FusionLoss, Optimizer, train
from fusechat.fusion.module import FusionModule
from tests.benchmarks.measure import resident


@dataclass(frozen=True)
class Case:
    """Three steps of one epoch: two of 44 chats and one of a single chat, for which all ranks but one have none."""

    name: str
    pivot: str = "pivot"
    sgd: bool = True
    options: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)


STEPS: dict[str, Any] = {"global_batch": 44, "batch_size": 11, "shuffle_seed": 1}
CASES = [
    Case("plain", trainer={"gradient_clip_val": None}),
    Case("tied", pivot="tied", options={"gradient_checkpointing": True}),
    Case("lora", options={"lora": {"enabled": True, "r": 2}}),
    Case("own_logits", pivot="tied", options={"loss": FusionLoss(lm_weight=0.5, chunked=False)}),
    Case("adamw", sgd=False),
    Case("bf16", trainer={"precision": "bf16-mixed"}),
    Case("flat", options={"data": Data(**STEPS, packing=True)}, trainer={"gradient_clip_val": None}),
]
LORA = {"enabled": True, "r": 2}
THREE_EPOCHS = {"max_epochs": 3}  # of three steps
RESUMED = Case("resumed", trainer=THREE_EPOCHS)
DROPOUT = Case("dropout", sgd=False, trainer=THREE_EPOCHS, options={"lora": {**LORA, "lora_dropout": 0.5}})
STOP = 8  # optimizer steps, of which seven are kept
CLIP = 0.1  # below every gradient's norm here


def run(case: Case, root: Path, name: str, strategy: str, world: int) -> None:
    """One training, of which this process is a rank: ``targets/NAME`` and ``logs/NAME``."""
    trainer = {"max_epochs": 1, "log_every_n_steps": 1, "gradient_clip_val": CLIP, "devices": world}
    with pytest.MonkeyPatch.context() as patch:
        if case.name == "flat":  # as flash attention would have chats
            patch.setattr("fusechat.fusion.fit.layout_of", lambda *_: flattened)
        if case.sgd:
            patch.setattr(FusionModule, "configure_optimizers", sgd)
        train(
            root / "world/models" / case.pivot,
            root / "distributions/pivot",
            {"a": root / "aligned/a"},
            root / "targets" / name,
            optimizer=Optimizer(lr=1e-3, warmup_ratio=0.0, schedule="constant"),
            callbacks=Callbacks(progress_bar=False, checkpoint_every_n_steps=7),
            trainer={**trainer, "strategy": strategy, **case.trainer},
            logger=lambda step: [CSVLogger(root / "logs", name=name, version="")],
            **{"loss": FusionLoss(lm_weight=0.5), "data": Data(**STEPS), **case.options},
        )


def sgd(module: FusionModule) -> Any:
    return torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=1.0)


def rank(number: int, world: int, root: Path, jobs: list[tuple[Case, str]]) -> None:
    """One rank of a group: all jobs in turn, in one process group."""
    os.environ |= {"LOCAL_RANK": str(number), "NODE_RANK": "0", "WORLD_SIZE": str(world)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{root}/meeting-{world}", rank=number, world_size=world)
    for case, strategy in jobs:
        run(case, root, f"{case.name}-{strategy}-{world}", strategy, world)
    for strategy in ("ddp", "fsdp"):
        stopped(RESUMED, root, f"{RESUMED.name}-{strategy}-{world}", strategy, world)
        stopped(DROPOUT, root, f"{DROPOUT.name}-{strategy}-{world}-stopped", strategy, world)
        run(DROPOUT, root, f"{DROPOUT.name}-{strategy}-{world}-stopped", strategy, world)
        run(DROPOUT, root, f"{DROPOUT.name}-{strategy}-{world}", strategy, world)
    loading(root, number, world)
    refused(root, number, world)
    dist.destroy_process_group()


def loading(root: Path, number: int, world: int) -> None:
    """Writes down how far the peak of this rank's memory rises while the large pivot is loaded and sharded."""
    from torch.distributed.device_mesh import init_device_mesh

    module = FusionModule(str(root / "world/models/large"), ["a"])
    module._device_mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("data_parallel",))
    module._trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cpu")))
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmHWM:")
    module.configure_model()
    rise = resident("VmHWM:") - before
    own = {name: tensor.full_tensor() for name, tensor in module.model.named_parameters()}
    sums = [hashlib.sha256(tensor.detach().numpy().tobytes()).hexdigest() for tensor in own.values()]
    sums += [hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for tensor in module.model.buffers()]
    (root / f"loaded-{number}-of-{world}.json").write_text(json.dumps({"rise": rise, "sums": sums}))


def refused(root: Path, number: int, world: int) -> None:
    """Writes down what this rank says of a pivot with a tensor missing, which the first rank alone reads."""
    with pytest.raises(UserError) as told:
        run(Case("broken", pivot="broken"), root, f"broken-{world}", "fsdp", world)
    (root / f"refused-{number}-of-{world}.txt").write_text(str(told.value))


class Stopped(Exception):
    """A training that ends before its time."""


def stopped(case: Case, root: Path, name: str, strategy: str, world: int) -> None:
    """A training that leaves a checkpoint behind."""

    def stop(module: FusionModule, *batch: Any) -> None:
        if module.global_step == STOP:
            raise Stopped

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Stopped):
        patch.setattr(FusionModule, "on_train_batch_end", stop)
        run(case, root, name, strategy, world)
