"""PEFT adapter folders as targets: read like a checkpoint of the pivot's weights with the adapter in them, in fp32."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from fusechat.app.errors import UserError
from fusechat.app.texts import json_object
from fusechat.models.checkpoints import LazyCheckpoint, TensorInfo, read_header
from fusechat.models.computed import Source, low_rank, whole_of
from fusechat.models.load import model_identity
from fusechat.models.whole import ADAPTER_CONFIG, ADAPTER_WEIGHTS, check_model

PREFIX = "base_model.model."
PARTS = re.compile(r"^(.*)\.lora_(embedding_)?([AB])(?:\.weight)?$")
UNSUPPORTED = ("use_dora", "layer_replication", "lora_bias", "trainable_token_indices", "target_parameters")
CHANGES_BASE = ("pissa", "olora", "corda", "loftq")  # initialisations after which the base is no longer the pivot


class AdapterCheckpoint(LazyCheckpoint):
    """W + scale · B A for the matrices that a LoRA adapter touches; what it saved whole as it is; else the pivot's.

    scale is alpha / r, or alpha / sqrt(r) for rank-stabilised adapters, as peft has it. Raises `UserError` for an
    adapter of another base than the pivot, of another kind, and for what does not fit the pivot's parameters.
    """

    def __init__(self, path: Path, pivot: LazyCheckpoint) -> None:
        self.path, self.pivot = path, pivot
        self._maps, self._bin, self._streams = {}, {}, {}
        check_model(path)
        self.config = json_object(path / ADAPTER_CONFIG)
        _check_kind(path, self.config)
        _check_base(path, self.config, pivot.path)
        if not (path / ADAPTER_WEIGHTS).exists():
            raise UserError(f"{path} lacks {ADAPTER_WEIGHTS}; save the adapter again with safe_serialization=True")
        stored = {name.removeprefix(PREFIX): info for name, info in read_header(path / ADAPTER_WEIGHTS).items()}
        self.infos = {name: TensorInfo(i.shape, i.dtype, i.file, -1) for name, i in pivot.infos.items()}
        self.factors: dict[str, dict[str, TensorInfo]] = {}
        for name, info in stored.items():
            self._place(name, info)
        for name, parts in self.factors.items():
            self._check_factors(name, parts)

    def tensor(self, name: str) -> Tensor:
        """A parameter with the adapter in it, in fp32 where it is touched."""
        return whole_of(self.source(name))

    def source(self, name: str) -> Source:
        """The same by rows."""
        info = self.infos[name]
        own = self.at(info) if info.start >= 0 else self.pivot.tensor(name)
        if name not in self.factors:
            return own
        left, right = self._sides(name)
        return low_rank(own, left * self._scale(name), right)

    def _place(self, name: str, info: TensorInfo) -> None:
        """Files one stored tensor under the parameter that it changes."""
        part = PARTS.match(name)
        key = (
            f"{part[1]}.weight" if part else name.replace(".base_layer.", ".")
        )  # peft saves embeddings it adapts whole
        if key not in self.infos:
            raise UserError(f"{self.path}: {name} belongs to no parameter of the pivot {self.pivot.path}")
        if part:
            self.factors.setdefault(key, {})[f"{part[2] or ''}{part[3]}"] = info
        else:
            self.infos[key] = info

    def _sides(self, name: str) -> tuple[Tensor, Tensor]:
        """Left [rows, r] and right [r, columns] factor of a change, in fp32; embeddings and Conv1D lie transposed."""
        parts = {key: self.at(info).float() for key, info in self.factors[name].items()}
        embedding = "embedding_A" in parts
        a, b = (parts["embedding_A"], parts["embedding_B"]) if embedding else (parts["A"], parts["B"])
        return (a.t(), b.t()) if embedding or self.config.get("fan_in_fan_out") else (b, a)

    def _scale(self, name: str) -> float:
        rank = next(info.shape[0] for key, info in self.factors[name].items() if key.endswith("A"))
        module, alpha = name.removesuffix(".weight"), self.config["lora_alpha"]
        for pattern, value in (self.config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                alpha = value
                break
        return float(alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank))

    def _check_factors(self, name: str, parts: dict[str, TensorInfo]) -> None:
        if sorted(key[-1] for key in parts) != ["A", "B"]:
            raise UserError(f"{self.path}: the change of {name} lacks one of its two factors; save the adapter again")
        left, right = self._sides(name)
        if (left.shape[0], right.shape[1]) != self.pivot.infos[name].shape or left.shape[1] != right.shape[0]:
            raise UserError(
                f"{self.path}: a change of shape {(left.shape[0], right.shape[1])} does not fit {name}, "
                f"{self.pivot.infos[name].shape} in the pivot {self.pivot.path}"
            )


def is_adapter(path: Path) -> bool:
    """Whether a folder holds a PEFT adapter instead of a model."""
    return (path / ADAPTER_CONFIG).exists()


def _check_kind(path: Path, config: dict[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise UserError(f"{path} is a {config.get('peft_type')} adapter; only LORA can be merged by matrices")
    used = [key for key in UNSUPPORTED if config.get(key)]
    start = str(config.get("init_lora_weights")).lower()
    used += ["init_lora_weights"] if start.startswith(CHANGES_BASE) else []
    if used:
        raise UserError(
            f"{path}: {used[0]}={config[used[0]]} is not supported; merge it into its base with peft's "
            "merge_and_unload and give the model that this saves"
        )


def _check_base(path: Path, config: dict[str, Any], pivot: Path) -> None:
    """Raises unless the pivot is the model that the adapter is of: by content, or by name where it lies elsewhere."""
    base = str(config.get("base_model_name_or_path") or "")
    place, resolved = Path(base), pivot.resolve()
    if base and place.is_dir():
        same = place.resolve() == resolved or model_identity(base) == model_identity(str(pivot))
    else:
        same = bool(base) and (place.name == resolved.name or f"models--{base.replace('/', '--')}" in resolved.parts)
    if not same:
        raise UserError(
            f"{path} is an adapter of {base or 'an unnamed model'}, the pivot is {pivot}; give that model as "
            f"pivot.path, or its path as base_model_name_or_path in {path / ADAPTER_CONFIG} where it is the same"
        )
