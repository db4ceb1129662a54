"""Optimizers and schedules of a training: AdamW, any class by its dotted name, and Muon for matrices beside AdamW."""

from __future__ import annotations

import inspect
import pkgutil
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from fusechat.app.errors import UserError
from fusechat.app.parts import TARGET
from fusechat.fusion.options import Optimizer

Named = Sequence[tuple[str, Tensor]]
IN_BLOCKS = re.compile(r"\.\d+\.")  # names of the blocks' parameters; embeddings and heads have no number


def make_optimizer(chosen: Optimizer, trained: Named) -> torch.optim.Optimizer:
    """The optimizer of these parameters. Raises `UserError` where a class does not take what it is given."""
    parameters = [parameter for _, parameter in trained]
    if chosen.target is None:
        betas = (chosen.betas[0], chosen.betas[1])
        return torch.optim.AdamW(parameters, lr=chosen.lr, betas=betas, weight_decay=chosen.weight_decay)
    make = _located("optimizer", chosen.target)
    named = "named_parameters" in inspect.signature(make).parameters
    made: torch.optim.Optimizer = _called(
        "optimizer", make, trained if named else parameters, lr=chosen.lr, **chosen.options
    )
    return made


def make_schedule(chosen: Optimizer, optimizer: torch.optim.Optimizer, steps: int) -> Any:
    """The schedule over so many steps.

    A class or function of one's own is given the optimizer, and of num_warmup_steps, num_training_steps and total_steps
    those that it takes and its settings have not.
    """
    warmup = int(chosen.warmup_ratio * steps)
    if isinstance(chosen.schedule, str):
        return transformers.get_scheduler(chosen.schedule, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    options = {key: value for key, value in chosen.schedule.items() if key != TARGET}
    make = _located("optimizer.schedule", str(chosen.schedule[TARGET]))
    known = {"num_warmup_steps": warmup, "num_training_steps": steps, "total_steps": steps}
    taken = inspect.signature(make).parameters
    return _called(
        "optimizer.schedule", make, optimizer, **{key: known[key] for key in known if key in taken} | options
    )


class Muon(torch.optim.Optimizer):
    """Muon for the matrices of the blocks, AdamW for embeddings, heads and vectors (arXiv 2502.16982).

    lr and weight_decay serve both: Muon's update is scaled to the usual size of AdamW's, 0.2 sqrt(max(rows, columns)).
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        lr: float,
        *,
        betas: Sequence[float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        momentum: float = 0.95,
    ) -> None:
        matrices: list[Tensor] = []
        others: list[Tensor] = []
        for name, parameter in named_parameters:
            (matrices if parameter.ndim == 2 and IN_BLOCKS.search(name) else others).append(parameter)
        muon = {"momentum": momentum, "adjust_lr_fn": "match_rms_adamw", "weight_decay": weight_decay}
        adamw = {"betas": (betas[0], betas[1]), "weight_decay": weight_decay}
        self.parts: list[torch.optim.Optimizer] = []
        self.parts += [torch.optim.Muon(matrices, lr=lr, **muon)] if matrices else []  # type: ignore[arg-type]
        self.parts += [torch.optim.AdamW(others, lr=lr, **adamw)] if others else []  # type: ignore[arg-type]
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of both."""
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        for part in self.parts:
            part.step()
        return loss

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()

    def _share(self) -> None:
        """Groups and state are one's own and the parts': schedules and checkpoints see one optimizer."""
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.param_groups, part.state = [group], self.state


def _located(key: str, target: str) -> Any:
    try:
        return pkgutil.resolve_name(target)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{key}.{TARGET}={target} cannot be imported: {error}") from error


def _called(key: str, make: Any, *given: Any, **options: Any) -> Any:
    try:
        return make(*given, **options)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{key}.{TARGET}: {error}; '~{key}.KEY' takes a setting away, +{key}.KEY=VALUE adds one"
        ) from error
