"""What the two 7B experiments need in disk, network and GPU hours on 8 x 80 GB: arithmetic, from the rates named here.

extraction  2 P D / (u F)          training  6 P D E / (u F)         GPU seconds
P parameters that a token meets, D tokens of all chats, E epochs, F the card's bf16 peak, u the share of it in use.
P_all parameters in all; a model takes 2 P_all bytes in bf16, a target 4 P_all (fp32), a checkpoint 12 P_all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tests.benchmarks.measure import table

CHATS, LENGTH, RESPONSE, EPOCHS = 95_000, 900, 0.8, 3  # LENGTH, RESPONSE: assumed; scale them to your chats
PEAK = {"A100": 312e12, "H100": 989e12}  # bf16, dense, FLOP/s
USED = 0.4  # of the peak: assumed for both kinds of pass
CARD = 72e9  # bytes of an 80 GB card that weights may take


@dataclass(frozen=True)
class Model:
    """total, active: parameters in all and those that a token meets; vocabulary decides the bytes of an id."""

    name: str
    total: float
    active: float
    vocabulary: int

    @property
    def cards(self) -> int:
        """80 GB cards that its bf16 weights need."""
        return math.ceil(2 * self.total / CARD)


PIVOT = Model("openchat_3_5", 7.24e9, 7.24e9, 32_002)
V1 = [Model("nh2_mixtral", 46.7e9, 12.9e9, 32_002), Model("nh2_solar", 10.7e9, 10.7e9, 32_002)]
V2 = [
    Model("starling", 7.24e9, 7.24e9, 32_002),
    V1[1],
    Model("internlm2_20b", 19.9e9, 19.9e9, 92_544),
    Model("mixtral_8x7b", 46.7e9, 12.9e9, 32_000),
    Model("qwen1_5_72b", 72.3e9, 72.3e9, 152_064),
]


def stored_bytes(vocabulary: int, k: int = 10) -> float:
    """Bytes of a store's response token: k ids and log-probabilities, the gold token's, its boundary; and of its input
    ids.
    """
    ids = 2 if vocabulary <= 1 << 16 else 4
    return RESPONSE * (k * (ids + 2) + 2 + 1) + ids


def rows(sources: list[Model], card: str) -> list[list[object]]:
    """A line for each model, then the sums."""
    tokens, flops = CHATS * LENGTH, USED * PEAK[card] * 3600
    found: list[list[object]] = []
    for model in [PIVOT, *sources]:
        source = model is not PIVOT
        busy = 2 * model.active * tokens / flops
        trained = 6 * PIVOT.total * tokens * EPOCHS / flops if source else 0.0
        store = stored_bytes(model.vocabulary) * tokens / 1e9
        aligned = (stored_bytes(PIVOT.vocabulary) - 2) * tokens / 1e9 if source else 0.0
        weights, target = 2 * model.total / 1e9, 4 * PIVOT.total / 1e9 if source else 0.0
        found.append([model.name, weights, model.cards, store, aligned, target, busy * model.cards, trained])
    sums = [sum(float(row[i]) for row in found) for i in range(1, 8)]  # type: ignore[arg-type]
    return [*found, ["all", sums[0], "", *sums[2:]]]


def main() -> None:
    """Prints the tables."""
    header = [
        "model",
        "download GB",
        "cards",
        "store GB",
        "aligned GB",
        "target GB",
        "extraction GPU h",
        "training GPU h",
    ]
    for name, sources in (("fusechat_7b_varm", V1), ("fusechat_7b_v2", V2)):
        for card in PEAK:
            table(f"{name}, {card} 80 GB at {USED:.0%} of its peak", header, rows(sources, card))
    checkpoint, merged = 12 * PIVOT.total / 1e9, 2 * PIVOT.total / 1e9
    print(
        f"\nbeside these: {2 * checkpoint:.0f} GB of checkpoints while a target trains, the merged model {merged:.1f} GB"
    )
    released = 8 * PIVOT.total * CHATS * 2048 * EPOCHS / (8 * PEAK["A100"] * 7 * 3600)
    print(f"the authors' 7 hours on 8 x A100, were every chat padded to 2,048 tokens: {released:.0%} of the peak")


if __name__ == "__main__":
    main()
