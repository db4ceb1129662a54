"""Where a model runs: devices by the names people give them, and where a model that accelerate has spread is fed."""

from __future__ import annotations

from typing import Any

import torch

from fusechat.app.errors import UserError


def device_of(name: str, key: str) -> torch.device:
    """``auto`` (the accelerator at hand, else the CPU), ``cpu``, ``cuda``, ``cuda:1``, ``mps``.

    key: what the message calls it. Raises `UserError` for a device that is not here.
    """
    here = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return here or torch.device("cpu")
    kinds = ["cpu", *([here.type] if here else [])]
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in kinds or (device.index or 0) >= _count(device):
        found = ", ".join([*kinds[:1], *(f"{kind} ({_count(torch.device(kind))})" for kind in kinds[1:])])
        raise UserError(f"{key}={name}: no such device here; this machine has: {found}; {key}=auto takes what is there")
    return device


def devices_of(accelerator: str, devices: str | int, key: str) -> list[torch.device]:
    """A device for each process: ``devices`` of them, or with ``auto`` all that there are (of the CPU, one).

    A CPU may be asked for any number of times. key: of the group. Raises `UserError` where there are fewer.
    """
    device = device_of(accelerator, f"{key}.accelerator")
    cpu = device.type == "cpu"
    wanted = (1 if cpu else _count(device)) if devices == "auto" else devices
    if isinstance(wanted, bool) or not isinstance(wanted, int) or wanted < 1:
        raise UserError(f"{key}.devices={devices}: expected auto, or a number of at least 1")
    if cpu:
        return [device] * wanted
    if wanted > _count(device):
        raise UserError(f"{key}.devices={wanted}: this machine has {_count(device)} ({device.type})")
    return [torch.device(device.type, index) for index in range(wanted)]


def fed_at(model: Any) -> torch.device:
    """Where a model wants its token ids: beside its embedding; where accelerate offloads that, where it is run."""
    embedding = model.get_input_embeddings()
    hook = getattr(embedding, "_hf_hook", None)
    run_at = getattr(hook, "execution_device", None)
    return torch.device(embedding.weight.device if run_at is None else run_at)


def _count(device: torch.device) -> int:
    return 1 if device.type == "cpu" else torch.accelerator.device_count()
