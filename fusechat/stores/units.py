"""Units in which likelihoods are told: the one place."""

from __future__ import annotations

import math
from typing import Any


def bits(nats: Any) -> Any:
    """Nats -> bits; numbers, arrays and tensors."""
    return nats / math.log(2)


def bits_per_byte(nats: Any, n_bytes: Any) -> Any:
    """Bits per UTF-8 byte of a text, whatever the tokenizer: its negative log-likelihood in nats over its length."""
    return bits(nats) / n_bytes
