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
from fusechat.models.hub import local_model
from fusechat.models.load import model_identity

COMMON = ("weights", "patterns", "dtype", "max_shard_size")  # of every method, and of the fingerprint
NO_SETTINGS = ("device", "method", "name", "dry_run", "recipe")  # of no method, and not of the fingerprint
OF_PATTERNS = ("density", "gamma", "epsilon", "scale", "normalize", "t", "filter_wise")  # what patterns may set beside


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

    Models of the Hub are downloaded, and the paths are where they lie then.

    made_by: the command that makes targets, for the message where one is missing. blocks: where the output's layers
    come from, if they are other than the pivot's (see `stack`). fewest: targets that are needed. text: the mergekit
    recipe that this one was read from.
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
    blocks: Sequence[tuple[int, int]] = ()
    fewest: int = 2
    text: str | None = None

    @classmethod
    def of(
        cls, options: Mapping[str, Any], pivot: str, targets: Sequence[str], target: str | None, **others: Any
    ) -> Recipe:
        """From the config group ``merge`` as plain data. target: instead of ``targets`` where the method stores one.

        A mergekit recipe (``recipe``) says itself what is merged, and how.
        """
        method = options["method"]
        if options.get("recipe"):
            from fusechat.merging.mergekit import read

            own = {key: options[key] for key in ("max_shard_size", "device")}
            return cls(**read(options["recipe"]), **own, **others)
        chosen = ([target] if target else []) if "store" in METHODS[method].needs else targets
        settings = {k: v for k, v in options.items() if k not in (*COMMON, *NO_SETTINGS)}
        common = {key: options[key] for key in (*COMMON, "device")}
        return cls(method, Path(pivot), [Path(path) for path in chosen], settings, **common, **others)

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "settings", settings_of(self.member, self.settings)
        )  # complete: they are the fingerprint
        check("merge", **{key: getattr(self, key) for key in (*COMMON, "device")} | dict(self.settings))
        object.__setattr__(self, "device", device_named(self.device))
        self._check_numbers()
        object.__setattr__(self, "pivot_path", Path(local_model(str(self.pivot_path))))
        object.__setattr__(self, "target_paths", [Path(local_model(str(path))) for path in self.target_paths])
        self._check_paths()

    @property
    def member(self) -> Member:
        """The method."""
        return METHODS[self.method]

    @property
    def storing(self) -> bool:
        """Whether a delta store is written instead of a model."""
        return "store" in self.member.needs

    @property
    def count(self) -> int:
        """How many models are merged: a stack of several is one."""
        return 1 if self.blocks else len(self.target_paths)

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
        options |= {"blocks": [list(block) for block in self.blocks]} if self.blocks else {}
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

    def settings_at(self, name: str) -> dict[str, Any]:
        """The method's settings for a parameter, with what its pattern says; density and gamma as one per target."""
        own = {key: value for key, value in self.pattern_at(name).items() if key in self.settings}
        found = {**self.settings, **own}
        for key in self.member.needs & {"density", "gamma"}:
            value = found[key]
            found[key] = [float(v) for v in (value if isinstance(value, (list, tuple)) else [value] * self.count)]
        return found

    def _check_numbers(self) -> None:
        count = len(self.target_paths)
        if self.storing and count != 1:
            raise UserError(f"merge={self.method} needs the target to store: add target=DIR ({count} given)")
        if not self.storing and count < self.fewest:
            wanted = "two targets" if self.fewest == 2 else "one target"
            raise UserError(f"merging needs at least {wanted}, {count} given; see targets='[DIR,DIR]'")
        self._check_lists("", {"weights": self.weights, **self.settings})
        for i, pattern in enumerate(self.patterns):
            known = [key for key in OF_PATTERNS if key in self.settings]
            chosen = pattern.keys() - {"match", "keep"}
            if "match" not in pattern or not (chosen or pattern.get("keep") == "pivot"):
                more = f"; {', '.join(known)} can be given so too" if known else ""
                told = f"merge.patterns[{i}]={dict(pattern)}"
                raise UserError(f"{told} needs match and weights, or match and keep: pivot{more}")
            for key in sorted(chosen - {"weights", *known}):
                raise UserError(f"merge.patterns[{i}].{key} is given, but merge={self.method} has none; remove it")
            self._check_lists(f"patterns[{i}].", pattern)

    def _check_lists(self, place: str, settings: Mapping[str, Any]) -> None:
        """Raises `UserError` for lists that are not one value for each target, and for weights that do nothing."""
        for key, values in settings.items():
            if isinstance(values, (list, tuple)) and values and len(values) != self.count:
                told = f"{len(values)} values for {self.count} targets"
                raise UserError(f"merge.{place}{key} has {told}; give one for each")
        if not (weights := settings.get("weights")):
            return
        if not self.member.needs & ({"weights", "variation"} if place else {"weights"}):
            raise UserError(f"merge.{place}weights is given, but merge={self.method} takes no weights; remove it")
        if settings.get("normalize", self.settings.get("normalize")):
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
                f"pivot.path={self.pivot_path} is no folder, and no Hub id (owner/name or owner/name@revision)"
            )
