"""All that decides a merged model: method, settings, inputs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from fusechat.app.errors import UserError, one_of
from fusechat.app.outputs import stage_fingerprint
from fusechat.app.registry import Member
from fusechat.merging.family import settings_of
from fusechat.merging.methods import METHODS
from fusechat.models.checkpoints import bytes_of
from fusechat.models.load import model_identity

COMMON = ("weights", "patterns", "dtype", "max_shard_size")  # keys of the config group that every method has


@dataclass(frozen=True)
class Recipe:
    """Checked when made: raises `UserError` for what no merge could follow. Fields: the arguments of `run.merge`.

    made_by: the command that makes targets, for the message where one is missing.
    """

    method: str
    pivot_path: Path
    target_paths: Sequence[Path]
    settings: Mapping[str, Any] = field(default_factory=dict)
    weights: Sequence[float] | None = None
    patterns: Sequence[Mapping[str, Any]] = ()
    dtype: str | None = None
    max_shard_size: str | int = "5GB"
    seed: int = 0
    imports: Mapping[str, str] | None = None
    made_by: str = "python train.py"

    @classmethod
    def of(
        cls, options: Mapping[str, Any], pivot: str, targets: Sequence[str], target: str | None, **others: Any
    ) -> Recipe:
        """From the config group ``merge`` as plain data. target: instead of ``targets`` where the method stores one."""
        method = options["method"]
        chosen = ([target] if target else []) if "store" in METHODS[method].needs else targets
        settings = {k: v for k, v in options.items() if k not in (*COMMON, "method", "name", "dry_run")}
        common = {key: options[key] for key in COMMON}
        return cls(method, Path(pivot), [Path(path) for path in chosen], settings, **common, **others)

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "settings", settings_of(self.member, self.settings)
        )  # complete: they are the fingerprint
        self._check_numbers()
        self._check_paths()

    @property
    def member(self) -> Member:
        """The method."""
        return METHODS[self.method]

    @property
    def storing(self) -> bool:
        """Whether a delta store is written instead of a model."""
        return "store" in self.member.needs

    @cached_property
    def identities(self) -> dict[str, str]:
        """Path -> hash of content, pivot first."""
        return {str(path): model_identity(str(path)) for path in (self.pivot_path, *self.target_paths)}

    @cached_property
    def mark(self) -> str:
        """The merged model's fingerprint."""
        common = {key: getattr(self, key) for key in COMMON}
        options = {"method": self.method, **common, "patterns": list(self.patterns), **self.settings}
        return stage_fingerprint(self.imports, merge=options, inputs=list(self.identities.values()), seed=self.seed)

    def pattern_at(self, name: str) -> Mapping[str, Any]:
        """The first pattern that fits a parameter; empty where none does."""
        return next((pattern for pattern in self.patterns if re.search(pattern["match"], name)), {})

    def per_target(self, key: str) -> list[float]:
        """A setting as one value per target."""
        value = self.settings[key]
        return (
            [float(v) for v in value] if isinstance(value, (list, tuple)) else [float(value)] * len(self.target_paths)
        )

    def _check_numbers(self) -> None:
        count = len(self.target_paths)
        if self.storing and count != 1:
            raise UserError(f"merge={self.method} needs the target to store: add target=DIR ({count} given)")
        if not self.storing and count < 2:
            raise UserError(f"merging needs at least two targets, {count} given; see targets='[DIR,DIR]'")
        lists = {"weights": self.weights or []} | {
            k: v for k, v in self.settings.items() if isinstance(v, (list, tuple))
        }
        lists |= {f"patterns[{i}].weights": p.get("weights") or [] for i, p in enumerate(self.patterns)}
        for key, values in lists.items():
            if values and len(values) != count:
                raise UserError(f"merge.{key} has {len(values)} values for {count} targets; give one for each")
        for i, pattern in enumerate(self.patterns):
            if "match" not in pattern or not (pattern.get("weights") or pattern.get("keep") == "pivot"):
                raise UserError(
                    f"merge.patterns[{i}]={dict(pattern)} needs match and weights, or match and keep: pivot"
                )
        if self.dtype:
            one_of(self.dtype, ("float32", "bfloat16", "float16"), "merge.dtype")
        bytes_of(self.max_shard_size)

    def _check_paths(self) -> None:
        for path in self.target_paths:
            if not path.is_dir():
                raise UserError(f"the target {path} does not exist; make it with: {self.made_by} source={path.name}")
        resolved = [path.resolve() for path in self.target_paths]
        if twice := [path for path in resolved if resolved.count(path) > 1]:
            raise UserError(f"the target {twice[0]} is given twice; remove one, or give it a weight with merge.weights")
        if not self.pivot_path.is_dir():
            raise UserError(
                f"pivot.path={self.pivot_path} is no directory; merging reads local checkpoints: "
                "download it with `hf download`"
            )
