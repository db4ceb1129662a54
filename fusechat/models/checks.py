"""What is looked at when a model has been loaded: that its checkpoint was complete and its weights are numbers."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fusechat.app.errors import UserError

if TYPE_CHECKING:
    from torch import nn

LOG = logging.getLogger(__name__)
AGAIN = "copy or download the model again"


def check_complete(loading: Mapping[str, Any], path: str) -> None:
    """Raises `UserError` where transformers made up tensors that a checkpoint lacks. loading: its loading info."""
    lacking, extra = sorted(loading["missing_keys"]), sorted(loading["unexpected_keys"])
    if lacking:
        other = f" (it holds {extra[0]} instead: is config.json another model's?)" if extra else ""
        raise UserError(f"{path} lacks {lacking[0]}, {len(lacking)} tensors in all{other}; {AGAIN}")
    if extra:
        LOG.warning("%s holds %d tensors that its config.json has no place for: %s, …", path, len(extra), extra[0])


def check_finite(model: nn.Module, path: str) -> None:
    """Raises `UserError` that names the first tensor with NaN or inf; those that are offloaded are passed over."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not tensor.is_meta and tensor.is_floating_point() and tensor.numel() and tensor.element_size() > 1:
            low, high = tensor.detach().aminmax()
            if not (low.isfinite() and high.isfinite()):  # NaN goes through minimum and maximum
                raise UserError(f"{path} holds NaN or inf in {name}; {AGAIN}")
