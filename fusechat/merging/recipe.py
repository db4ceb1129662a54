"""All that decides a merged model: method, settings, inputs."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from fusechat.app.errors import UserError
from fusechat.app.outputs import stage_fingerprint
from fusechat.app.registry import Member
from fusechat.app.settings import check
from fusechat.merging.family import settings_of, total_of
from fusechat.merging.methods import METHODS
from fusechat.models.devices import device_of
from fusechat.models.gguf import check_plain
from fusechat.models.load import model_identity

COMMON = ("weights", "patterns", "dtype", "max_shard_size")  # of every method, and of the fingerprint


def device_named(device: str) -> str:
    """merge.device as torch writes it. Raises `UserError` where it is not here, or knows no float64 (sums need it)."""
    found = device_of(device, "merge.device")
    if found.type in ("cpu", "cuda"):
        return str(found)
    if device == "auto":
        return "cpu"
    raise UserError(f"merge.device={device}: merging needs cpu or cuda; set merge.device=cpu")


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
    device: str = "cpu"
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
        settings = {k: v for k, v in options.items() if k not in (*COMMON, "device", "method", "name", "dry_run")}
        common = {key: options[key] for key in (*COMMON, "device")}
        return cls(method, Path(pivot), [Path(path) for path in chosen], settings, **common, **others)

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "settings", settings_of(self.member, self.settings)
        )  # complete: they are the fingerprint
        check("merge", **{key: getattr(self, key) for key in (*COMMON, "device")} | dict(self.settings))
        object.__setattr__(self, "device", device_named(self.device))
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

    @property
    def ordered(self) -> list[str]:
        """The hashes of pivot and targets, in order; the pivot may be a target too."""
        return [self.identities[str(path)] for path in (self.pivot_path, *self.target_paths)]

    @cached_property
    def mark(self) -> str:
        """The merged model's fingerprint."""
        common = {key: getattr(self, key) for key in COMMON}
        options = {"method": self.method, **common, "patterns": list(self.patterns), **self.settings}
        return stage_fingerprint(self.imports, merge=options, inputs=self.ordered, seed=self.seed)

    def pattern_at(self, name: str) -> Mapping[str, Any]:
        """The first pattern that fits a parameter; empty where none does."""
        return next((pattern for pattern in self.patterns if re.search(pattern["match"], name)), {})

    def check_patterns(self, names: Collection[str]) -> None:
        """Raises `UserError` for a pattern that fits none of the parameters."""
        for i, pattern in enumerate(self.patterns):
            if not any(re.search(pattern["match"], name) for name in names):
                raise UserError(
                    f"merge.patterns[{i}].match={pattern['match']!r} fits no parameter of {self.pivot_path}, whose "
                    f"first is {next(iter(names), None)}; merge.dry_run=true lists them without patterns"
                )

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
        lists = {"weights": self.weights or []}
        lists |= {key: value for key, value in self.settings.items() if isinstance(value, (list, tuple))}
        lists |= {f"patterns[{i}].weights": p.get("weights") or [] for i, p in enumerate(self.patterns)}
        for key, values in lists.items():
            if values and len(values) != count:
                raise UserError(f"merge.{key} has {len(values)} values for {count} targets; give one for each")
            if key.endswith("weights") and values:
                self._check_weights(key, values)
        for i, pattern in enumerate(self.patterns):
            if "match" not in pattern or not (pattern.get("weights") or pattern.get("keep") == "pivot"):
                told = f"merge.patterns[{i}]={dict(pattern)}"
                raise UserError(f"{told} needs match and weights, or match and keep: pivot")

    def _check_weights(self, key: str, weights: Sequence[float]) -> None:
        taken = self.member.needs & ({"weights", "variation"} if key.startswith("patterns") else {"weights"})
        if not taken:
            raise UserError(f"merge.{key} is given, but merge={self.method} takes no weights; remove it")
        if self.settings.get("normalize"):
            total_of(weights)

    def _check_paths(self) -> None:
        check_plain(self.pivot_path, "pivot.path")
        for path in self.target_paths:
            check_plain(path, "targets")
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
